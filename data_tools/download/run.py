"""Lists of urls to image shards: concurrent, polite, resumable, safe, honest about what did not come.

    python -m data_tools.download wukong.csv data/raw
    python -m data_tools.download wukong.csv data/raw --rules wukong-food --concurrency 256 --per-host 16
    python -m data_tools.download mine.csv data/raw --allow-private      # a server of your own network
    python -m data_tools.download wukong.csv data/raw --engine ray --ray-address auto --per-host 64

SRC is a list with a url and a caption column (CSV, TSV, JSONL, parquet). DST gets a tar for each `samples_per_shard`
rows of the list, `report.json` with the success of each host, and `dropped.jsonl` with the reason of each row that did
not come. The same command goes on after a kill, even kill -9, and ends in the same bytes; after the end it tries only
the failures again. `--rules` drops rows whose caption would not be kept, before they cost a request; run
`python -m data_tools.clean` on the result, which looks at the images too. With `--engine ray` the nodes of a cluster
fetch, a tar's rows each, and this process writes; `--concurrency` and `--per-host` hold for the whole cluster.

Why not img2dataset (1.47.0 was read): it requires webdataset < 0.3, pandas < 3, opencv < 5 and wandb, so it cannot be
installed beside the packages used here; it downloads with urllib, one thread a request, without keep-alive, size cap,
content check or back-off; it requests private addresses like any other; a killed shard is downloaded from its start,
and what failed is not tried again once its shard is done. The opt-out directives are its own, and its output
(WebDataset tars) is read by `data_tools.readers` like any other.
"""

import asyncio
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import tyro

from common.config import command, parse_options, to_mapping
from common.console.progress import progress
from common.files import atomic_path, read_json, write_json
from data_tools.download.fetch import Fetcher, FetchOptions, Outcome, check_url
from data_tools.download.spool import Spool, read_images, write_tar
from data_tools.engine import EngineOptions, Tasks
from data_tools.images.decode import sniff
from data_tools.ingest.records import Problem, Record
from data_tools.ingest.rewrite import print_report
from data_tools.ingest.shard_run import DROPPED_FILE, REPORT_FILE, announce, is_shard, say
from data_tools.readers.base import Meter, ReaderOptions
from data_tools.readers.detect import Source, open_source
from data_tools.rules import load_rules
from data_tools.rules.captions import CAPTION_REASONS, CaptionJudge
from data_tools.shards.image_shards import DATASET_FILE, describe_shards
from data_tools.shards.targets import JOURNAL, LocalTarget

ABOUT_THE_WHOLE = (DATASET_FILE, REPORT_FILE, DROPPED_FILE)
WORK = ".download"  # spools of unfinished parts, outcomes of finished ones
REASONS = CAPTION_REASONS | {
    "image_unavailable": "the server did not give it (details in dropped.jsonl); run again to try the failures again",
    "image_too_large": "raise --max-bytes to have it",
    "not_an_image": "the answer was no image, often a page that says so",
    "opted_out": "the site asks not to be used for this (X-Robots-Tag, tdm-reservation)",
    "private_address": "the url leads into a private network; --allow-private permits it for a list of your own",
    "no_url": "the row has neither a url nor an image",
}


@dataclass(frozen=True)
class DownloadConfig:
    """Fetch the images of a list."""

    src: tyro.conf.Positional[str]
    """List with urls: CSV, TSV, JSONL or parquet; a path, or a URL itself."""
    dst: tyro.conf.Positional[Path]
    """Folder for the shards."""
    rules: str = ""
    """Preset (shop, wukong, wukong-food) or YAML file; its caption rules drop rows before they are requested."""
    samples_per_shard: int = 1000
    """Rows of the list a tar; those that do not come are missing in it."""
    min_success: float = 0.05
    """Stop when less than this share of the rows came, 0 to 1: then the network is at fault, not the list."""
    min_rows: int = 500
    """Rows before `min_success` is looked at."""
    fetch: tyro.conf.OmitArgPrefixes[FetchOptions] = field(default_factory=FetchOptions)
    reader: tyro.conf.OmitArgPrefixes[ReaderOptions] = field(default_factory=ReaderOptions)
    work: tyro.conf.OmitArgPrefixes[EngineOptions] = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.min_rows < 1:
            raise ValueError("--samples-per-shard and --min-rows must be at least 1")
        if not 0 <= self.min_success <= 1:
            raise ValueError(f"--min-success must be between 0 and 1, not {self.min_success}")


@dataclass(frozen=True)
class Chunk:
    """The rows of one tar: records to fetch by their number in it, and rows that were lost before."""

    name: str
    records: dict[int, Record]
    problems: list[Problem]


class Download:
    """One run over a list."""

    def __init__(self, config: DownloadConfig, source: Source):
        self.config, self.source = config, source
        self.work = config.dst / WORK
        self.judge = CaptionJudge(load_rules(config.rules).captions) if config.rules else None
        self.meter = Meter(total=source.num_bytes)
        self.read = self.tried = self.came = 0
        self.failures: Counter[str] = Counter()
        self.bytes_received = 0
        self._tasks: Tasks | None = None
        self._hosts: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def run(self) -> dict[str, Any]:
        """Fetch what is missing; returns the content of report.json."""
        for path in self.work.glob(".*.tmp"):  # what killed runs were writing
            path.unlink()
        self.round = self._begin()
        cluster = self.config.work.cluster
        if cluster is None:
            asyncio.run(self._run(at_once_of(self.config)))
        else:
            with cluster.connected():
                options, at_once = shared_limits(self.config.fetch, 2 * Tasks(cluster, len).slots())
                self._tasks = Tasks(cluster, FetchRows(options))
                asyncio.run(self._run(at_once))
        return self._finish()

    def _begin(self) -> int:
        """The number of this round: 1 at first, one more each time after a round that ended."""
        job, path = job_of(self.config, self.source), self.work / "job.json"
        others = [p.name for p in self.config.dst.iterdir() if is_shard(p.name) or p.name in ABOUT_THE_WHOLE]
        if others and not path.is_file():
            raise ValueError(f"{self.config.dst} holds {others[0]} of something else: choose an empty folder")
        begun = read_json(path) if path.is_file() else {"job": job, "round": 1}
        if begun["job"] != job:
            raise ValueError(
                f"{self.config.dst} holds a download of another list or with other options: choose another folder"
            )
        if (self.config.dst / REPORT_FILE).is_file() and self._ended() >= begun["round"]:
            begun["round"] += 1
        write_json(path, begun)
        return begun["round"]

    def _ended(self) -> int:
        return read_json(self.config.dst / REPORT_FILE)["round"]

    async def _run(self, at_once: int) -> None:
        """`at_once`: chunks under way."""
        asyncio.get_running_loop().set_default_executor(
            ThreadPoolExecutor(64)
        )  # names are looked up in threads
        self.started = time.monotonic()
        with progress(unit=" rows") as self.bar:
            async with Fetcher(self.config.fetch) as self.fetcher:
                pending: set[asyncio.Task] = set()
                try:
                    for chunk in self._chunks():
                        if not self._is_done(chunk):
                            pending.add(asyncio.create_task(self._fetch_chunk(chunk)))
                        if len(pending) >= at_once:
                            pending = await _one_done(pending)
                    while pending:
                        pending = await _one_done(pending)
                finally:
                    for task in pending:
                        task.cancel()
                    await asyncio.gather(*pending, return_exceptions=True)

    def _chunks(self) -> Iterator[Chunk]:
        for part in self.source.parts:
            number, rows = 0, []
            for item in self.source.read(part, self.meter):
                rows.append(item)
                if len(rows) == self.config.samples_per_shard:
                    yield self._chunk(f"{part.split}-{number:05d}", rows)
                    number, rows = number + 1, []
            if rows:
                yield self._chunk(f"{part.split}-{number:05d}", rows)

    def _chunk(self, name: str, items: Sequence[Record | Problem]) -> Chunk:
        chunk = Chunk(name, {}, [])
        for number, item in enumerate(items):
            verdict = item if isinstance(item, Problem) else self._before(item)
            if isinstance(verdict, Problem):
                chunk.problems.append(verdict)
            else:
                chunk.records[number] = item
        self.read += len(items)
        self.bar.total = round(self.read * max(1.0, self.meter.total / max(self.meter.done, 1)))
        self.bar.update(len(chunk.problems))
        return chunk

    def _before(self, record: Record) -> Problem | None:
        """Why a row is not worth a request."""
        if record.image:
            raise ValueError(
                f"{self.config.src} holds images, not urls ({record.where}): nothing to download"
            )
        if not record.meta.get("url"):
            return Problem(record.where, record.key, "no_url", REASONS["no_url"])
        verdicts = [self.judge(caption) for caption in record.captions] if self.judge else []
        if verdicts and all(v.reason for v in verdicts):
            detail = f"{verdicts[0].detail}: {record.captions[0]}"
            return Problem(record.where, record.key, verdicts[0].reason, detail)
        return None

    def _is_done(self, chunk: Chunk) -> bool:
        """True if this round has nothing to do for the chunk; its outcome is counted then."""
        path = self.work / f"{chunk.name}.json"
        status = read_json(path) if path.is_file() else None
        if status is None or (status["round"] < self.round and status["failed"]):
            return False
        self._count(status["kept"], status["failed"])
        self.bar.update(len(chunk.records))
        return True

    def _count(self, came: int, failed: Sequence[dict[str, Any]]) -> None:
        self.came += came
        self.tried += came + len(failed)
        self.failures.update(f"{row['detail']} from {row['host']}" for row in failed)

    async def _fetch_chunk(self, chunk: Chunk) -> None:
        path = self.work / f"{chunk.name}.json"
        before = read_json(path) if path.is_file() else None
        numbers = {row["number"] for row in before["failed"]} if before else set(chunk.records)
        self.bar.update(len(chunk.records) - len(numbers))
        spool = Spool(self.work / f"{chunk.name}.spool")
        try:
            for entry in (spool.entries[n] for n in numbers if n in spool.entries):
                self._note(1, entry.reason, entry.detail, entry.host)
            waiting: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
            for number in sorted(numbers - set(spool.entries)):
                url = chunk.records[number].meta["url"]
                waiting[host_of(url)].setdefault(url, []).append(number)
            if self._tasks:
                await self._fetch_on(self._tasks, waiting, spool)
            else:
                async with asyncio.TaskGroup() as group:
                    for host, urls in waiting.items():
                        queue = deque(urls.items())
                        for _ in range(min(self.config.fetch.per_host, len(queue))):
                            group.create_task(self._fetch_host(host, queue, spool))
            await asyncio.to_thread(self._close_chunk, chunk, spool, before)
        finally:
            spool.close()

    async def _fetch_host(self, host: str, queue: deque[tuple[str, list[int]]], spool: Spool) -> None:
        slots = self._hosts.setdefault(host, asyncio.Semaphore(self.config.fetch.per_host))
        while queue:
            async with slots:
                if not queue:
                    return
                url, numbers = queue.popleft()
                outcome = await self.fetcher.fetch(url)
            self._keep(numbers, outcome, host, spool)

    async def _fetch_on(self, tasks: Tasks, waiting: dict[str, dict[str, list[int]]], spool: Spool) -> None:
        """A chunk's urls by host as one task of a cluster."""
        rows = [(host, url, numbers) for host, urls in waiting.items() for url, numbers in urls.items()]
        if not rows:
            return
        batch = [[url for _, url, _ in rows]]
        outcomes = (await asyncio.to_thread(tasks.result, tasks.submit(batch), batch, _crashed))[0]
        for (host, _, numbers), outcome in zip(rows, outcomes, strict=True):
            self._keep(numbers, outcome, host, spool)

    def _keep(self, numbers: list[int], outcome: Outcome, host: str, spool: Spool) -> None:
        self.bytes_received += len(outcome.data)
        spool.add(numbers, outcome.data, outcome.reason, outcome.detail, host)
        self._note(len(numbers), outcome.reason, outcome.detail, host)

    def _note(self, rows: int, reason: str, detail: str, host: str) -> None:
        self.tried += rows
        self.came += 0 if reason else rows
        if reason:
            self.failures[f"{detail} from {host}"] += rows
        speed = self.bytes_received / 2**20 / max(time.monotonic() - self.started, 0.1)
        self.bar.set_postfix_str(f"{self.came / self.tried:.0%} came, {speed:.1f} MiB/s", refresh=False)
        self.bar.update(rows)
        if self.tried >= self.config.min_rows and self.came < self.config.min_success * self.tried:
            most = ", ".join(f"{count} x {what}" for what, count in self.failures.most_common(3))
            raise ValueError(
                f"only {self.came} of {self.tried} images came, less than --min-success {self.config.min_success:g}; "
                f"mostly {most}. Look at the network and the DNS server; what came is kept, the same command goes on"
            )

    def _close_chunk(self, chunk: Chunk, spool: Spool, before: dict[str, Any] | None) -> None:
        """Tar, then its outcomes, then the spool away: a kill between any two is repaired by doing this again."""
        tar = self.config.dst / f"{chunk.name}.tar"
        old = read_images(tar) if before and tar.is_file() else {}
        failed, came, records = [], Counter(), []
        for number, record in chunk.records.items():
            entry = spool.entries.get(number)
            if entry is None or (entry.reason and record.key in old):  # came in an earlier round
                came[host_of(record.meta["url"])] += 1
                records.append((record, None))
            elif entry.reason:
                failed.append(failure(number, record, entry))
            else:
                came[entry.host] += 1
                records.append((record, number))
        images = (
            _with_image(record, old[record.key] if number is None else spool.read(number))
            for record, number in records
        )
        kept = write_tar(tar, images)
        status = {
            "round": self.round,
            "kept": kept,
            "failed": failed,
            "problems": [p.to_json() for p in chunk.problems],
            "hosts": {"came": dict(came), "failed": dict(Counter(row["host"] for row in failed))},
        }
        write_json(self.work / f"{chunk.name}.json", status)
        spool.delete()

    def _finish(self) -> dict[str, Any]:
        """The files about the whole, from the outcomes of the chunks in their order."""
        shards, reasons, hosts = {}, Counter(), {}
        with (
            atomic_path(self.config.dst / DROPPED_FILE) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for path in sorted(self.work.glob("*-*.json"), key=_place):
                status = read_json(path)
                if status["kept"]:
                    shards[f"{path.stem}.tar"] = status["kept"]
                rows = status["problems"] + [{k: row[k] for k in _DROPPED} for row in status["failed"]]
                reasons.update(row["reason"] for row in rows)
                file.writelines(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
                for outcome in ("came", "failed"):
                    for host, count in status["hosts"][outcome].items():
                        entry = hosts.setdefault(host, {"came": 0, "failed": 0})
                        entry[outcome] += count
        dataset = describe_shards(shards)
        kept = dataset["num_samples"]
        report = {
            "round": self.round,
            "read": kept + sum(reasons.values()),
            "kept": kept,
            "dropped": sum(reasons.values()),
            "reasons": dict(reasons),
            "splits": dataset["splits"],
            "hosts": hosts,
            "counts": {},
        }
        write_json(self.config.dst / DATASET_FILE, dataset)
        write_json(self.config.dst / REPORT_FILE, report)
        return report


@dataclass(frozen=True)
class FetchRows:
    """The work of a node: the urls of each chunk to their outcomes."""

    options: FetchOptions

    def __call__(self, chunks: Sequence[list[str]]) -> list[list[Outcome]]:
        return [asyncio.run(self._fetch(urls)) for urls in chunks]

    async def _fetch(self, urls: list[str]) -> list[Outcome]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(16))
        slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(self.options.per_host)
        )

        async def one(url: str) -> Outcome:
            async with slots[host_of(url)]:
                return await fetcher.fetch(url)

        async with Fetcher(self.options) as fetcher:
            return list(await asyncio.gather(*(one(url) for url in urls)))


def _crashed(urls: list[str]) -> list[Outcome]:
    raise OSError(f"fetching {len(urls)} urls from {urls[0]} on ended its process each time it was tried")


def at_once_of(config: DownloadConfig) -> int:
    """Chunks under way at a time in this process: enough that a slow one holds no requests up."""
    return max(4, -(-2 * config.fetch.concurrency // config.samples_per_shard))


def shared_limits(options: FetchOptions, tasks: int) -> tuple[FetchOptions, int]:
    """The limits of one task, and how many run at a time, so that all together keep those of `options`."""
    at_once = min(tasks, options.per_host, options.concurrency)
    share = replace(options, per_host=options.per_host // at_once, concurrency=options.concurrency // at_once)
    return share, at_once


_DROPPED = ("where", "key", "reason", "detail", "url")


def failure(number: int, record: Record, entry: Any) -> dict[str, Any]:
    """The row of dropped.jsonl for an image that did not come, with its number in the chunk and its host."""
    row = Problem(record.where, record.key, entry.reason, entry.detail).to_json()
    return row | {"url": record.meta["url"], "number": number, "host": entry.host}


def host_of(url: str) -> str:
    """The host of a url, lower case; "" if it is none."""
    checked = check_url(url, allow_private=True)
    return getattr(checked, "host", "") or ""


def _place(path: Path) -> tuple[str, int]:
    split, _, number = path.stem.rpartition("-")
    return split, int(number)


def _with_image(record: Record, data: bytes) -> Record:
    return replace(record, image=data, suffix=sniff(data))


async def _one_done(pending: set[asyncio.Task]) -> set[asyncio.Task]:
    """Wait for one task; what it raised is raised here, out of the groups that it was in."""
    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        error = task.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if error:
            raise error
    return pending


def job_of(config: DownloadConfig, source: Source) -> dict[str, Any]:
    """What decides which rows are in which tar."""
    options = to_mapping(config)
    rules = to_mapping(load_rules(config.rules).captions) if config.rules else {}
    files = [list(file) for file in source.named_files]
    reader = options["reader"] | {"image_root": ""}
    return {"files": files, "rules": rules, "reader": reader, "samples_per_shard": config.samples_per_shard}


def download(config: DownloadConfig) -> dict[str, Any]:
    """Run it; returns the content of report.json. Raises ValueError for what the user has to change."""
    source = open_source(config.src, config.reader, exclude=[config.dst])
    announce(source)
    target = LocalTarget(config.dst)
    target.lock()
    try:
        target.tidy()
        report = Download(config, source).run()
        target.remove(JOURNAL)
        return report
    finally:
        target.close()


@command
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command of this module."""
    config = parse_options(DownloadConfig, argv, description=__doc__)
    start = time.monotonic()
    report = download(config)
    print_report(report, str(config.dst), REASONS)
    worst = sorted(report["hosts"].items(), key=lambda item: (-item[1]["failed"], item[0]))[:5]
    for host, counts in worst:
        total = counts["came"] + counts["failed"]
        say(f"  {host}: {counts['came']} of {total} came ({counts['came'] / total:.0%})")
    say(f"  {time.monotonic() - start:.1f} s")
    if not report["kept"]:
        raise ValueError(f"none of {report['read']} images of {config.src} came; the reasons are above")
    return report
