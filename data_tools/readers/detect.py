"""Recognise the format of a source by names and first bytes, and group its files into splits."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.images import SUFFIXES
from data_tools.readers import (
    chinese_clip,
    easynlp,
    ecommerce_t2i,
    folder,
    jsonl,
    line_drawing,
    parquet,
    table,
    webdataset,
)
from data_tools.readers.base import (
    Item,
    Meter,
    Part,
    Reader,
    ReaderOptions,
    drop_duplicates,
    iter_lines,
)
from data_tools.readers.columns import has_known_columns, is_line_drawing, looks_like_base64

READERS: dict[str, Reader] = {
    "ecommerce_t2i": ecommerce_t2i.read,
    "easynlp": easynlp.read,
    "chinese_clip": chinese_clip.read,
    "csv": table.read,
    "jsonl": jsonl.read,
    "parquet": parquet.read,
    "folder": folder.read,
    "line_drawing": line_drawing.read,
    "webdataset": webdataset.read,
}
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


@dataclass(frozen=True)
class Source:
    """A recognised source: iterate it for all items, or read one part at a time.

    The records of a test split without pictures, and of lists of urls, have an empty `image`.
    """

    path: Path
    format: str
    parts: tuple[Part, ...]
    options: ReaderOptions

    def __iter__(self) -> Iterator[Item]:
        meter = Meter()
        for part in self.parts:
            yield from self.read(part, meter)

    def read(self, part: Part, meter: Meter | None = None) -> Iterator[Item]:
        """Items of one part; a key met before in it is a problem."""
        return drop_duplicates(READERS[self.format](part, self.options, meter or Meter()))

    @property
    def num_bytes(self) -> int:
        """Size of the files that are read, 0 for folders of pictures, whose files are counted when they are listed."""
        return sum(path.stat().st_size for path in self.files if path.is_file())

    @property
    def files(self) -> list[Path]:
        """Every file or folder named by the parts."""
        found = [path for part in self.parts for path in (*part.files, part.texts) if path]
        return list(dict.fromkeys(found))


def open_source(path: Path, options: ReaderOptions | None = None) -> Source:
    """Recognise `path`. Raises FileNotFoundError, or ValueError that says what was found and what is known."""
    options, path = options or ReaderOptions(), Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    name, parts = _detect(path, options)
    if options.split:
        chosen = tuple(part for part in parts if part.split == options.split)
        if not chosen:
            known = ", ".join(part.split for part in parts)
            raise ValueError(f"{path} has no split {options.split!r}: it has {known}")
        parts = chosen
    root = options.image_root
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"--image-root {root} is no folder")
    return Source(path, name, parts, options)


def _detect(path: Path, options: ReaderOptions) -> tuple[str, tuple[Part, ...]]:
    finders = _FILE_FINDERS if path.is_file() else _FOLDER_FINDERS
    for name, find in finders.items():
        if options.format in ("auto", name) and (parts := find(path)):
            return name, tuple(
                sorted(parts, key=lambda part: [*SPLITS.values(), part.split].index(part.split))
            )
    known = (
        f"it is not {options.format}" if options.format != "auto" else f"known formats: {', '.join(READERS)}"
    )
    raise ValueError(f"cannot recognise {path} ({_what_is_there(path)}); {known}; --format names one")


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size} bytes"
    names = sorted(entry.name for entry in os.scandir(path))
    return (
        f"a folder with {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
        if names
        else "an empty folder"
    )


def split_of(name: str) -> str:
    """train, val or test as a file name says it; train if it says nothing."""
    found = _SPLIT_IN_NAME.search(name)
    return SPLITS[found.group(1).lower()] if found else "train"


def _grouped(paths: list[Path], root: Path | None = None) -> list[Part]:
    """One part a split; files in the order of their names."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        groups.setdefault(split_of(path.name), []).append(path)
    return [Part(split, tuple(files), root=root or files[0].parent) for split, files in groups.items()]


# --- joined pairs of files -------------------------------------------------------------------------------------


def _joined(folder_: Path, pictures: re.Pattern, texts: re.Pattern, only: str | None = None) -> list[Part]:
    """Parts from pairs of files that share the name before the suffix; `only` keeps the pair of that file."""
    found: dict[str, dict[str, Path]] = {}
    for entry in sorted(os.scandir(folder_), key=lambda e: e.name):
        for kind, pattern in (("pictures", pictures), ("texts", texts)):
            if match := pattern.fullmatch(entry.name):
                found.setdefault(match.group(1), {}).setdefault(kind, folder_ / entry.name)
    parts = []
    for stem, files in found.items():
        if only is None or any(path.name == only for path in files.values()):
            pair = (files["pictures"],) if "pictures" in files else ()
            last = re.split(r"[._-]", stem)[-1].lower()
            parts.append(Part(SPLITS.get(last, last), pair, files.get("texts"), folder_))
    return parts


_T2I = (re.compile(r"(.+)\.img\.tsv"), re.compile(r"(.+)\.(?:text|txt)\.tsv"))
_CLIP = (re.compile(r"(.+)_imgs\.tsv"), re.compile(r"(.+)_texts\.jsonl"))


def _find_t2i(path: Path) -> list[Part]:
    return _joined(path, *_T2I) if path.is_dir() else _joined(path.parent, *_T2I, only=path.name)


def _find_chinese_clip(path: Path) -> list[Part]:
    return _joined(path, *_CLIP) if path.is_dir() else _joined(path.parent, *_CLIP, only=path.name)


# --- lists -----------------------------------------------------------------------------------------------------


def _first_line(path: Path) -> bytes:
    line = next(iter_lines(path, 1 << 20), None)
    return line.data or b"" if line else b""


def _list_finder(suffixes: tuple[str, ...], accepts: Callable[[Path], bool]) -> Callable[[Path], list[Part]]:
    def find(path: Path) -> list[Part]:
        candidates = [path] if path.is_file() else [Path(entry.path) for entry in os.scandir(path)]
        files = [p for p in candidates if p.suffix.lower() in suffixes and p.is_file() and accepts(p)]
        if path.is_dir() and any(
            p.name.startswith("metadata.") for p in files
        ):  # of a Hugging Face imagefolder
            files = [p for p in files if p.name.startswith("metadata.")]
        return _grouped(files)

    return find


def _is_easynlp(path: Path) -> bool:
    line = next((line for line in iter_lines(path, 1 << 27) if line.number < 4), None)
    fields = (line.data or b"").split(b"\t") if line else []
    if len(fields) != 3:
        return False
    return fields[0].strip() in (b"idx", b"id") or looks_like_base64(fields[2][:400].decode(errors="replace"))


def _is_table(path: Path) -> bool:
    fields = re.split(rb"[\t,;]", _first_line(path))
    names = [field.strip(b' "').decode(errors="replace") for field in fields]
    return has_known_columns(names) or names[0].startswith(("http://", "https://"))


def _json_fields(path: Path) -> list[str] | None:
    """The names in the first line, None where it is no JSON object."""
    try:
        row = json.loads(_first_line(path))
    except (ValueError, RecursionError):
        return None
    return list(row) if isinstance(row, dict) else None


def _is_json_lines(path: Path) -> bool:
    """A `.jsonl` always; a `.json` only if its first line says where a picture is: most are something else."""
    return path.suffix.lower() == ".jsonl" or has_known_columns(_json_fields(path) or [])


def _is_drawing_list(path: Path) -> bool:
    return is_line_drawing(_json_fields(path) or [])


def _find_parquet(path: Path) -> list[Part]:
    found = [path] if path.is_file() else sorted(path.glob("*.parquet")) + sorted(path.glob("data/*.parquet"))
    return _grouped([p for p in found if p.suffix == ".parquet"], path if path.is_dir() else None)


def _find_drawing_parquet(path: Path) -> list[Part]:
    parts = _find_parquet(path)
    try:
        drawing = bool(parts) and is_line_drawing(parquet.column_names(parts[0].files[0]))
    except ValueError:  # unreadable: the parquet reader reports it
        return []
    return parts if drawing else []


def _find_line_drawing(path: Path) -> list[Part]:
    if path.is_dir() and (pair := line_drawing.find_folders(path)):
        titles = next((path / name for name in line_drawing.TITLE_FILES if (path / name).is_file()), None)
        return [Part("train", pair, titles, path)]
    found = _list_finder((".json", ".jsonl"), _is_drawing_list)(path) or _find_drawing_parquet(path)
    return found or (_drawings_by_split(path) if path.is_dir() else [])


def _drawings_by_split(path: Path) -> list[Part]:
    """A folder for each split, `train/` and `val/`, each with its list."""
    folders = [path / name for name in sorted(os.listdir(path)) if name.lower() in SPLITS]
    found = [(folder, _find_line_drawing(folder)) for folder in folders if folder.is_dir()]
    return [replace(parts[0], split=SPLITS[folder.name.lower()]) for folder, parts in found if parts]


# --- tars and folders ------------------------------------------------------------------------------------------


def _find_tars(path: Path) -> list[Part]:
    return _grouped([path] if path.is_file() else list(path.glob("*.tar"))) if _may_be_tar(path) else []


def _may_be_tar(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".tar"


def _find_folder(path: Path) -> list[Part]:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    splits = [name for name in names if name.lower() in SPLITS]
    if splits and splits == names and all(_has_picture(path / name) for name in splits):
        parts = [Part(SPLITS[name.lower()], (path / name,), root=path / name) for name in splits]
        return parts if len({part.split for part in parts}) == len(parts) else []
    return [Part("train", (path,), root=path)] if _has_picture(path) else []


def _has_picture(path: Path) -> bool:
    return any(
        os.path.splitext(name)[1][1:].lower() in SUFFIXES for _, _, names in os.walk(path) for name in names
    )


def _find_metadata(path: Path) -> list[Part]:
    """Imagefolder with `train/metadata.jsonl` and so on."""
    files = [path / name / "metadata.jsonl" for name in sorted(os.listdir(path)) if name.lower() in SPLITS]
    parts = [_grouped([file])[0] for file in files if file.is_file()]
    return [replace(part, split=SPLITS[part.root.name.lower()]) for part in parts]


def _find_jsonl(path: Path) -> list[Part]:
    found = _list_finder((".jsonl", ".json"), _is_json_lines)(path)
    return found or (_find_metadata(path) if path.is_dir() else [])


_FILE_FINDERS: dict[str, Callable[[Path], list[Part]]] = {
    "ecommerce_t2i": _find_t2i,
    "chinese_clip": _find_chinese_clip,
    "webdataset": _find_tars,
    "line_drawing": _find_line_drawing,
    "parquet": _find_parquet,
    "easynlp": _list_finder((".tsv",), _is_easynlp),
    "jsonl": _find_jsonl,
    "csv": _list_finder((".csv", ".tsv"), _is_table),
}
_FOLDER_FINDERS = {**_FILE_FINDERS, "folder": _find_folder}
