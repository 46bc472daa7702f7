"""WebDataset tars: `{key}.{jpg|png|webp|...}`, `{key}.txt`, `{key}.json`, further members kept as they are.

Only plain members are read, into memory and never onto the disk, so names such as `../../x` can do no harm.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import split_lines
from data_tools.images.decode import SUFFIXES
from data_tools.ingest.records import Problem, problem
from data_tools.readers.base import Item, Meter, Part, ReaderOptions, decode_text, make_record
from data_tools.readers.column_names import CAPTIONS, find_column
from data_tools.readers.columns import caption_list, plain

MAX_MEMBERS = 64  # of one sample


def read(part: Part, options: ReaderOptions, meter: Meter) -> Iterator[Item]:
    """One item a sample; a member that is unsafe or too large, and a tar that ends early, is an item too."""
    for path in part.fetch(part.files) if part.fetch else part.files:
        start = meter.done
        for item, offset in _read_tar(path, options):
            meter.done = start + offset
            yield item
        meter.done = start + path.stat().st_size


def _read_tar(path: Path, options: ReaderOptions) -> Iterator[tuple[Item, int]]:
    key, members, whole = "", {}, set()
    for member in _members(path, options):
        if isinstance(member, Problem):
            if members and _is_cut(members, whole) and member.reason in ("truncated_file", "unreadable_file"):
                yield problem(f"{path.name}/{key}", key, "truncated_file", "the sample is cut off"), 0
                members = {}
            yield member, 0
            continue
        name, data, offset = member
        stem, suffix = split_name(name)
        if members and stem != key:
            whole = set(members)
            yield _sample(path, key, members, options), offset
            members = {}
        key = stem
        if suffix in members or len(members) >= MAX_MEMBERS:
            yield problem(f"{path.name}/{name}", key, "duplicate_key", "the sample has this member"), offset
        else:
            members[suffix] = data
    if members:
        yield _sample(path, key, members, options), path.stat().st_size


def _is_cut(members: dict[str, bytes], whole: set[str]) -> bool:
    """Where a tar breaks off, its last sample is whole if it has its .json or what the sample before it had."""
    return "json" not in members and set(members) != whole


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix): the file name is cut at its first dot; folders belong to the key."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _members(path: Path, options: ReaderOptions) -> Iterator[tuple[str, bytes, int] | Problem]:
    """(name, bytes, offset) of the plain members, a Problem for each other one but folders."""
    limit = max(options.max_image_bytes, 1 << 20)
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for info in tar:
                tar.members.clear()  # tarfile keeps every header; a million of them fill the memory
                if not info.isdir():
                    yield _member(tar, info, path, limit)
            yield from _check_end(tar, path)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, MemoryError, KeyError) as error:
        reason = "truncated_file" if "end of" in str(error) or "truncat" in str(error) else "unreadable_file"
        yield problem(path.name, "", reason, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _check_end(tar: tarfile.TarFile, path: Path) -> Iterator[Problem]:
    """tarfile takes a damaged header for the end of the archive: the end is a block of zeros or of the file."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        reason = "truncated_file" if len(block) < tarfile.BLOCKSIZE else "unreadable_file"
        rest = path.stat().st_size - tar.offset
        yield problem(path.name, "", reason, f"damaged header at byte {tar.offset}, {rest} bytes unread")


def _member(
    tar: tarfile.TarFile, info: tarfile.TarInfo, path: Path, limit: int
) -> tuple[str, bytes, int] | Problem:
    where = f"{path.name}:{ascii(info.name)[1:-1] if not info.name.isprintable() else info.name}"[:300]
    parts = info.name.split("/")
    if (
        not info.isreg()
        or info.sparse
        or ".." in parts
        or info.name.startswith("/")
        or not info.name.isprintable()
    ):
        return problem(where, "", "unsafe_name")
    if info.size > limit:
        return problem(where, "", "image_too_large", f"{info.size} bytes")
    data = tar.extractfile(info).read()
    if len(data) < info.size:
        return problem(where, "", "truncated_file", f"{len(data)} of {info.size} bytes")
    return info.name, data, info.offset_data


def _sample(path: Path, key: str, members: dict[str, bytes], options: ReaderOptions) -> Item:
    where = f"{path.name}/{key}"
    meta = _meta(members.pop("json", None), where, key)
    if isinstance(meta, Problem):
        return meta
    captions = _captions(members.pop("txt", None), meta, where, key, options)
    if isinstance(captions, Problem):
        return captions
    suffix = next((name for name in members if name in SUFFIXES), "")
    image = members.pop(suffix, b"")
    if suffix and not image:
        return problem(where, key, "empty_image")
    if not image and not members:
        return problem(where, key, "no_image")
    return make_record(key, image, captions, meta, where, options, members)


def _meta(data: bytes | None, where: str, key: str) -> dict[str, Any] | Problem:
    if data is None:
        return {}
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        return problem(where, key, "bad_json", f"the .json member: {str(error)[:120]}")
    return (
        plain(meta)
        if isinstance(meta, dict)
        else problem(where, key, "bad_json", "the .json member is no object")
    )


def _captions(
    data: bytes | None, meta: dict[str, Any], where: str, key: str, options: ReaderOptions
) -> tuple[str, ...] | Problem:
    """From the `.txt`, one a line, else from a caption field of the `.json`."""
    if data is None:
        name = find_column(list(meta), CAPTIONS, options.caption_column)
        return (caption_list(meta[name]) or ()) if name else ()
    text = decode_text(data.removeprefix(b"\xef\xbb\xbf"), options.encoding, where, key)
    return text if isinstance(text, Problem) else tuple(split_lines(text))
