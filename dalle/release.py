"""A checkpoint to give away: weights in 16 or 8 bits, no training state, a card that says what it is.

    python -m dalle.release runs/dalle release/goods-128 --card.title "Goods at 128 pixels" \\
        --card.data "Clothing (CC0) and Grocery Store (MIT)" --card.licence mit --card.grid out/grid.png
    python -m dalle.release runs/dalle release/sharper --image-tokenizer runs/vqgan_decoder   # a decoder tuned since
    python -m dalle.release runs/vqgan release/tokenizer                   # any kind of checkpoint

The directory is self-contained: generate.py, `TextToImage.from_pretrained` and `push_to_hub` take it as it is. Rounding
changes the identity of the image tokenizer's codes, so token shards of the original are not taken for the released one.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from common.checkpoint import read_weights, require_intact, resolve, save_weights
from common.compact import Precision, compact
from common.config import command, parse_options
from common.console.terminal import first_line
from common.files import read_json, read_lines, sha256_file, write_json
from common.log import say
from common.outputs.record import new_directory, require_new
from vq.model import ImageTokenizer

LEFT_OUT = ("training_state", "train_config.json")  # the latter may name somebody's folders
CARD, GRID, TOKENIZER = "README.md", "samples.png", "image_tokenizer"


@dataclass(frozen=True)
class Card:
    """What a reader of the release should know."""

    title: str = "Product images from Chinese text"
    """First line of the card."""
    data: str = ""
    """What it was trained on, and under which licences that was."""
    licence: str = "other"
    """Licence of the weights, as an SPDX or hub name in lower case."""
    recipe: str = ""
    """How it was trained, for somebody who wants to do it again."""
    grid: Path | None = None
    """Sample grid to show; None: the last one of the run."""
    texts: str = ""
    """What the grid shows."""


@dataclass(frozen=True)
class Options:
    """Strip a checkpoint for release."""

    source: Annotated[str, tyro.conf.Positional]
    """Checkpoint directory or run directory."""
    target: Annotated[Path, tyro.conf.Positional]
    """Directory to write; must not exist."""
    precision: Precision = "float16"
    """Numbers that weights are kept in."""
    image_tokenizer: str = ""
    """Tokenizer to decode through, of the same codes: one whose decoder was tuned since; empty: the generator's own."""
    card: Card = field(default_factory=Card)
    """What the card says."""


def release(
    source: str | Path,
    target: Path,
    card: Card,
    precision: Precision = "float16",
    image_tokenizer: str = "",
) -> Path:
    """Write the released directory. Raises FileNotFoundError or ValueError saying what is wrong."""
    directory = resolve(source)
    decoder = decoder_of(image_tokenizer, directory) if image_tokenizer else None
    require_new(target)
    if card.grid:
        require_image(card.grid)
    for found in (
        *directory.rglob("model.safetensors"),
        *(decoder.rglob("model.safetensors") if decoder else ()),
    ):
        require_intact(found.parent)
    card = card if card.grid else with_samples(card, directory)
    with new_directory(target) as temporary:
        shutil.copytree(
            directory, temporary, ignore=shutil.ignore_patterns(*LEFT_OUT, CARD), dirs_exist_ok=True
        )
        if decoder:
            shutil.rmtree(temporary / TOKENIZER)
            shutil.copytree(decoder, temporary / TOKENIZER, ignore=shutil.ignore_patterns(*LEFT_OUT, CARD))
        for weights in sorted(temporary.rglob("model.safetensors"), key=lambda p: -len(p.parts)):
            round_weights(weights, precision)
        if card.grid:
            shutil.copyfile(card.grid, temporary / GRID)
        (temporary / CARD).write_text(write_card(temporary, card, metrics_of(directory)), encoding="utf-8")
    return target


def require_image(grid: Path) -> None:
    """Raises FileNotFoundError or ValueError where there is none."""
    if not grid.is_file():
        raise FileNotFoundError(f"no sample grid {grid}")
    try:
        with Image.open(grid) as image:
            image.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the sample grid {grid} is no image") from error


def decoder_of(image_tokenizer: str, directory: Path) -> Path:
    """The tokenizer's directory. Raises ValueError when its codes are not those that the generator samples."""
    found = resolve(image_tokenizer)
    if not (directory / TOKENIZER).is_dir():
        raise ValueError(f"{directory} is no generator with an image tokenizer: leave --image-tokenizer out")
    own, other = (ImageTokenizer.from_pretrained(path) for path in (directory / TOKENIZER, found))
    if own.codes_sha256 != other.codes_sha256:
        raise ValueError(f"{found} has other codes than the tokenizer that {directory} was trained with")
    return found


def round_weights(path: Path, precision: Precision) -> None:
    """Rewrite in fewer bits, and put the new hash into the config.json beside. Raises ValueError on overflow."""
    weights = read_weights(path.parent)
    try:
        short = compact(weights, precision)
    except ValueError as error:
        part = f"the {TOKENIZER}" if path.parent.name == TOKENIZER else "the checkpoint"
        raise ValueError(f"{part} cannot be released: {error}") from error
    path.unlink()  # a new file, not the old one's permissions
    save_weights(path, short)
    config_path = path.parent / "config.json"
    if config_path.is_file():
        config = read_json(config_path)
        config["sha256"] = sha256_file(path)
        tokenizer = path.parent / TOKENIZER / "config.json"
        if "image_tokenizer_sha256" in config and tokenizer.is_file():
            config["image_tokenizer_sha256"] = read_json(tokenizer)["sha256"]
        write_json(config_path, config)


def metrics_of(directory: Path) -> dict[str, float]:
    """The run's last validation at or before the checkpoint's step; empty when the run is not beside it."""
    metrics, step = directory.parent / "metrics.jsonl", read_json(directory / "config.json").get("step", 0)
    if not metrics.is_file():
        return {}
    rows = [json.loads(line) for line in read_lines(metrics) if line.endswith("}")]
    rows = [row for row in rows if row.get("kind") == "val" and row.get("step", math.inf) <= step]
    numbers = rows[-1] if rows else {}
    return {n: v for n, v in numbers.items() if isinstance(v, (int, float)) and n != "step"}


def with_samples(card: Card, directory: Path) -> Card:
    """The run's last sample grid at or before the checkpoint's step; as it is when the run is not beside it."""
    step = read_json(directory / "config.json").get("step", 0)
    grids = sorted((directory.parent / "samples").glob("samples_[0-9]*.png"))
    grids = [path for path in grids if int(path.stem.removeprefix("samples_")) <= step]
    if not grids:
        return card
    options = directory / "train_config.json"
    texts = read_json(options).get("sample_texts", []) if options.is_file() else []
    rows = f"A row a text: {', '.join(texts)}" if texts else ""
    return replace(card, grid=grids[-1], texts=card.texts or rows)


def write_card(directory: Path, card: Card, metrics: dict[str, float]) -> str:
    """The README.md of a released directory, with the hub's front matter."""
    from huggingface_hub import ModelCardData

    config = read_json(directory / "config.json")
    is_generator = config["kind"] in ("generator", "dalle_pytorch")
    data = ModelCardData(
        language="zh",
        license=card.licence,
        pipeline_tag="text-to-image" if is_generator else None,
        tags=["text-to-image", "autoregressive", "chinese", "product-images"],
    )
    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) / 2**20
    parts = [f"---\n{data.to_yaml()}\n---\n", f"# {card.title}\n"]
    if card.grid:
        parts.append(f"![samples]({GRID})\n\n{card.texts}\n")
    if is_generator:
        parts.append(
            "```bash\npython generate.py \"一件红色的连衣裙\" 8 out/ --checkpoint THIS_DIRECTORY_OR_HUB_ID\n```\n"
        )  # fmt: skip
    parts.append(f"Kind `{config['kind']}`, step {config.get('step', 0)}, {size:.1f} MiB.\n")
    sections = (
        ("Data", card.data or "Not stated."),
        ("Licence", card.licence),
        ("Recipe", card.recipe or "Not stated."),
        ("Metrics on the validation set", _table(metrics) if metrics else "Not stated."),
        (
            "Sizes",
            _table({n: v for n, v in config.get("model", {}).items() if isinstance(v, (int, float, str))}),
        ),
    )
    parts += [f"## {title}\n\n{text}\n" for title, text in sections]
    return "\n".join(parts)


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {n} | {f'{v:.4g}' if isinstance(v, float) else v} |" for n, v in sorted(values.items())]
    return "\n".join(["| | |", "|---|---|", *rows])


def is_release(directory: Path) -> bool:
    """Whether `release` wrote it."""
    return (directory / CARD).is_file() and not any((directory / name).exists() for name in LEFT_OUT)


def push_to_hub(directory: Path, repo_id: str, private: bool = True) -> str:
    """Upload a released directory; returns the address of the commit. Raises ValueError saying what went wrong."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    if not is_release(directory):
        raise ValueError(
            f"{directory} is no release: make one with python -m dalle.release {directory} DIRECTORY"
        )
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(repo_id=repo_id, folder_path=directory).commit_url
    except LocalTokenNotFoundError as error:
        raise ValueError("no hub token: log in with `hf auth login` first") from error
    except (HFValidationError, httpx2.HTTPError) as error:
        raise ValueError(f"cannot push to {repo_id}: {first_line(error)}") from error


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """Release; prints the size."""
    options = parse_options(Options, argv, description=__doc__)
    target = release(options.source, options.target, options.card, options.precision, options.image_tokenizer)
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    say(f"{target}: {size / 2**20:.1f} MiB, weights in {options.precision}, card in {target / CARD}")
    return target


if __name__ == "__main__":
    main()
