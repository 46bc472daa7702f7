"""What generate.py leaves in its out directory, as rankers read it: one line of `images.jsonl` an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from common.outputs.image_list import LIST, read_list


@dataclass(frozen=True)
class Row:
    """One image."""

    file: str
    text: str
    log_likelihood: float | None
    null_log_likelihood: float | None
    values: dict[str, Any]
    """The whole line."""


def read_out_directory(directory: Path) -> list[Row]:
    """Raises FileNotFoundError or ValueError naming the line that is wrong."""
    path = directory / LIST
    if not path.is_file():
        raise FileNotFoundError(f"no {LIST} in {directory}: python generate.py makes it with the images")
    rows = [_row(line, directory, where) for where, line in read_list(directory)]
    if not rows:
        raise ValueError(f"{path} lists no images: python generate.py makes some")
    return rows


def _row(values: dict[str, Any], directory: Path, where: str) -> Row:
    for name in ("file", "text"):
        if not isinstance(values.get(name), str) or not values[name]:
            raise ValueError(f"{where} has no {name}")
    if Path(values["file"]).name != values["file"]:
        raise ValueError(f"{where}: {values['file']!r} is no plain file name")
    if not (directory / values["file"]).is_file():
        raise FileNotFoundError(f"{where} names {values['file']}, which is not in {directory}")
    likelihoods = (values.get(name) for name in ("log_likelihood", "null_log_likelihood"))
    return Row(values["file"], values["text"], *likelihoods, values)


def made_by(rows: Sequence[Row]) -> str:
    """sha256 of the one generator that made all of them; empty where it is unknown or there are several."""
    found = {row.values.get("checkpoint") for row in rows}
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, str) else ""


def read_image(path: Path) -> Image.Image:
    """Raises ValueError naming the file when it cannot be decoded."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no readable image: {error}") from error
