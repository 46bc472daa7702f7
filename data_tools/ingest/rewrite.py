"""The engine of clean and dedup: a source in, a part of its records out as shards, every other row with its reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.ingest.records import HINTS, Problem, Record
from data_tools.ingest.shard_run import Row, ShardRun, reason_lines, say
from data_tools.parallel import Work, Workers
from data_tools.readers.detect import Source
from data_tools.shards.targets import open_target


@dataclass(frozen=True)
class Steps:
    """What is done with each record; the three see records in the order of the source."""

    work: Work
    """In worker processes: records to results of any picklable kind. Must not depend on other records."""
    decide: Callable[[int, Record, Any], Record | Problem]
    """Here, with the number of the row (from 1) and the result of `work`: the record to write, or why not."""
    remember: Callable[[Record], None]
    """Called instead of the two for a record that an interrupted run has kept and written."""


def rewrite(
    source: Source,
    dst: str,
    job: dict[str, Any],
    steps: Steps,
    samples_per_shard: int,
    workers: Workers,
    describe: Callable[[Record], Sequence[str]] = lambda record: (),
) -> dict[str, Any]:
    """Run, or continue, one job; returns the content of report.json.

    `job` is what decides the result, JSON-ready: another job in `dst` is refused. `describe` names what of a kept
    record is counted in the report. Raises ValueError for what the user has to change.
    """
    target = open_target(dst)
    try:
        target.lock()
        run = _Rewriting(
            source, target, dst, job, (samples_per_shard, 0), workers, steps=steps, describe=describe
        )
        return run.report(steps.work)
    finally:
        target.close()


class _Rewriting(ShardRun):
    def __init__(self, *run: Any, steps: Steps, describe: Callable[[Record], Sequence[str]]) -> None:
        super().__init__(*run)
        self.steps, self.describe, self.remember = steps, describe, steps.remember

    def decide(self, row: Row, result: Any) -> Record | Problem:
        return self.steps.decide(row.number, row.item, result)

    def more(self) -> dict[str, Any]:
        return {"counts": dict(self.journal.counts)}


def require_kept(report: dict[str, Any], src: str, dst: str) -> None:
    """Raises ValueError where nothing of `src` was kept."""
    if not report["kept"]:
        raise ValueError(f"no row of {src} was kept; the reasons are above and in {dst}/dropped.jsonl")


def print_report(report: dict[str, Any], dst: str, hints: dict[str, str]) -> None:
    """Counts by reason, the most frequent first, each with what to do."""
    splits = ", ".join(f"{name} {count}" for name, count in sorted(report["splits"].items()))
    say(f"{report['read']} read = {report['kept']} kept ({splits}) + {report['dropped']} dropped | {dst}")
    for line in reason_lines(report, {**HINTS, **hints}):
        say(line)
