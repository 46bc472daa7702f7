"""Where shards go: a local folder, or any fsspec URL (s3://, gs://, sftp:// ...) by way of a staging folder.

A target also keeps the journal of an unfinished run, so that a run can be continued on another machine. Nothing in
it is trusted that was not written whole: local files are renamed into place, and an upload that was cut off is not in
the journal and is done again.
"""

import json
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from common.files import ensure_writable_directory, write_json
from common.lock import DirectoryLock, require_free
from data_tools.ingest.records import Problem

JOURNAL = ".journal"
REPORT_FILE, DROPPED_FILE = "report.json", "dropped.jsonl"
OUR_TEMPORARY = re.compile(
    r"\.(?:.+-\d{5,}\.tar|report\.json|dataset\.json|dropped\.jsonl|groups\.tsv)(?:\.\d+)?\.tmp"
)
JOB_FILE = (
    f"{JOURNAL}/job.json"  # what the journal belongs to; removed first, so a journal without it is void
)


class Target(Protocol):
    """A folder of finished files and a journal."""

    staging: Path

    def put(self, path: Path) -> None:
        """Bring a whole file of `staging` to its place."""

    def read_json(self, name: str) -> Any:
        """The content of a JSON file, None where there is none."""

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole."""

    def names(self) -> list[str]:
        """Names in the folder itself, sorted."""

    def journal_names(self) -> list[str]:
        """The files of the journal's entries, in order."""

    def remove(self, name: str) -> None:
        """Remove a file or the folder of the journal, if it is there."""

    def lock(self) -> None:
        """Hold the target until `close`; raises ValueError where another run holds it."""

    def tidy(self) -> None:
        """Remove temporary files that killed runs have left."""

    def close(self) -> None:
        """Release what is held."""


class LocalTarget:
    """A folder of this machine, held by one run at a time."""

    def __init__(self, path: Path):
        """Raises ValueError where the folder cannot be written or another run holds it."""
        self.staging = ensure_writable_directory(path)
        self._lock = None

    def lock(self) -> None:
        """Hold the folder until `close`; the lock ends with the process, however it ends. Raises ValueError also where
        the folder holds files of the user's under names of ours."""
        self._lock = DirectoryLock(self.staging)
        require_free(self._lock, self.staging)
        self._require_ours()

    def _require_ours(self) -> None:
        begun = (self.staging / JOURNAL).is_dir()
        report = self.staging / REPORT_FILE
        if report.is_file() and not _is_report(report):
            raise ValueError(f"{report} is no report of ours: move it away or choose another folder")
        dropped = self.staging / DROPPED_FILE
        if dropped.exists() and not (begun or report.is_file()):
            raise ValueError(f"{dropped} was not written here: move it away or choose another folder")

    def put(self, path: Path) -> None:
        assert path.parent == self.staging

    def read_json(self, name: str) -> Any:
        path = self.staging / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.staging / name, value)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.staging.iterdir())

    def journal_names(self) -> list[str]:
        return [f"{JOURNAL}/{path.name}" for path in sorted((self.staging / JOURNAL).glob("[0-9]*.json"))]

    def remove(self, name: str) -> None:
        path = self.staging / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def tidy(self) -> None:
        for path in self.staging.iterdir():
            if OUR_TEMPORARY.fullmatch(path.name):
                path.unlink()

    def close(self) -> None:
        if self._lock:
            self._lock.release()


def _is_report(path: Path) -> bool:
    """Whether it has the counts that every report of ours has."""
    try:
        report = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(report, dict) and {"read", "kept", "dropped", "reasons"} <= set(report)


class RemoteTarget:
    """A folder behind an fsspec URL; shards are written locally, uploaded when whole, then deleted here."""

    def __init__(self, url: str):
        """Raises ValueError for an unknown protocol or a package that it needs."""
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot open {url}: {error}") from error
        self._fs.makedirs(self._root, exist_ok=True)
        self.staging = Path(tempfile.mkdtemp(prefix="shards-"))

    def lock(self) -> None:
        """Object stores have no locks: two runs to one URL are the user's to avoid."""

    def put(self, path: Path) -> None:
        self._fs.put_file(str(path), self._at(path.name))
        path.unlink()

    def read_json(self, name: str) -> Any:
        if not self._fs.exists(self._at(name)):
            return None
        return json.loads(self._fs.cat_file(self._at(name)))

    def write_json(self, name: str, value: Any) -> None:
        if "/" in name:
            self._fs.makedirs(self._at(name.rpartition("/")[0]), exist_ok=True)
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self._fs.pipe_file(self._at(name), text.encode())

    def names(self) -> list[str]:
        return sorted(path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False))

    def journal_names(self) -> list[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._at(JOURNAL)):
            return []
        names = sorted(path.rpartition("/")[2] for path in self._fs.ls(self._at(JOURNAL), detail=False))
        return [f"{JOURNAL}/{name}" for name in names if name[:1].isdigit()]

    def remove(self, name: str) -> None:
        if self._fs.exists(self._at(name)):
            self._fs.rm(self._at(name), recursive=True)

    def tidy(self) -> None:
        """Nothing here: temporary files are in the staging folder."""

    def close(self) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def open_target(dst: str) -> Target:
    """A target for a path or an fsspec URL; `file://` is a path."""
    path = dst.removeprefix("file://")
    return RemoteTarget(dst) if "://" in path else LocalTarget(Path(path))


class Journal:
    """What an interrupted run of the same job has finished.

    One entry a shard: its split, name and samples, the last row that was consumed when it became whole, and the rows
    up to it that were lost while their images were prepared (those lost in reading are lost again); and `counts`,
    what a run counts of kept records, up to that row. Being in one file the two cannot disagree.
    """

    def __init__(self, target: Target):
        self._target = target
        entries = [target.read_json(name) for name in target.journal_names()]
        self.count = len(entries)
        self.last_row = entries[-1]["row"] if entries else 0
        self.lost = {int(n): Problem(**p) for entry in entries for n, p in entry["lost"].items()}
        self.shards: dict[str, dict[str, int]] = {}
        for entry in entries:
            self.shards.setdefault(entry["split"], {})[entry["shard"]] = entry["samples"]
        self.counts: Counter[str] = Counter(entries[-1].get("counts", {}) if entries else {})
        self._lost_since: dict[int, Problem] = {}

    def lose(self, row: int, item: Problem) -> None:
        """A row was lost while its image was prepared."""
        if row > self.last_row:
            self._lost_since[row] = item

    def finish(self, split: str, shard: str, samples: int, row: int) -> None:
        """A shard is whole and in place; `row` is the last one consumed."""
        lost = {str(n): p.to_json() for n, p in self._lost_since.items()}
        entry = {"split": split, "shard": shard, "samples": samples, "row": row, "lost": lost}
        entry["counts"] = self.counts
        self._target.write_json(f"{JOURNAL}/{self.count:06d}.json", entry)
        self.count += 1
        self._lost_since = {}
