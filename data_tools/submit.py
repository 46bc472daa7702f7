"""Results in the forms that contests take, and a validator that looks at them as a judge would.

    python -m data_tools.submit out/ T2I_test.tsv                    # img_id<TAB>base64 of a PNG, Tianchi ECommerce-T2I
    python -m data_tools.submit out/ T2I_test.text.tsv --form easynlp --to result.tsv   # idx<TAB>text<TAB>base64
    python -m data_tools.submit out/ ids.txt --form zip --folder "Realistic Drawing" --to result.zip
    python -m data_tools.submit submission.tsv T2I_test.tsv          # only validate a finished file

The second file gives the ids, first column, and their order; ids are names and are never counted, so they need not be
contiguous. The image of an id is `ID.png` (or jpg, webp) in the folder, else `ID/rank00.png`, else `ID/0000.png`,
else the line of the folder's `images.jsonl` with this `key`: the best of them by `ranking.json` where rerank.py wrote
one, else the first. Written whole or not at all.
"""

import base64
import binascii
import math
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image

from common.config import command, parse_options
from common.console.progress import progress
from common.outputs.image_list import LIST, image_name, read_list, read_ranking
from common.outputs.label import kept_arguments
from common.outputs.record import require_replaceable, writing_file
from data_tools.images.decode import BadImage, decode, encode, is_plain_rgb, open_plugin, resize, sniff
from data_tools.readers.formats.texts import read_texts

IMAGE_NAMES = ("{}.png", "{}.jpg", "{}.jpeg", "{}.webp", "{}/rank00.png", "{}/0000.png")
MAX_COMPLAINTS = 20


@dataclass(frozen=True)
class SubmitConfig:
    """Write a submission, or validate one when the first argument is a file."""

    source: tyro.conf.Positional[Path]
    """Folder with the images, or a finished file to validate."""
    ids: tyro.conf.Positional[Path]
    """File whose first column is the ids, in the order to keep; a second column is the text."""
    form: Literal["t2i", "easynlp", "zip"] = "t2i"
    """t2i: img_id<TAB>base64; easynlp: idx<TAB>text<TAB>base64; zip: FOLDER/ID.jpg."""
    to: Path | None = None
    """File to write; default: in the source folder, named like the ids file, .zip for zip."""
    size: int = 0
    """Side in pixels that every image is scaled to; 0 keeps their size, which must then be one for all."""
    image_format: Literal["png", "jpg"] | None = None
    """Default: png in TSV files, jpg in a zip."""
    folder: str = ""
    """Folder inside the zip; empty: none."""

    def __post_init__(self):
        if not 0 <= self.size <= 8192:
            raise ValueError(f"--size must be 0 to 8192 pixels, not {self.size}")
        if self.folder and self.form != "zip":
            raise ValueError(f"--folder is inside a zip: it has no meaning with --form {self.form}")
        if self.folder and (self.folder.startswith("/") or ".." in self.folder.split("/")):
            raise ValueError(f"--folder {self.folder!r} must stay inside the zip")

    @property
    def suffix(self) -> Literal["png", "jpg"]:
        """Format of the images."""
        return self.image_format or ("jpg" if self.form == "zip" else "png")

    @property
    def target(self) -> Path:
        """The file to write."""
        name = f"{self.ids.stem}.zip" if self.form == "zip" else f"{self.ids.name.split('.')[0]}.tsv"
        return self.to or self.source / name


def read_ids(path: Path) -> dict[str, str]:
    """Id to text ("" where there is none), in the order of the file. Raises ValueError naming the line."""
    ids: dict[str, str] = {}
    for row in read_texts(path, ids_alone=True):
        if row.key is None:
            raise ValueError(f"{row.where}: there is no id: the first column, or one named id, holds it")
        if row.key in ids:
            raise ValueError(f"{row.where}: the id {row.key!r} comes twice")
        ids[row.key] = row.text
    if not ids:
        raise ValueError(f"{path} holds no ids: one a line, in the first column")
    return ids


def find_images(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """The image of each id. Raises ValueError naming the first that are missing."""
    listed = _listed(folder)
    found = {}
    for identifier in ids:
        if "/" in identifier or identifier in (".", ".."):
            raise ValueError(f"the id {identifier!r} cannot name a file")
        candidates = [folder / name.format(identifier) for name in IMAGE_NAMES]
        path = next((path for path in candidates if path.is_file()), listed.get(identifier))
        if path is not None:
            found[identifier] = path
    missing = [identifier for identifier in ids if identifier not in found]
    if missing:
        names = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{len(missing)} of {len(ids)} ids have no image in {folder}: {names}; make them first"
        )
    return found


def _listed(folder: Path) -> dict[str, Path]:
    """Key to its best image from `images.jsonl` of generate.py: line i is the image `file`, or number i."""
    found: dict[str, Path] = {}
    if not (folder / LIST).is_file():
        return found
    texts = read_ranking(folder).get("texts", ())
    ranks = {Path(row["file"]).name: int(row["rank"]) for text in texts for row in text["pictures"]}
    for number, (_, row) in enumerate(read_list(folder)):
        image = folder / Path(str(row.get("file", image_name(number)))).name
        if "key" in row and image.is_file():
            before = found.setdefault(str(row["key"]), image)
            if ranks.get(image.name, math.inf) < ranks.get(before.name, math.inf):
                found[str(row["key"])] = image
    return found


def finished_images(config: SubmitConfig, images: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    """(id, encoded RGB image) in order. Raises ValueError for one that is damaged or of another size."""
    first: tuple[int, int] | None = None
    for identifier, path in progress(images.items(), unit=" images"):
        data = path.read_bytes()
        try:
            image = decode(data)
        except BadImage as error:
            raise ValueError(f"{path} cannot be submitted: {error}") from error
        if config.size:
            image = resize(image, "square", config.size)
        first = first or image.size
        if image.size != first and config.form != "zip":
            raise ValueError(
                f"{path} is {image.size}, the first image {first}: pass --size to make them one size"
            )
        same = sniff(data) == config.suffix and not config.size and is_plain_rgb(data)
        yield identifier, data if same else _encode_labelled(image, data, config.suffix)


def _encode_labelled(image: Image.Image, data: bytes, suffix: Literal["png", "jpg"]) -> bytes:
    """A file of `image` with the label of the file `data` that it was made of."""
    with open_plugin(data, sniff(data)) as file:
        arguments = kept_arguments(file, image, "JPEG" if suffix == "jpg" else "PNG")
    return encode(image, suffix, quality=95, **arguments)


def write_submission(config: SubmitConfig) -> int:
    """Write the file; returns the number of images. Raises ValueError before anything is replaced."""
    ids = read_ids(config.ids)
    if config.target.resolve() == config.ids.resolve():
        raise ValueError(f"{config.target} is the file with the ids: name another one with --to")
    if config.form == "easynlp" and not all(ids.values()):
        raise ValueError(f"{config.ids} has no text in its second column, which --form easynlp needs")
    require_replaceable(config.target)
    images = finished_images(config, find_images(config.source, list(ids)))
    with writing_file(config.target) as temporary:
        if config.form == "zip":
            _write_zip(temporary, images, config)
        else:
            _write_tsv(temporary, images, ids if config.form == "easynlp" else None)
    return len(ids)


def _write_tsv(path: Path, images: Iterator[tuple[str, bytes]], texts: dict[str, str] | None) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for identifier, data in images:
            columns = [identifier, *([texts[identifier]] if texts else []), base64.b64encode(data).decode()]
            file.write("\t".join(columns) + "\n")


def _write_zip(path: Path, images: Iterator[tuple[str, bytes]], config: SubmitConfig) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for identifier, data in images:
            name = f"{config.folder}/{identifier}.{config.suffix}".lstrip("/")
            archive.writestr(
                zipfile.ZipInfo(name), data
            )  # ZipInfo: no date of today, the same bytes each time


# --- validation ------------------------------------------------------------------------------------------------


def validate(path: Path, ids: Sequence[str], form: str = "t2i") -> list[str]:
    """What is wrong with a finished file, one sentence each; empty if nothing is. Stops after 20."""
    found = (
        _validate_zip(path, ids) if form == "zip" else _validate_tsv(path, ids, 3 if form == "easynlp" else 2)
    )
    complaints = []
    for complaint in found:
        complaints.append(complaint)
        if len(complaints) == MAX_COMPLAINTS:
            break
    return complaints


def _validate_tsv(path: Path, ids: Sequence[str], columns: int) -> Iterator[str]:
    expected, seen, shape, number = iter(ids), set(), None, 0
    known = set(ids)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                yield "line 1: a byte order mark; write plain UTF-8"
                line = line[3:]
            if not line.endswith(b"\n"):
                yield f"line {number}: the last line has no line break"
            fields = line.rstrip(b"\r\n").split(b"\t")
            identifier = fields[0].decode("utf-8", errors="replace")
            wanted = next(expected, None)
            if len(fields) != columns:
                yield f"line {number}: {len(fields)} columns instead of {columns}"
                continue
            if identifier in seen:
                yield f"line {number}: the id {identifier!r} comes twice"
            elif identifier not in known:
                hint = "; a header line is not allowed" if number == 1 else ""
                yield f"line {number}: {identifier[:40]!r} is none of the given ids{hint}"
            elif identifier != wanted:
                yield f"line {number}: the id is {identifier!r}, in the given order it is {wanted!r}"
            seen.add(identifier)
            size, complaint = _check_image(fields[-1])
            shape = shape or size
            if complaint or size != shape:
                yield f"line {number}: {complaint or f'the image is {size}, the first one {shape}'}"
    if missing := [identifier for identifier in ids if identifier not in seen]:
        yield f"{len(missing)} of {len(ids)} ids are missing, first {missing[0]!r} ({number} lines)"


def _check_image(field: bytes) -> tuple[tuple[int, int] | None, str]:
    try:
        data = binascii.a2b_base64(field, strict_mode=True)
    except binascii.Error as error:
        return None, f"no standard base64: {error}"
    if sniff(data) not in ("png", "jpg"):
        return None, "neither PNG nor JPEG"
    try:
        size = decode(data).size
    except BadImage as error:
        return None, f"the image is bad: {error}"
    return size, "" if is_plain_rgb(data) else "the image is not RGB"


def _validate_zip(path: Path, ids: Sequence[str]) -> Iterator[str]:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        yield f"{path} is no zip file"
        return
    with archive:
        stems = {Path(info.filename).stem: info for info in archive.infolist() if not info.is_dir()}
        for identifier in ids:
            info = stems.pop(identifier, None)
            if info is None:
                yield f"{identifier!r} is missing"
                continue
            try:
                decode(archive.read(info))
            except (BadImage, zipfile.BadZipFile) as error:
                yield f"{info.filename}: the image is bad: {error}"
        for stem in sorted(stems):
            yield f"{stem!r} is none of the given ids"


@command
def main(argv: Sequence[str] | None = None) -> Path:
    """The command of this module."""
    config = parse_options(SubmitConfig, argv, description=__doc__.splitlines()[0])
    for path in (config.source, config.ids):
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
    ids = list(read_ids(config.ids))
    target = config.source if config.source.is_file() else config.target
    if not config.source.is_file():
        write_submission(config)
    complaints = validate(target, ids, config.form)
    for complaint in complaints:
        print(f"  {target.name}: {complaint}", file=sys.stderr)
    if complaints:
        raise ValueError(
            f"{target} is not valid: {len(complaints)} or more things are wrong, the first is above"
        )
    print(f"{target}: {len(ids)} images, valid", file=sys.stderr)
    return target


if __name__ == "__main__":
    main()
