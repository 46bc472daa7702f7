"""Work spread over processes, results in order, memory bounded; a decoder that crashes costs one record."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol

from common.machine.cpus import available_cpus

Work = Callable[[Sequence[Any]], list[Any]]


class Cluster(Protocol):
    """Machines that work together: data_tools.engine."""

    def ordered_map(
        self, work: Work, batches: Iterable[tuple[Any, Sequence[Any]]], crashed: Callable[[Any], Any]
    ) -> Iterator[tuple[Any, list[Any]]]:
        """As the function of this name."""
        ...


Workers = int | Cluster
"""Processes of this machine, or a cluster."""
BATCH = 16  # records a batch: 200 kB of images; its hand-over to a process is under a tenth of the work
# The same on a cluster, whose tasks cost more each: Ray took 18 % more processor time than processes at 16, 2 % at 64.
CLUSTER_BATCH = 64
AHEAD = 3  # batches a worker that are read ahead: enough to keep it busy, few enough to hold in memory


def batch_size(workers: Workers) -> int:
    """Records a batch."""
    return BATCH if isinstance(workers, int) else CLUSTER_BATCH


def cpu_count() -> int:
    """Processors this process may use."""
    return available_cpus()


def ordered_map(
    work: Work,
    batches: Iterable[tuple[Any, Sequence[Any]]],
    workers: Workers,
    crashed: Callable[[Any], Any],
) -> Iterator[tuple[Any, list[Any]]]:
    """(tag, work(batch)) for each (tag, batch), in order; an empty batch costs nothing.

    `workers` 0 works in this process. Where a worker process dies, the batch is tried again one element at a time and
    the element that kills its process becomes `crashed(element)`.
    """
    if not isinstance(workers, int):
        yield from workers.ordered_map(work, batches, crashed)
        return
    if workers == 0:
        for tag, batch in batches:
            yield tag, work(batch) if batch else []
        return
    pending: deque[tuple[Any, Sequence[Any], Future | None]] = deque()
    source, pool = iter(batches), _pool(workers)
    try:
        exhausted = False
        while pending or not exhausted:
            while not exhausted and len(pending) < AHEAD * workers:
                tag, batch = next(source, (None, None))
                exhausted = batch is None
                if not exhausted:
                    pending.append((tag, batch, _submit(pool, work, batch)))
            if not pending:
                break
            tag, batch, future = pending.popleft()
            try:
                result = future.result() if future else []
            except BrokenProcessPool:
                result = _one_by_one(work, batch, crashed)
                pool.shutdown(wait=False)
                pool = _pool(workers)
                pending = deque((t, b, _submit(pool, work, b)) for t, b, _ in pending)
            yield tag, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, work: Work, batch: Sequence[Any]) -> Future | None:
    """None for an empty batch. A worker may die before the next batch is handed over: its future says so."""
    if not batch:
        return None
    try:
        return pool.submit(work, batch)
    except BrokenProcessPool as error:
        future: Future = Future()
        future.set_exception(error)
        return future


def _one_by_one(work: Work, batch: Sequence[Any], crashed: Callable[[Any], Any]) -> list[Any]:
    results = []
    pool = _pool(1)
    for element in batch:
        try:
            results += pool.submit(work, [element]).result()
        except BrokenProcessPool:
            results.append(crashed(element))
            pool.shutdown(wait=False)
            pool = _pool(1)
    pool.shutdown()
    return results


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a fork of a process with threads may deadlock
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever: end with it. Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
