"""Sources by URL: shards of any fsspec file system, of http(s) or `pipe:`, and lists. The disk holds two shards.

A shard comes whole into a folder of this process, while the one before it is read, and goes when it was read; a list
comes whole and stays until the process ends.
"""

import atexit
import shutil
import tempfile
import urllib.parse
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from data_tools.readers.base import Part
from data_tools.readers.finders import grouped
from data_tools.readers.inventory import LIST_SUFFIXES
from data_tools.shards.remote import (
    PIPE,
    RemoteOptions,
    RemoteShard,
    ShardCache,
    ShardUnavailable,
    list_shards,
    sizes,
)


@dataclass
class Fetched:
    """The shards of a source, brought when they are read."""

    shards: dict[Path, RemoteShard]
    cache: ShardCache

    def __call__(self, files: Sequence[Path]) -> Iterator[Path]:
        """Each of `files` while it is here. Raises ShardUnavailable (an OSError) after all retries."""
        with ThreadPoolExecutor(1) as pool:
            ahead = [self._start(pool, path) for path in files[:1]]
            for number in range(len(files)):
                path = ahead.pop().result()
                ahead += [self._start(pool, path) for path in files[number + 1 : number + 2]]
                try:
                    yield path
                finally:
                    path.unlink(missing_ok=True)

    def _start(self, pool: ThreadPoolExecutor, path: Path) -> Future[Path]:
        return pool.submit(self.cache.fetch, self.shards[path])


def is_list(url: str) -> bool:
    """Whether it names a list rather than shards, by its suffix."""
    return not url.startswith(PIPE) and _name_of(url).lower().endswith(LIST_SUFFIXES)


def fetch_list(url: str, options: RemoteOptions | None = None) -> Path:
    """Where the list lies on this disk, under its own name. Raises FileNotFoundError or ValueError."""
    options = _of_this_process(options)
    atexit.register(shutil.rmtree, options.folder, ignore_errors=True)
    try:
        return ShardCache(options).fetch(RemoteShard(url, options.folder / _name_of(url)))
    except ShardUnavailable as error:
        raise FileNotFoundError(f"cannot read {error}") from error


def remote_parts(
    url: str, options: RemoteOptions | None = None
) -> tuple[tuple[Part, ...], tuple[tuple[str, int], ...]]:
    """The shards of a source by split, as a folder of them has, and name and size of each.

    The size is in bytes where the file system lists them, otherwise minus the samples that dataset.json names, or 0.
    Raises ValueError where the shards cannot be listed.
    """
    options = _of_this_process(options)
    shards = {shard.path: shard for shard in list_shards(url, "", options)}
    fetched = Fetched(shards, ShardCache(options))
    weakref.finalize(fetched, shutil.rmtree, options.folder, ignore_errors=True)
    known = sizes(shard.url for shard in shards.values())
    files = [(path.name, known.get(s.url, -(s.num_samples or 0))) for path, s in sorted(shards.items())]
    return tuple(replace(part, fetch=fetched) for part in grouped(list(shards))), tuple(files)


def _name_of(url: str) -> str:
    return Path(urllib.parse.urlsplit(url).path).name


def _of_this_process(options: RemoteOptions | None) -> RemoteOptions:
    """With a cache of its own."""
    return replace(options or RemoteOptions(), cache=tempfile.mkdtemp(prefix="source-"))
