"""Which files of a folder belong to which format: by names, first bytes and the header of each list."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_tools.readers.base import Part, ReaderOptions, iter_lines
from data_tools.readers.column_names import has_known_columns, is_download_log, is_line_drawing
from data_tools.readers.columns import looks_like_base64
from data_tools.readers.formats import line_drawing, parquet
from data_tools.readers.inventory import Inventory
from data_tools.readers.lists import json_fields, table_fields

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
}
SPLITS |= {"test": "test", "testing": "test"}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[._-])({'|'.join(SPLITS)})(?=[._-]|$)", re.IGNORECASE)
KNOWN_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".tar")
LIST_OF_IMAGEFOLDER = "metadata."


@dataclass
class Folder:
    """What the finders look at: the inventory less what an earlier finder has taken. A file is a folder of one file."""

    inventory: Inventory
    options: ReaderOptions
    only: str = ""
    """The one file that was named, where it was a file."""
    taken: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        return self.inventory.root

    def names(self, *suffixes: str) -> list[str]:
        """Files at the top that are still free, with one of the suffixes in any case."""
        names = [self.only] if self.only else self.inventory.at_top
        if (
            self.only
            and f".{self.options.format}" in suffixes
            and not self.only.lower().endswith(KNOWN_LISTS)
        ):
            return names  # the user says what a file without such a suffix is
        return [n for n in names if n not in self.taken and n.lower().endswith(suffixes)]


Finder = Callable[[Folder], list[Part]]


def split_of(name: str) -> str:
    """train, val or test as a file name says it; train if it says nothing."""
    found = _SPLIT_IN_NAME.search(name)
    return SPLITS[found.group(1).lower()] if found else "train"


def grouped(paths: Sequence[Path], root: Path | None = None) -> list[Part]:
    """One part a split; files in the order of their names."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(split_of(path.name), []).append(path)
    return [Part(split, tuple(files), root=root or files[0].parent) for split, files in groups.items()]


# --- joined pairs of files -------------------------------------------------------------------------------------


def _joined(images: re.Pattern, texts: re.Pattern) -> Finder:
    """Parts from pairs of files that share the name before the suffix; a file that is named brings its partner."""

    def find(folder: Folder) -> list[Part]:
        found: dict[str, dict[str, Path]] = {}
        for name in folder.inventory.at_top:
            for kind, pattern in (("pictures", images), ("texts", texts)):
                if match := pattern.fullmatch(name):
                    found.setdefault(match.group(1), {}).setdefault(kind, folder.root / name)
        parts = []
        for stem, files in found.items():
            if not folder.only or any(path.name == folder.only for path in files.values()):
                pair = (files["pictures"],) if "pictures" in files else ()
                last = re.split(r"[._-]", stem)[-1].lower()
                parts.append(Part(SPLITS.get(last, last), pair, files.get("texts"), folder.root))
        return parts

    return find


# --- lists -----------------------------------------------------------------------------------------------------


def _lists(suffixes: tuple[str, ...], accepts: Callable[[Path, ReaderOptions], bool]) -> Finder:
    def find(folder: Folder) -> list[Part]:
        files = [folder.root / n for n in folder.names(*suffixes) if accepts(folder.root / n, folder.options)]
        if not folder.only and any(p.name.startswith(LIST_OF_IMAGEFOLDER) for p in files):
            files = [
                p for p in files if p.name.startswith(LIST_OF_IMAGEFOLDER)
            ]  # of a Hugging Face imagefolder
        return grouped(files)

    return find


def _is_easynlp(path: Path, options: ReaderOptions) -> bool:
    line = next((line for line in iter_lines(path, 1 << 27) if line.number < 4), None)
    fields = (line.data or b"").split(b"\t") if line else []
    if len(fields) != 3:
        return False
    return fields[0].strip() in (b"idx", b"id") or looks_like_base64(fields[2][:400].decode(errors="replace"))


def _is_table(path: Path, options: ReaderOptions) -> bool:
    return options.format == "csv" or isinstance(table_fields(path, options), list)


def _is_json_lines(path: Path, options: ReaderOptions) -> bool:
    """Its first line says where an image is: most files of JSON are something else."""
    if options.format == "jsonl" and path.suffix.lower() != ".json":
        return True
    return has_known_columns(json_fields(path, options) or [], options.image_column)


def _is_drawing_list(path: Path, options: ReaderOptions) -> bool:
    return is_line_drawing(json_fields(path, options) or [])


def _find_jsonl(folder: Folder) -> list[Part]:
    found = _lists((".jsonl", ".ndjson", ".json"), _is_json_lines)(folder)
    return found or ([] if folder.only else _lists_of_splits(folder))


def _lists_of_splits(folder: Folder) -> list[Part]:
    """Imagefolder with `train/metadata.jsonl` and so on."""
    names = [name for name in folder.inventory.folders if name.lower() in SPLITS]
    files = [folder.root / name / "metadata.jsonl" for name in names]
    return [replace(grouped([f])[0], split=SPLITS[f.parent.name.lower()]) for f in files if f.is_file()]


def _find_parquet(folder: Folder) -> list[Part]:
    """Tables at the top or in `data/`, but not the log of img2dataset beside the images that it has fetched."""
    names = folder.names(".parquet")
    if not folder.only:
        data = folder.inventory.of("list")
        names += [n for n in data if re.fullmatch(r"data/[^/]+\.parquet", n, re.IGNORECASE)]
        has_images = bool(folder.inventory.of("image", "tar"))
        names = [n for n in names if not (has_images and _is_log(folder.root / n))]
    return grouped([folder.root / n for n in names if n not in folder.taken], folder.root)


def _is_log(path: Path) -> bool:
    try:
        return is_download_log(parquet.column_names(path))
    except ValueError:  # unreadable: the parquet reader reports it
        return False


def _find_drawing_parquet(folder: Folder) -> list[Part]:
    parts = _find_parquet(folder)
    try:
        drawing = bool(parts) and is_line_drawing(parquet.column_names(parts[0].files[0]))
    except ValueError:  # unreadable: the parquet reader reports it
        return []
    return parts if drawing else []


def _find_line_drawing(folder: Folder) -> list[Part]:
    root = folder.root
    if not folder.only and (pair := line_drawing.find_folders(root)):
        titles = next((root / name for name in line_drawing.TITLE_FILES if (root / name).is_file()), None)
        return [Part("train", pair, titles, root)]
    found = _lists((".json", ".jsonl"), _is_drawing_list)(folder) or _find_drawing_parquet(folder)
    return found or ([] if folder.only else _drawings_of_splits(folder))


def _drawings_of_splits(folder: Folder) -> list[Part]:
    """A folder for each split, `train/` and `val/`, each with its list."""
    names = [name for name in folder.inventory.folders if name.lower() in SPLITS]
    found = [(n, _find_line_drawing(Folder(folder.inventory.below(n), folder.options))) for n in names]
    return [replace(parts[0], split=SPLITS[name.lower()]) for name, parts in found if parts]


# --- tars and folders ------------------------------------------------------------------------------------------


def _find_tars(folder: Folder) -> list[Part]:
    return grouped([folder.root / name for name in folder.names(".tar")])


def _find_folder(folder: Folder) -> list[Part]:
    if folder.only:
        return []
    images = [n for n in folder.inventory.of("image") if n.partition("/")[0] + "/" not in folder.taken]
    heads = {name.partition("/")[0] for name in images if "/" in name}
    names = sorted(folder.inventory.folders)
    splits = [name for name in names if name.lower() in SPLITS]
    if splits and splits == names and set(splits) <= heads:
        parts = [_images_below(folder.root / n, SPLITS[n.lower()], folder.inventory.below(n)) for n in splits]
        if len({part.split for part in parts}) == len(parts):
            return parts
    return [_images_below(folder.root, "train", folder.inventory)] if images else []


def _images_below(root: Path, split: str, inventory: Inventory) -> Part:
    return Part(split, (root,), root=root, inventory=inventory)


FINDERS: dict[str, Finder] = {
    "ecommerce_t2i": _joined(re.compile(r"(.+)\.img\.tsv"), re.compile(r"(.+)\.(?:text|txt)\.tsv")),
    "chinese_clip": _joined(re.compile(r"(.+)_imgs\.tsv"), re.compile(r"(.+)_texts\.jsonl")),
    "webdataset": _find_tars,
    "line_drawing": _find_line_drawing,
    "parquet": _find_parquet,
    "easynlp": _lists((".tsv",), _is_easynlp),
    "jsonl": _find_jsonl,
    "csv": _lists((".csv", ".tsv"), _is_table),
    "folder": _find_folder,
}
