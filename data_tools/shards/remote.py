"""Shards that lie elsewhere: http(s), any fsspec URL (s3://, gs:// ...) or the output of a command (`pipe:`).

A shard is fetched whole into a cache on the local disk, once for all processes of a machine, and read from there like
a local one. `dataset.json`, which data_tools.shard writes beside the tars, says how many samples each holds, so a run
starts after its first shards; without it (`pipe:`, shards of other tools) all are fetched before the first step.
"""

import hashlib
import json
import math
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from common.files import cache_directory, ensure_writable_directory
from common.lock import locked
from data_tools.shards.image_shards import DATASET_FILE

PIPE = "pipe:"
BESIDE = ("tokenizer.json",)  # small files that go with shards of codes
_BLOCK = 1 << 20
_SPLIT = re.compile(r"(train|val|test)-")


@dataclass(frozen=True)
class RemoteOptions:
    """How shards are brought here; without effect on local ones."""

    cache: str = ""
    """Folder on the local disk for fetched shards; empty: SHARD_CACHE of the environment, else ~/.cache."""
    cache_gib: float = 0.0
    """Most the cache may hold in GiB, at least two windows of shards: the longest unused go first; 0: no limit."""
    window_shards: int = 16
    """Shards whose samples are shuffled together; the next window is fetched while one is used."""
    connections: int = 4
    """Shards that are fetched at a time."""
    retries: int = 3
    """Further tries for a shard after a failed one."""
    backoff_s: float = 1.0
    """Seconds before the first further try, doubled each time."""
    stall_s: float = 60.0
    """A fetch that brings nothing for so many seconds has failed."""
    retry_cooldown_s: float = 300.0
    """Seconds before an unavailable shard is tried again; its samples are replaced in the meantime."""
    max_failed_share: float = 0.1
    """Training ends with an error when more than this share of the shards are unavailable, 0 to 1."""

    EARLIER_NAMES: ClassVar = {"rest_s": "retry_cooldown_s"}

    def __post_init__(self) -> None:
        if min(self.window_shards, self.connections) < 1:
            raise ValueError("remote: connections and window_shards must be at least 1")
        if min(self.retries, self.cache_gib, self.backoff_s, self.retry_cooldown_s) < 0:
            raise ValueError(
                "remote: retries, cache_gib, backoff_s and retry_cooldown_s must not be negative"
            )
        if self.stall_s <= 0 or not 0 <= self.max_failed_share <= 1:
            raise ValueError("remote: stall_s must be above 0 and max_failed_share from 0 to 1")

    @property
    def folder(self) -> Path:
        """Of the cache."""
        given = self.cache or os.environ.get("SHARD_CACHE")
        return Path(given) if given else cache_directory() / "shards"


class NoSuchSplit(FileNotFoundError):
    """A source without shards of the split that is asked for."""


class ShardUnavailable(OSError):
    """A shard that could not be fetched, after all retries."""

    def __init__(self, url: str, why: str):
        super().__init__(f"{url}: {why}")
        self.url, self.why = url, why


@dataclass(frozen=True)
class RemoteShard:
    """Where a shard is, where it goes in the cache, and its samples (None: not known before it is here)."""

    url: str
    path: Path
    num_samples: int | None = None


def is_remote(source: str) -> bool:
    """True for `pipe:` and for URLs other than file://."""
    return source.startswith(PIPE) or ("://" in source and not source.startswith("file://"))


def list_shards(source: str, split: str, options: RemoteOptions) -> list[RemoteShard]:
    """The shards of a remote folder, of a brace pattern, or one URL; `split` "" takes all.

    Raises ValueError in one sentence where there is nothing to list, FileNotFoundError for a split without shards.
    """
    import braceexpand

    if "{" in source or source.startswith(PIPE) or source.endswith(".tar"):
        urls = list(braceexpand.braceexpand(source))
        base, counts = source, dict.fromkeys(urls)
        if not source.startswith(PIPE):
            counts = _counts_of_pattern(urls, options)
            base = urls[0].rpartition("/")[0]
    else:
        base = source.rstrip("/")
        counts = _counts_of_folder(base, split, options)
    chosen = {url: counts[url] for url in of_split(list(counts), split, source)}
    folder = options.folder / hashlib.sha256(f"{base}\n{_stamp(counts)}".encode()).hexdigest()[:16]
    shards = [RemoteShard(url, folder / _file_name(url), count) for url, count in chosen.items()]
    if not source.startswith(PIPE):
        _fetch_beside(base, folder, options)
    return shards


def _stamp(counts: dict[str, int | None]) -> str:
    """Other shards under the same address go to another folder of the cache."""
    return json.dumps(sorted((url, n) for url, n in counts.items() if n is not None))


def of_split(names: list[Any], split: str, source: str) -> list[Any]:
    """Paths or URLs named like the split; all if none is named like any, or `split` is "". Raises NoSuchSplit."""
    found = {name: _SPLIT.match(str(name).rpartition("/")[2]) for name in names}
    if not split or not any(found.values()):
        return names
    chosen = [name for name, match in found.items() if match and match[1] == split]
    if not chosen:
        raise NoSuchSplit(f"no {split}-*.tar among the {len(names)} shards of {source}")
    return chosen


def _file_name(url: str) -> str:
    name = url.rpartition("/")[2].partition("?")[0]
    plain = name.endswith(".tar") and not url.startswith(PIPE)
    return name if plain else hashlib.sha256(url.encode()).hexdigest()[:24] + ".tar"


def _counts_of_folder(base: str, split: str, options: RemoteOptions) -> dict[str, int | None]:
    dataset = _read_json(f"{base}/{DATASET_FILE}", options)
    if dataset is not None:
        return {f"{base}/{name}": int(n) for name, n in dataset["shards"].items()}
    if base.startswith(("http://", "https://")):
        raise ValueError(
            f"{base} has no {DATASET_FILE}, and http cannot list a folder: name the shards, such as "
            f"{base}/{split or 'train'}-{{00000..00009}}.tar"
        )
    system, root = _file_system(base)
    scheme = base.partition("://")[0]
    names = sorted(system.glob(f"{root}/*.tar"))
    if not names:
        raise ValueError(f"{base} holds neither {DATASET_FILE} nor any .tar")
    return {f"{scheme}://{name.lstrip('/')}" if scheme not in name else name: None for name in names}


def _counts_of_pattern(urls: list[str], options: RemoteOptions) -> dict[str, int | None]:
    """With the counts of the dataset.json beside them, where there is one."""
    counts: dict[str, int | None] = {}
    for base in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        known = (_read_json(f"{base}/{DATASET_FILE}", options) or {}).get("shards", {})
        names = [url.rpartition("/")[2] for url in urls if url.rpartition("/")[0] == base]
        counts |= {f"{base}/{name}": known.get(name) for name in names}
    return {url: counts[url] for url in urls}


def _read_json(url: str, options: RemoteOptions) -> Any:
    """None where there is no such file. Raises ValueError where it cannot be reached or is not what it should be."""
    try:
        with _retried(url, options) as source:
            return json.loads(source.read(1 << 26))
    except FileNotFoundError:
        return None
    except ShardUnavailable as error:
        raise ValueError(f"cannot reach {error}") from error
    except ValueError as error:
        raise ValueError(f"{url} is not JSON: {error}") from error


def _fetch_beside(base: str, folder: Path, options: RemoteOptions) -> None:
    for name in BESIDE:
        if not (folder / name).is_file() and (content := _read_json(f"{base}/{name}", options)) is not None:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / name, json.dumps(content).encode())


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def sizes(urls: Iterable[str]) -> dict[str, int]:
    """Bytes of those files whose file system lists folders: not of http(s) and `pipe:`."""
    found: dict[str, int] = {}
    for base in dict.fromkeys(url.rpartition("/")[0] for url in urls):
        if base.startswith(("http://", "https://", PIPE)):
            continue
        system, root = _file_system(base)
        entries = system.ls(root, detail=True)
        found |= {f"{base}/{entry['name'].rpartition('/')[2]}": int(entry["size"] or 0) for entry in entries}
    return found


# --- opening -----------------------------------------------------------------------------------------------------


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {url}: {error}") from error


@contextmanager
def _retried(url: str, options: RemoteOptions) -> Iterator[BinaryIO]:
    """A small file, opened with retries. Raises FileNotFoundError, or ShardUnavailable."""
    for attempt in range(options.retries + 1):
        try:
            with closing(_open(url, options.stall_s)) as source:
                yield source
            return
        except FileNotFoundError:
            raise
        except OSError as error:
            if attempt == options.retries:
                raise ShardUnavailable(url, _why(error)) from error
            time.sleep(options.backoff_s * 2**attempt)


def _open(url: str, stall_s: float) -> BinaryIO:
    """Raises FileNotFoundError where the remote says so, OSError for what may pass."""
    if url.startswith(("http://", "https://")):
        try:
            return urllib.request.urlopen(url, timeout=stall_s)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"HTTP {error.code}") from error
            raise OSError(f"HTTP {error.code}") from error
    system, root = _file_system(url)
    return system.open(root, "rb")


def _expected_size(url: str, source: BinaryIO) -> int | None:
    """Bytes that should come, None where nobody says."""
    if url.startswith(("http://", "https://")):
        length = source.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    return getattr(source, "size", None)


def _why(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    return f"{type(reason).__name__}: {reason}" if not isinstance(reason, str) else reason


# --- the cache ---------------------------------------------------------------------------------------------------


class ShardCache:
    """Brings shards here. Safe across threads and processes: who comes second waits for who came first."""

    def __init__(self, options: RemoteOptions):
        """Raises ValueError where the folder of the cache cannot be written."""
        self.options = options
        ensure_writable_directory(options.folder)
        self._failed: dict[str, tuple[float, str]] = {}

    def fetch(self, shard: RemoteShard) -> Path:
        """The path of the whole shard in the cache. Raises ShardUnavailable after all retries, or during its rest."""
        if shard.path.is_file():
            return shard.path
        self._refuse_at_rest(shard.url)
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(shard.path):
            if shard.path.is_file():
                return shard.path
            self._refuse_at_rest(shard.url)  # the thread that this one waited for may have failed
            try:
                self._fetch(shard)
            except ShardUnavailable as error:
                self._failed[shard.url] = (time.monotonic(), error.why)
                raise
        self._failed.pop(shard.url, None)
        return shard.path

    def _refuse_at_rest(self, url: str) -> None:
        since, why = self._failed.get(url, (-math.inf, ""))
        if time.monotonic() - since < self.options.retry_cooldown_s:
            raise ShardUnavailable(url, why)

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with locked(path.parent, f".{path.name}.lock", waits=True):
            yield

    def _fetch(self, shard: RemoteShard) -> None:
        temporary = shard.path.with_name(f".{shard.path.name}.part")
        for attempt in range(self.options.retries + 1):
            try:
                with temporary.open("wb") as file:
                    self._copy(shard.url, file)
                break
            except OSError as error:
                gone = isinstance(error, FileNotFoundError)
                if gone or attempt == self.options.retries:
                    temporary.unlink(missing_ok=True)
                    raise ShardUnavailable(shard.url, _why(error)) from error
                time.sleep(self.options.backoff_s * 2**attempt)
        # two that come at once must not both take the last place
        with self._lock(self.options.folder / "room"):
            self._make_room(temporary.stat().st_size)
            os.replace(temporary, shard.path)

    def _copy(self, url: str, file: BinaryIO) -> None:
        if url.startswith(PIPE):
            return _copy_pipe(url.removeprefix(PIPE), file, self.options.stall_s)
        with closing(_open(url, self.options.stall_s)) as source:
            expected = _expected_size(url, source)
            _copy_watched(source, file, self.options.stall_s)
        if expected is not None and file.tell() != expected:
            raise OSError(f"ended after {file.tell()} of {expected} bytes")

    def _make_room(self, size: int) -> None:
        """Delete the longest unused shards beyond the limit; what is open stays readable until it is closed."""
        if not self.options.cache_gib:
            return
        found = []
        for path in self.options.folder.glob("*/*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:  # deleted by hand
                continue
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
        room = self.options.cache_gib * 2**30 - size - sum(old_size for _, old_size, _ in found)
        for _, old_size, path in sorted(found):
            if room >= 0:
                break
            path.unlink(missing_ok=True)
            room += old_size


def touch(path: Path) -> None:
    """This shard is in use now: file systems mounted with noatime do not note it themselves."""
    try:
        os.utime(path)
    except OSError:  # evicted, or a cache that may only be read
        return


def _copy_watched(source: BinaryIO, file: BinaryIO, stall_s: float) -> None:
    """Copy to the end. Raises TimeoutError when nothing comes for `stall_s`: no library is trusted to give up."""
    blocks: queue.Queue[bytes | BaseException] = queue.Queue(4)
    stopped = threading.Event()

    def hand_over(block: bytes | BaseException) -> None:
        while not stopped.is_set():
            try:
                return blocks.put(block, timeout=1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            while not stopped.is_set() and (block := source.read(_BLOCK)):
                hand_over(block)
            hand_over(b"")
        except BaseException as error:  # raised again below, in the thread that waits
            hand_over(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while block := blocks.get(timeout=stall_s):
            if isinstance(block, BaseException):
                raise block if isinstance(block, OSError) else OSError(_why(block)) from block
            file.write(block)
    except queue.Empty as error:
        raise TimeoutError(f"nothing came for {stall_s:g} s") from error
    finally:
        stopped.set()


def _copy_pipe(command: str, file: BinaryIO, stall_s: float) -> None:
    """The output of a shell command, as webdataset's `pipe:` does; its own last words go into the error."""
    with tempfile.TemporaryFile() as words:
        with subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, stderr=words, start_new_session=True
        ) as process:
            try:
                _copy_watched(process.stdout, file, stall_s)
            except OSError:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        words.seek(0)
        said = words.read(1 << 16).decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise OSError(f"exit code {process.returncode}: {said[-1] if said else 'no message'}")
