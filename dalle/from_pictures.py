"""A folder of pictures in the place of token shards: shards, image tokenizer and codes are made on the way.

Each part is what its own command makes and is found again when the same command starts again: `data/NAME_shards` of
data_tools.shard, `runs/NAME_vqgan` of train_vqgan.py, `data/NAME_tokens` of vq.encode_shards, NAME being the folder's.
"""

from dataclasses import replace
from pathlib import Path

from common import checkpoint
from common.config import parse_options, read_mapping
from common.distributed import World
from common.log import say
from dalle.train_options import Options
from data_tools.readers import ReaderOptions, open_source
from data_tools.shard import ShardConfig, shard
from vq.encode_shards import Options as EncodeOptions
from vq.encode_shards import encode_shards
from vq.model import KIND as TOKENIZER_KIND
from vq.model import ImageTokenizer
from vq.options import Options as TokenizerOptions
from vq.train import train

RECIPE = Path(__file__).parent.parent / "configs/own_128/vqgan.yaml"
VAL_SHARE = 0.05
VIEWS = 6


def names_pictures(data: str) -> bool:
    """Whether `data` is a folder or a file on this machine that holds no shards."""
    path = Path(data)
    return bool(data) and path.exists() and not any(path.glob("train-*.tar"))


def prepare_pictures(options: Options, world: World) -> Options:
    """`options` with token shards for `data`, and the tokenizer that made them.

    Raises ValueError for pictures that cannot be recognised, for too few, and under several processes, which would
    all do the same.
    """
    if world.size > 1:
        raise ValueError(
            f"{options.data} holds pictures: make token shards first, with one process, by the same command without a "
            "launcher, or by data_tools.shard, train_vqgan.py and vq.encode_shards"
        )
    source = Path(options.data)
    name = source.resolve().name.removesuffix(source.suffix if source.is_file() else "")
    shards, tokens, run_dir = (
        Path(f"data/{name}_shards"),
        Path(f"data/{name}_tokens"),
        Path(f"runs/{name}_vqgan"),
    )
    say(f"1/4 {source} -> {shards}")
    _make_shards(source, shards)
    if options.image_tokenizer:
        tokenizer = options.image_tokenizer
        say(f"2/4 image tokenizer: {tokenizer}")
    else:
        tokenizer = str(run_dir)
        say(f"2/4 image tokenizer -> {run_dir}")
        _train_tokenizer(options, shards, run_dir)
    say(f"3/4 {shards} as codes -> {tokens}")
    model = ImageTokenizer.from_pretrained(tokenizer, world.device)
    encode_shards(model, EncodeOptions(tokenizer, str(shards), tokens, views=VIEWS), world)
    say(f"4/4 generator -> {options.loop.run_dir}")
    return replace(options, data=str(tokens), image_tokenizer=tokenizer)


def _make_shards(source: Path, shards: Path) -> None:
    try:
        parts = open_source(source, ReaderOptions()).parts
    except ValueError as error:
        raise ValueError(
            f"{source} holds neither shards nor pictures with captions that can be recognised: see what "
            f"`python -m data_tools.inspect {source}` says"
        ) from error
    has_val = any(part.split == "val" for part in parts)
    report = shard(ShardConfig(source, str(shards), val_share=0.0 if has_val else VAL_SHARE))
    for reason, count in report["reasons"].items():
        say(f"note: {count} rows of {source} were left out: {reason} (see {shards / 'dropped.jsonl'})")
    if not report["splits"].get("val") or not report["splits"].get("train"):
        raise ValueError(
            f"{source} holds {report['kept']} usable pictures with captions, too few to hold some back for validation: "
            "a hundred are the least, a thousand a beginning"
        )


def _train_tokenizer(options: Options, shards: Path, run_dir: Path) -> None:
    recipe = Path(options.vqgan_config or RECIPE)
    steps = read_mapping(recipe).get("loop", {}).get("num_steps", 0)
    done = checkpoint.step_directories(run_dir)
    if done and checkpoint.read_config(done[-1], TOKENIZER_KIND)["step"] >= steps:
        say(f"{run_dir} is complete already, nothing to do")
        return
    flags = ["--config", str(recipe), "--data", str(shards), "--loop.run-dir", str(run_dir)]
    flags += ["--device", options.device, "--precision", options.precision]
    train(parse_options(TokenizerOptions, flags))
