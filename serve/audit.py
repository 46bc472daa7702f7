"""The audit log: append-only JSON lines in a chain of hashes, which `verify` checks.

    python -m serve.audit verify audit/

Each line holds its number, the hash of the line before it and its own: SHA-256 over both and the record. Changing,
removing or reordering a line breaks the chain; what is missing at the end shows by `head.json`, which is renamed into
place after each line. A line is on disk before the answer that it tells of leaves; a half-written last line, which
only a crash leaves behind, belongs to no answer and is cut off at the next start.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common.config import command, parse_options
from common.files import atomic_path, ensure_writable_directory, read_json
from common.log import say

START = "0" * 64
HEAD, ANCHOR = "head.json", "anchor.json"
DAY = 86400.0


def line_hash(previous: str, number: int, record: dict[str, Any]) -> str:
    """Hex SHA-256 of the line before, this line's number and its record in canonical JSON."""
    body = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(f"{previous}\n{number}\n{body}".encode()).hexdigest()


class AuditLog:
    """Appends records; one process writes. A new file starts at `max_bytes`, files older than `keep_days` go."""

    def __init__(self, directory: Path, max_bytes: int = 64 << 20, keep_days: float = 0) -> None:
        """Raises ValueError when the directory cannot be written or its chain is broken at the end."""
        self.directory = ensure_writable_directory(directory)
        self.max_bytes, self.keep_days = max_bytes, keep_days
        self.number, self.hash = _cut_and_find_end(self.directory)
        files = _files(self.directory)
        self.path = files[-1] if files else self._new_path()
        self._file = self.path.open("ab")

    def append(self, record: dict[str, Any]) -> str:
        """Write one record, to the disk; returns its hash. `time` (seconds since 1970) is added."""
        if self._file.tell() >= self.max_bytes:
            self._rotate()
        record = {"time": round(time.time(), 3)} | record
        digest = line_hash(self.hash, self.number, record)
        line = {"number": self.number, "previous": self.hash, "hash": digest, "record": record}
        self._file.write(json.dumps(line, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.number, self.hash = self.number + 1, digest
        _write_json(self.directory / HEAD, {"number": self.number, "hash": self.hash})
        return digest

    def close(self) -> None:
        self._file.close()

    def _new_path(self) -> Path:
        return self.directory / f"audit_{self.number:012d}.jsonl"

    def _rotate(self) -> None:
        self._file.close()
        self.path = self._new_path()
        self._file = self.path.open("ab")
        if self.keep_days:
            self.forget_before(time.time() - self.keep_days * DAY)

    def forget_before(self, when: float) -> int:
        """Remove whole files whose last record is older than `when`; the anchor tells where the chain goes on."""
        removed = 0
        for path in _files(self.directory)[:-1]:
            *_, last = _lines(path)
            if last["record"]["time"] >= when:
                break
            _write_json(
                self.directory / ANCHOR,
                {"number": last["number"] + 1, "hash": last["hash"], "removed": path.name},
            )
            path.unlink()
            removed += 1
        return removed


def _write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), "utf-8")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("audit_*.jsonl"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Raises ValueError naming the first line that is none of ours."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                complete = text.endswith(b"\n") and {"number", "previous", "hash", "record"} <= set(line)
            except (ValueError, TypeError):
                complete = False
            if not complete:
                raise ValueError(f"{path}:{number} is not a whole line of an audit log")
            yield line


def _cut_and_find_end(directory: Path) -> tuple[int, str]:
    """Cut a half-written last line; number and previous hash of the next one."""
    files = _files(directory)
    while files:
        path = files[-1]
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + len(whole[1]))
        if whole[1]:
            *_, last = _lines(path)
            return last["number"] + 1, last["hash"]
        path.unlink()  # nothing whole stands in it
        files.pop()
    anchor = directory / ANCHOR
    if anchor.is_file():
        value = read_json(anchor)
        return value["number"], value["hash"]
    return 0, START


def verify(directory: Path) -> int:
    """The number of lines checked. Raises ValueError naming the first place where the chain is broken."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no audit directory {directory}")
    anchor = read_json(directory / ANCHOR) if (directory / ANCHOR).is_file() else {"number": 0, "hash": START}
    number, previous, count = anchor["number"], anchor["hash"], 0
    for path in _files(directory):
        for line in _lines(path):
            if line["number"] < number and not count:
                break  # a file that retention was removing when the process ended
            where = f"{path}, record {line['number']}"
            if line["number"] != number or line["previous"] != previous:
                raise ValueError(f"the audit chain is broken before {where}: records are missing or moved")
            if line["hash"] != line_hash(previous, number, line["record"]):
                raise ValueError(f"the audit chain is broken at {where}: the record was changed")
            number, previous, count = number + 1, line["hash"], count + 1
    head = directory / HEAD
    if head.is_file() and read_json(head)["number"] > number:
        missing = read_json(head)["number"] - number
        raise ValueError(f"the audit chain is broken at its end: {missing} records are missing")
    return count


@dataclass(frozen=True)
class Options:
    """Check an audit log."""

    action: tyro.conf.Positional[Literal["verify"]]
    """verify walks the chain of hashes."""
    directory: tyro.conf.Positional[Path]
    """Where the service keeps its audit log."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(Options, argv, description=__doc__)
    count = verify(options.directory)
    say(f"{options.directory}: {count} records, the chain is whole")
    return count


if __name__ == "__main__":
    main()
