"""A folder of images in the place of token shards: shards, image tokenizer and codes are made on the way.

Each part is what its own command makes and is found again when the same command starts again: `data/NAME_shards` of
data_tools.shard, `runs/NAME_vqgan` of train_vqgan.py, `data/NAME_tokens` of vq.encode_shards, NAME being the folder's.
`data/NAME_source.json` says which folder that is and what lay in it: another folder of the same name gets names of its
own, and where images were added, changed or removed the shards and codes are made anew and the trainings go on.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import checkpoint
from common.config import parse_options, read_mapping, to_mapping
from common.console.programs import run_program
from common.distributed import World
from common.files import read_json, write_json
from common.log import say
from dalle.text_tokenizer import TextTokenizer
from dalle.training.options import Options
from data_tools.ingest.records import HINTS
from data_tools.ingest.shard_run import REPORT_FILE, reason_lines
from data_tools.readers.detect import Source, open_source
from data_tools.readers.inventory import take_inventory
from data_tools.shard import ShardConfig, shard
from data_tools.shards.image_shards import DATASET_FILE
from vq.encode_shards import Options as EncodeOptions
from vq.encode_shards import encode_shards
from vq.encoding import TOKENIZER_FILE
from vq.model import KIND as TOKENIZER_KIND
from vq.model import ImageTokenizer
from vq.options import Options as TokenizerOptions

SCRIPT = Path(__file__).parents[2] / "train_vqgan.py"
RECIPE = Path(__file__).parents[2] / "configs/own_128/vqgan.yaml"
VAL_SHARE = 0.05
VIEWS = 6
MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class Names:
    """What is made of one folder of images."""

    name: str

    @property
    def source(self) -> Path:
        return Path(f"data/{self.name}_source.json")

    @property
    def shards(self) -> Path:
        return Path(f"data/{self.name}_shards")

    @property
    def tokens(self) -> Path:
        return Path(f"data/{self.name}_tokens")

    @property
    def run_dir(self) -> Path:
        return Path(f"runs/{self.name}_vqgan")


def prepare_images(options: Options, world: World) -> Options:
    """`options` with token shards for `data`, and the tokenizer that made them.

    Raises ValueError for images that cannot be recognised, for too few, and under several processes, which would
    all do the same.
    """
    if world.size > 1:
        raise ValueError(
            f"{options.data} holds images: make token shards first, with one process, by the same command without a "
            "launcher, or by data_tools.shard, train_vqgan.py and vq.encode_shards"
        )
    _require_named(options)
    path = Path(options.data)
    names = names_of(path)
    made = (names.shards, names.tokens, names.run_dir, names.source)
    source = open_source(path, options.reader, exclude=[*made, options.loop.run_dir])
    say(f"1/4 {path} -> {names.shards}")
    _make_shards(options, source, names)
    if options.image_tokenizer:
        tokenizer = options.image_tokenizer
        say(f"2/4 image tokenizer: {tokenizer}")
    else:
        tokenizer = str(names.run_dir)
        say(f"2/4 image tokenizer -> {names.run_dir}")
        _train_tokenizer(options, names.shards, names.run_dir)
    say(f"3/4 {names.shards} as codes -> {names.tokens}")
    model = ImageTokenizer.from_pretrained(tokenizer, world.device)
    _drop_old_codes(names, model.codes_sha256)
    write_json(names.tokens / MADE_FROM, _made_from(names, model.codes_sha256))
    encode_shards(model, EncodeOptions(tokenizer, str(names.shards), names.tokens, views=VIEWS), world)
    say(f"4/4 generator -> {options.loop.run_dir}")
    return replace(options, data=str(names.tokens), image_tokenizer=tokenizer)


def _require_named(options: Options) -> None:
    """What the user named is looked at before hours of work. Raises FileNotFoundError or ValueError."""
    if options.vqgan_config:
        parse_options(TokenizerOptions, ["--config", options.vqgan_config])
    if options.image_tokenizer:
        checkpoint.read_config(checkpoint.resolve(options.image_tokenizer), TOKENIZER_KIND)
    if options.text_tokenizer:
        TextTokenizer.from_pretrained(options.text_tokenizer)


def names_of(path: Path) -> Names:
    """By the name of the folder, and by its whole path where another folder of that name has them."""
    real = path.resolve()
    plain = Names(real.name.removesuffix(path.suffix if path.is_file() else ""))
    known = read_json(plain.source) if plain.source.is_file() else {}
    if known.get("source", str(real)) == str(real):
        return plain
    own = Names(f"{plain.name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}")
    say(f"note: data/{plain.name}_* is made of {known['source']}: this folder's own is {own.name}")
    return own


def contents_of(source: Source) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of every file that the source may be read from, by its name."""
    if source.inventory is None:
        beside = source.options.image_root or source.path.parent
        listed = {str(f): f for f in source.files}
        listed |= {str(f): f for f in map(Path, _images_listed(source)) if f.is_file()}
        return {os.path.relpath(f, beside): _stamp(f) for f in listed.values()}
    root = source.inventory.root
    return {e.name: _stamp(root / e.name) for e in source.inventory.entries if e.kind != "hidden"}


def _images_listed(source: Source) -> list[str]:
    """Paths that the rows of one list may name: of files below its folder that a row holds whole."""
    if source.format not in ("csv", "jsonl") or source.num_bytes > 64 * 2**20:
        return []
    root = source.options.image_root or source.path.parent
    text = source.path.read_bytes()
    return [
        str(root / n) for n in take_inventory(root).of("image") if os.fsencode(os.path.basename(n)) in text
    ]


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [-1, 0]
    return [status.st_size, status.st_mtime_ns]


def changes(before: dict[str, list[int]], now: dict[str, list[int]]) -> str:
    """`2 files added, 1 changed`; "" for none."""
    counts = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(now[name] != before[name] for name in now.keys() & before.keys()),
    }
    told = [f"{count} {what}" for what, count in counts.items() if count]
    return f"{' and '.join(told)} files" if told else ""


def _make_shards(options: Options, source: Source, names: Names) -> None:
    """Shards of the source as it is now; those of an earlier state of it are made anew."""
    has_val = any(part.split == "val" for part in source.parts)
    before = read_json(names.source) if names.source.is_file() else None
    config = ShardConfig(
        source.path,
        str(names.shards),
        val_share=0.0 if has_val else VAL_SHARE,
        overwrite=before is not None,  # then the folder is this command's own
        image=options.image,
        reader=options.reader,
    )
    record: dict[str, Any] = {"source": str(source.path.resolve()), "files": contents_of(source)}
    record["options"] = {"reader": to_mapping(options.reader), "picture": to_mapping(options.image)}
    if before and before != record:
        told = changes(before.get("files", {}), record["files"]) or "the options of reading have changed"
        say(f"note: {source.path} is not what it was ({told}): its shards and codes are made anew")
        report = names.shards / REPORT_FILE
        if report.is_file():
            write_json(report, {**read_json(report), "job": None})  # so that they do not count as complete
    write_json(names.source, record)
    report = shard(config, source)
    for line in reason_lines(report, HINTS):
        say(f"note: left out{line}")
    if report["dropped"]:
        say(
            f"note: {report['dropped']} rows of {source.path} were left out, see {names.shards / 'dropped.jsonl'}"
        )
    if not report["splits"].get("val") or not report["splits"].get("train"):
        raise ValueError(
            f"{source.path} holds {report['kept']} usable images with captions, too few to hold some back for "
            "validation: a hundred are the least, a thousand a beginning"
        )


def _made_from(names: Names, codes: str) -> dict[str, Any]:
    """What the codes depend on."""
    return {"source": read_json(names.source), "codes_sha256": codes}


def _drop_old_codes(names: Names, codes: str) -> None:
    """Codes of an earlier state of the images are of no use; those that were made before this was noted are kept."""
    noted = names.tokens / MADE_FROM
    if noted.is_file() and read_json(noted) != _made_from(names, codes):
        say(f"note: the codes in {names.tokens} are of other images or of another tokenizer: made anew")
        for path in (*names.tokens.glob("*.tar"), names.tokens / DATASET_FILE, names.tokens / TOKENIZER_FILE):
            path.unlink(missing_ok=True)


def _train_tokenizer(options: Options, shards: Path, run_dir: Path) -> None:
    recipe = Path(options.vqgan_config or RECIPE)
    steps = read_mapping(recipe).get("loop", {}).get("num_steps", 0)
    done = checkpoint.step_directories(run_dir)
    if done and checkpoint.read_config(done[-1], TOKENIZER_KIND)["step"] >= steps:
        say(f"{run_dir} is complete already, nothing to do")
        return
    flags = ["--config", str(recipe), "--data", str(shards), "--loop.run-dir", str(run_dir)]
    flags += ["--device", options.device, "--precision", options.precision]
    code = run_program([str(SCRIPT), *flags])
    if code:
        raise SystemExit(code)  # it has said why
