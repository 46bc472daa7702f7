"""What all makers of shards share: a source in, shards out, every other row with its reason, and a journal.

Rows are read in order, worked on in processes, decided here in the same order and written. A run that was killed is
continued by the same command and ends in the same bytes: `.journal/` holds which row each whole shard ends at.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from common.console.progress import progress
from data_tools.ingest.records import Problem, Record, problem
from data_tools.parallel import Work, Workers, batch_size, ordered_map
from data_tools.readers.base import Meter, Part
from data_tools.readers.detect import Source
from data_tools.shards.image_shards import DATASET_FILE, ShardWriter
from data_tools.shards.targets import DROPPED_FILE, JOB_FILE, JOURNAL, REPORT_FILE, Journal, Target

EXAMPLES = 3  # places that are named of each reason
EARLIER_OPTIONS = {"picture": "image", "pictures": "images"}  # as the jobs of folders made before name them


class Row(NamedTuple):
    """A row on its way. `known`: an interrupted run decided it; `written`: and its shard is whole."""

    number: int
    split: str
    item: Record | Problem
    known: bool = False
    written: bool = False

    @property
    def needs_work(self) -> bool:
        return isinstance(self.item, Record) and not self.written


class ShardRun:
    """One job. `job` is what decides the result, JSON-ready; `sizes`: samples and bytes of a shard at most.

    What the work makes of a record is written as it is, unless a subclass fills the hooks.
    """

    remedy = "choose an empty folder"  # for a folder that holds other shards

    def __init__(
        self,
        source: Source,
        target: Target,
        dst: str,
        job: dict[str, Any],
        sizes: tuple[int, int],
        workers: Workers,
    ) -> None:
        self.source, self.target, self.dst, self.job = source, target, dst, job
        self.sizes, self.workers = sizes, workers
        self.parts = tuple(part for part in source.parts if part.has_images)
        self.meter = Meter(total=source.num_bytes)
        self.kept: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.writers: dict[str, ShardWriter] = {}

    # ---------------------------------------------------------------------------------------------------- the hooks

    def decide(self, row: Row, result: Any) -> Record | Problem:
        """With the result of the work on the row's record: the record to write, or why not."""
        return result

    def remember(self, record: Record) -> None:
        """Called instead of `decide` for a record that an interrupted run has kept and written."""

    def describe(self, record: Record) -> Sequence[str]:
        """What of a kept record is counted in the report."""
        return ()

    def split_of(self, part: Part, record: Record) -> tuple[str, Record | Problem]:
        """Where a record belongs, and the record, or why it belongs nowhere."""
        return part.split, record

    def may_delete(self) -> bool:
        """Whether shards of another job may go."""
        return False

    def more(self) -> dict[str, Any]:
        """What else the report says."""
        return {}

    # ------------------------------------------------------------------------------------------------------ the run

    def report(self, work: Work) -> dict[str, Any]:
        """Do what is left to do, `work` in processes; a finished job is recognised and left alone.

        Returns the content of report.json. Raises ValueError for what the user has to change.
        """
        done, begun = self.target.read_json(REPORT_FILE), self.target.read_json(JOB_FILE)
        if begun is None and done and same_job(done.get("job"), self.job):
            self.target.remove(JOURNAL)
            say(f"{self.dst} is complete already, nothing to do")
            return done
        if not same_job(begun, self.job):
            self._start_afresh()
        self.journal = Journal(self.target)
        if self.journal.count:
            say(f"continuing after {self.journal.count} whole shards, row {self.journal.last_row}")
        for split in self.journal.shards:
            self._writer(split)
        try:
            self._convert(work)
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise
        return self._finish()

    def _start_afresh(self) -> None:
        """Make the folder empty of shards, where there are any and they may go, and begin a journal."""
        shards = [name for name in self.target.names() if is_shard(name) or name == DATASET_FILE]
        if shards and not self.may_delete():
            raise ValueError(
                f"{self.dst} holds {shards[0]} of another source or of other options: {self.remedy}"
            )
        for name in (JOB_FILE, REPORT_FILE, DROPPED_FILE, *shards, *self.target.journal_names()):
            self.target.remove(name)
        self.target.write_json(JOB_FILE, self.job)

    def _rows(self) -> Iterator[Row]:
        """Every row of the source, and what the journal knows of it."""
        finished = {split: sum(shards.values()) for split, shards in self.journal.shards.items()}
        number, seen = 0, Counter()
        for part in self.parts:
            for item in self.source.read(part, self.meter):
                number += 1
                split = part.split
                if isinstance(item, Record):
                    split, item = self.split_of(part, item)
                if isinstance(item, Problem) or number > self.journal.last_row:
                    yield Row(number, split, item)
                elif number in self.journal.lost:
                    yield Row(number, split, self.journal.lost[number], known=True)
                else:
                    seen[split] += 1
                    written = seen[split] <= finished.get(split, 0)
                    yield Row(number, split, item, known=True, written=written)

    def _batches(self) -> Iterator[tuple[list[Row], list[Record]]]:
        size = batch_size(self.workers)
        rows: list[Row] = []
        records: list[Record] = []
        for row in self._rows():
            rows.append(row)
            if row.needs_work:
                records.append(row.item)
            if len(records) == size or len(rows) == 4 * size:
                yield rows, records
                rows, records = [], []
        if rows:
            yield rows, records

    def _convert(self, work: Work) -> None:
        path = self.target.staging / f".{DROPPED_FILE}.tmp"
        with (
            path.open("w", encoding="utf-8") as dropped,
            progress(unit="B", unit_scale=True) as bar,
        ):
            for rows, results in ordered_map(work, self._batches(), self.workers, crashed):
                ready = iter(results)
                for row in rows:
                    item = self._consume(row, next(ready) if row.needs_work else None)
                    if isinstance(item, Problem):
                        dropped.write(json.dumps(item.to_json(), ensure_ascii=False, sort_keys=True) + "\n")
                bar.total = self.meter.total
                bar.set_postfix(
                    kept=sum(self.kept.values()), dropped=sum(self.reasons.values()), refresh=False
                )
                bar.update(self.meter.done - bar.n)
        os.replace(path, self.target.staging / DROPPED_FILE)

    def _consume(self, row: Row, result: Any) -> Record | Problem:
        """Decide one row and write it if it is kept; returns the record or the reason."""
        item = row.item
        if row.needs_work:
            item = result if isinstance(result, Problem) else self.decide(row, result)
            if isinstance(item, Problem):
                self.journal.lose(row.number, item)
        if isinstance(item, Problem):
            self.reasons[item.reason] += 1
            named = self.examples.setdefault(item.reason, [])
            named += [item.where] if len(named) < EXAMPLES else []
            return item
        self.kept[row.split] += 1
        if row.written:
            self.remember(item)
            return item
        if not row.known:
            self.journal.counts.update(self.describe(item))
        writer = self._writer(row.split)
        if path := writer.write(item):
            samples = writer.shards[path.name]
            self.target.put(path)
            self.journal.finish(row.split, path.name, samples, row.number)
            if not sys.stderr.isatty():  # where no bar is drawn
                share = f" ({self.meter.done / self.meter.total:.0%})" if self.meter.total else ""
                say(f"{path.name} | row {row.number}{share} | {sum(self.reasons.values())} dropped")
        return item

    def _writer(self, split: str) -> ShardWriter:
        if split not in self.writers:
            shards = self.journal.shards.get(split, {})
            self.writers[split] = ShardWriter(self.target.staging, split, *self.sizes, shards=shards)
        return self.writers[split]

    def _finish(self) -> dict[str, Any]:
        """The last, shorter shards, then the files about them; the journal goes last, so a kill repeats this."""
        for writer in self.writers.values():
            if path := writer.close():
                self.target.put(path)
        self.target.put(self.target.staging / DROPPED_FILE)
        kept, dropped = sum(self.kept.values()), sum(self.reasons.values())
        report = {
            "read": kept + dropped,
            "kept": kept,
            "dropped": dropped,
            "reasons": dict(self.reasons),
            "examples": self.examples,
            "splits": dict(self.kept),
            **self.more(),
            "job": self.job,
        }
        if kept:
            self.target.put(self.target.staging / DATASET_FILE)
        self.target.write_json(REPORT_FILE, report)
        self.target.remove(JOB_FILE)
        self.target.remove(JOURNAL)
        self.target.tidy()
        return report


def same_job(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether a folder was made, or begun, by this job; its options may stand there under their earlier names."""
    if before and "options" in before:
        options = {EARLIER_OPTIONS.get(name, name): value for name, value in before["options"].items()}
        before = before | {"options": options}
    return before == now


def reason_lines(report: dict[str, Any], hints: Mapping[str, str]) -> list[str]:
    """The reasons of a report, the most frequent first, each with what to do and the first places."""
    lines = []
    for reason, count in sorted(report["reasons"].items(), key=lambda item: -item[1]):
        named = report.get("examples", {}).get(reason, [])
        examples = ", ".join(named) + (" ..." if count > len(named) else "")
        lines.append(f"  {count} x {reason}: {hints.get(reason, 'see ' + DROPPED_FILE)} [{examples}]")
    lines += [f"  {count} kept with {name}" for name, count in sorted(report.get("counts", {}).items())]
    return lines


def is_shard(name: str) -> bool:
    """A tar as the shard writer names them: {split}-{number of five digits or more}.tar."""
    stem, _, number = name.removesuffix(".tar").rpartition("-")
    return (
        name.endswith(".tar")
        and not name.startswith(".")
        and bool(stem)
        and len(number) >= 5
        and number.isdigit()
    )


def crashed(record: Record) -> Problem:
    """What becomes of a record whose image ends its worker process."""
    return problem(record.where, record.key, "decoder_crashed")


def announce(source: Source) -> None:
    """Say what a source was recognised as, by which file, and what lies beside it."""
    for line in source.describe():
        say(line)


def say(text: str) -> None:
    """One line an event, beside the progress bar."""
    print(text, file=sys.stderr, flush=True)
