"""The engine of clean and dedup: a source in, a part of its records out as shards, every other row with its reason.

Rows are read in order, worked on in processes, judged here in the same order and written. A run that was killed is
continued by the same command and ends in the same bytes: `.journal/` holds which row each whole shard ends at.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tqdm import tqdm

from data_tools.parallel import Work, ordered_map
from data_tools.readers import Meter, Source
from data_tools.records import Problem, Record, problem
from data_tools.shards import DATASET_FILE, ShardWriter
from data_tools.targets import JOB_FILE, JOURNAL, Journal, Target, open_target

BATCH = 16  # records a work package
REPORT_FILE, DROPPED_FILE = "report.json", "dropped.jsonl"


@dataclass(frozen=True)
class Steps:
    """What is done with each record; the three see records in the order of the source."""

    work: Work
    """In worker processes: records to results of any picklable kind. Must not depend on other records."""
    decide: Callable[[int, Record, Any], Record | Problem]
    """Here, with the number of the row (from 1) and the result of `work`: the record to write, or why not."""
    remember: Callable[[Record], None]
    """Called instead of the two for a record that an interrupted run has kept and written."""


class Row(NamedTuple):
    """A row on its way. `known`: an interrupted run decided it; `written`: and its shard is whole."""

    number: int
    split: str
    item: Record | Problem
    known: bool = False
    written: bool = False


def rewrite(
    source: Source,
    dst: str,
    job: dict[str, Any],
    steps: Steps,
    samples_per_shard: int,
    workers: int,
    describe: Callable[[Record], Sequence[str]] = lambda record: (),
) -> dict[str, Any]:
    """Run, or continue, one job; returns the content of report.json.

    `job` is what decides the result, JSON-ready: another job in `dst` is refused. `describe` names what of a kept
    record is counted in the report. Raises ValueError for what the user has to change.
    """
    target = open_target(dst)
    try:
        target.lock()
        return _Run(source, target, dst, job, steps, samples_per_shard, workers, describe).report()
    finally:
        target.close()


class _CountingJournal(Journal):
    """A journal that also keeps what was counted up to its last row."""

    def __init__(self, target: Target):
        super().__init__(target)
        names = target.journal_names()
        self.counts: Counter[str] = Counter(target.read_json(names[-1])["counts"] if names else {})

    def finish_counted(self, split: str, shard: str, samples: int, row: int) -> None:
        """Like `finish`; counts go with it in the same file, so the two cannot disagree."""
        lost = {str(n): p.to_json() for n, p in self._lost_since.items()}
        entry = {
            "split": split,
            "shard": shard,
            "samples": samples,
            "row": row,
            "lost": lost,
            "counts": self.counts,
        }
        self._target.write_json(f"{JOURNAL}/{self.count:06d}.json", entry)
        self.count += 1
        self._lost_since = {}


class _Run:
    def __init__(self, source, target, dst, job, steps, samples_per_shard, workers, describe):
        self.source, self.target, self.dst, self.job, self.steps = source, target, dst, job, steps
        self.samples_per_shard, self.workers, self.describe = samples_per_shard, workers, describe
        self.parts = tuple(part for part in source.parts if part.has_images)
        self.meter = Meter(total=source.num_bytes)
        self.kept: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.writers: dict[str, ShardWriter] = {}

    def report(self) -> dict[str, Any]:
        done, begun = self.target.read_json(REPORT_FILE), self.target.read_json(JOB_FILE)
        if begun is None and done and done.get("job") == self.job:
            self.target.remove(JOURNAL)
            say(f"{self.dst} is complete already, nothing to do")
            return done
        if begun != self.job:
            self._start_afresh()
        self.journal = _CountingJournal(self.target)
        if self.journal.count:
            say(f"continuing after {self.journal.count} whole shards, row {self.journal.last_row}")
        for split in self.journal.shards:
            self._writer(split)
        try:
            self._run()
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise
        return self._finish()

    def _start_afresh(self) -> None:
        shards = [name for name in self.target.names() if name.endswith(".tar") or name == DATASET_FILE]
        if shards:
            raise ValueError(
                f"{self.dst} holds {shards[0]} of another source or of other options: choose an empty folder"
            )
        for name in (JOB_FILE, REPORT_FILE, DROPPED_FILE, *self.target.journal_names()):
            self.target.remove(name)
        self.target.write_json(JOB_FILE, self.job)

    def _rows(self) -> Iterator[Row]:
        finished = {split: sum(shards.values()) for split, shards in self.journal.shards.items()}
        number, seen = 0, Counter()
        for part in self.parts:
            for item in self.source.read(part, self.meter):
                number += 1
                if isinstance(item, Problem) or number > self.journal.last_row:
                    yield Row(number, part.split, item)
                elif number in self.journal.lost:
                    yield Row(number, part.split, self.journal.lost[number], known=True)
                else:
                    seen[part.split] += 1
                    written = seen[part.split] <= finished.get(part.split, 0)
                    yield Row(number, part.split, item, known=True, written=written)

    def _batches(self) -> Iterator[tuple[list[Row], list[Record]]]:
        rows: list[Row] = []
        for row in self._rows():
            rows.append(row)
            if len(rows) == BATCH:
                yield rows, _to_work_on(rows)
                rows = []
        if rows:
            yield rows, _to_work_on(rows)

    def _run(self) -> None:
        path = self.target.staging / f".{DROPPED_FILE}.tmp"
        with (
            path.open("w", encoding="utf-8") as dropped,
            tqdm(unit="B", unit_scale=True, disable=None) as bar,
        ):
            for rows, results in ordered_map(self.steps.work, self._batches(), self.workers, _crashed):
                ready = iter(results)
                for row in rows:
                    needs_work = isinstance(row.item, Record) and not row.written
                    item = self._judge(row, next(ready) if needs_work else None)
                    if isinstance(item, Problem):
                        dropped.write(json.dumps(item.to_json(), ensure_ascii=False, sort_keys=True) + "\n")
                bar.total = self.meter.total
                bar.set_postfix(
                    kept=sum(self.kept.values()), dropped=sum(self.reasons.values()), refresh=False
                )
                bar.update(self.meter.done - bar.n)
        os.replace(path, self.target.staging / DROPPED_FILE)

    def _judge(self, row: Row, result: Any) -> Record | Problem:
        """Decide one row and write it if it is kept; returns the record or the reason."""
        item = row.item
        if isinstance(item, Record) and row.written:
            self.steps.remember(item)
            self.kept[row.split] += 1
            return item
        if isinstance(item, Record):
            item = result if isinstance(result, Problem) else self.steps.decide(row.number, item, result)
            if isinstance(item, Problem):
                self.journal.lose(row.number, item)
        if isinstance(item, Problem):
            self.reasons[item.reason] += 1
            return item
        self.kept[row.split] += 1
        if not row.known:
            self.journal.counts.update(self.describe(item))
        writer = self._writer(row.split)
        if path := writer.write(item):
            samples = writer.shards[path.name]
            self.target.put(path)
            self.journal.finish_counted(row.split, path.name, samples, row.number)
        return item

    def _writer(self, split: str) -> ShardWriter:
        if split not in self.writers:
            shards = self.journal.shards.get(split, {})
            self.writers[split] = ShardWriter(
                self.target.staging, split, self.samples_per_shard, shards=shards
            )
        return self.writers[split]

    def _finish(self) -> dict[str, Any]:
        """The journal goes last, so a run killed in here is continued too."""
        for writer in self.writers.values():
            if path := writer.close():
                self.target.put(path)
        kept, dropped = sum(self.kept.values()), sum(self.reasons.values())
        report = {
            "read": kept + dropped,
            "kept": kept,
            "dropped": dropped,
            "reasons": dict(self.reasons),
            "splits": dict(self.kept),
            "counts": dict(self.journal.counts),
            "job": self.job,
        }
        self.target.put(self.target.staging / DROPPED_FILE)
        if kept:
            self.target.put(self.target.staging / DATASET_FILE)
        self.target.write_json(REPORT_FILE, report)
        self.target.remove(JOB_FILE)
        self.target.remove(JOURNAL)
        self.target.tidy()
        return report


def _to_work_on(rows: Sequence[Row]) -> list[Record]:
    return [row.item for row in rows if isinstance(row.item, Record) and not row.written]


def _crashed(record: Record) -> Problem:
    return problem(record.where, record.key, "decoder_crashed")


def print_report(report: dict[str, Any], dst: str, hints: dict[str, str]) -> None:
    """Counts by reason, the most frequent first, each with what to do."""
    splits = ", ".join(f"{name} {count}" for name, count in sorted(report["splits"].items()))
    say(f"{report['read']} read = {report['kept']} kept ({splits}) + {report['dropped']} dropped | {dst}")
    for reason, count in sorted(report["reasons"].items(), key=lambda item: -item[1]):
        say(f"  {count} x {reason}: {hints.get(reason, 'see ' + DROPPED_FILE)}")
    for name, count in sorted(report["counts"].items()):
        say(f"  {count} kept with {name}")


def say(text: str) -> None:
    """One line an event, beside the progress bar."""
    print(text, file=sys.stderr, flush=True)
