"""Which of several readings of a folder is meant: the only one that gives data, else the user says it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json
from data_tools.readers.base import Part, iter_lines
from data_tools.readers.finders import SPLITS, Folder
from data_tools.readers.formats import folder as folder_reader
from data_tools.readers.inventory import OWN_RESULT


@dataclass(frozen=True)
class Reading:
    """A format, and the parts that were found for it."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Size:
    """What a reading holds: rows or images, and how many of them have a caption."""

    rows: int
    captioned: int
    text: str

    def usable(self, captions: str) -> int:
        return self.captioned if captions == "required" else self.rows


def choose(path: Path, readings: Sequence[Reading], folder: Folder) -> tuple[Reading, tuple[str, ...]]:
    """The reading, and notes about it. Raises ValueError with the counts where two readings are plausible."""
    if len(readings) == 1:
        return readings[0], _notes(readings[0], folder)
    tars = next((reading for reading in readings if reading.name == "webdataset"), None)
    if tars and _is_own(tars):
        return tars, ()
    captions = folder.options.captions
    sizes = {reading.name: measure(reading) for reading in readings}
    plausible = [reading for reading in readings if sizes[reading.name].usable(captions)]
    images = sizes.get("folder")
    if (
        images and not images.captioned
    ):  # images alone are no reading of their own where a list names them all
        others = [r for r in plausible if r.name != "folder"]
        if len(others) == 1 and sizes[others[0].name].rows >= images.rows:
            plausible = others
    if len(plausible) == 1:
        return plausible[0], _notes(plausible[0], folder)
    if not plausible:
        return readings[0], ()
    counts = "; ".join(f"--format {r.name}: {sizes[r.name].text}" for r in plausible)
    raise ValueError(f"{path} can be read in {len(plausible)} ways, choose one: {counts}")


def _is_own(tars: Reading) -> bool:
    """Whether all the tars are shards that data_tools has written and listed."""
    listing = tars.parts[0].root / OWN_RESULT
    try:
        listed: Any = read_json(listing)["shards"] if listing.is_file() else {}
    except (ValueError, KeyError, TypeError):
        return False
    return all(file.name in listed for part in tars.parts for file in part.files)


def _notes(reading: Reading, folder: Folder) -> tuple[str, ...]:
    """Folders that look like splits and are not read as such."""
    splits = [name for name in folder.inventory.folders if name.lower() in SPLITS]
    if reading.name != "folder" or not splits or reading.parts[0].root != folder.root:
        return ()
    return (
        f"{', '.join(splits)} are read as one split, since other folders or splits of one name lie beside",
    )


def measure(reading: Reading) -> Size:
    """Count the rows of a reading; of lists without looking into them."""
    if reading.name == "folder":
        return _images(reading)
    if reading.name == "webdataset":
        rows = sum(_count_samples(file) for part in reading.parts for file in part.files)
        return Size(rows, rows, f"{rows} samples in {_names(reading)}")
    if reading.name == "line_drawing" and reading.parts[0].files[0].is_dir():
        rows = sum(1 for _ in reading.parts[0].files[0].iterdir())
        return Size(rows, rows, f"{rows} pairs of a drawing and a photo")
    rows = sum(
        _count_rows(file, reading.name) for part in reading.parts for file in (part.files or (part.texts,))
    )
    return Size(rows, rows, f"{rows} rows in {_names(reading)}")


def _images(reading: Reading) -> Size:
    rows = captioned = 0
    for part in reading.parts:
        images = folder_reader.pair(part.inventory)
        rows += len(images)
        captioned += sum(1 for image in images if image.caption or image.meta)
    return Size(rows, captioned, f"{rows} images, {captioned} with a caption file")


def _names(reading: Reading) -> str:
    names = [file.name for part in reading.parts for file in (part.files or (part.texts,)) if file]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count_samples(path: Path) -> int:
    from data_tools.shards.index import scan_tar

    try:
        return len(scan_tar(path, 0)[0])
    except (OSError, ValueError):
        return 0


def _count_rows(path: Path, name: str) -> int:
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError):
            return 0
    count = sum(1 for _ in iter_lines(path, 1 << 16))
    return max(0, count - (name == "csv"))
