"""Where the work of a command runs: in processes of this machine, or as tasks of a Ray cluster, with the same results.

Ray is an optional package (requirements-ray.txt), imported where it is used. The command itself reads the source,
decides and writes, whichever engine works for it: nodes of the cluster need no common file system, a node that dies
costs the tasks that ran on it, and a command that dies goes on as it does with processes.
"""

import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from common.console.terminal import first_line
from common.log import say
from data_tools.parallel import AHEAD, Work, Workers, cpu_count

RETRIES = 3  # of a task whose process or node died; a record that ends its process does so every time
_LOOK_AFTER_S = 30.0  # without a result, whether any node is left
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class EngineOptions:
    """Where the work is done; does not change the result."""

    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: tasks of a Ray cluster (pip install -r requirements-ray.txt)."""
    ray_address: str = ""
    """Cluster for --engine ray: host:port, ray://host:port or auto; empty: one that is started here and ends with the
    command."""

    def __post_init__(self) -> None:
        if self.ray_address and self.engine != "ray":
            raise ValueError(f"--ray-address {self.ray_address} needs --engine ray")

    @property
    def cluster(self) -> "RayCluster | None":
        """None for the local engine."""
        return RayCluster(self.ray_address) if self.engine == "ray" else None

    def workers(self, count: int) -> Workers:
        """What `ordered_map` works with. `count`: processes of the local engine, -1: one a processor.

        Raises ValueError for a number of processes where the cluster has its own.
        """
        if self.engine == "local":
            return cpu_count() if count < 0 else count
        if count >= 0:
            raise ValueError(
                "--workers counts processes of --engine local: a Ray cluster brings its own, leave it out"
            )
        return RayCluster(self.ray_address)


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster by its address ("": started here), and what one task of the work needs of it."""

    address: str = ""
    num_gpus: float = 0.0
    """GPUs of a task."""
    ahead: int = AHEAD
    """Batches a processor (a GPU where tasks need one) that are under way: bounds the memory."""

    def ordered_map(
        self, work: Work, batches: Iterable[tuple[Any, Sequence[Any]]], crashed: Callable[[Any], Any]
    ) -> Iterator[tuple[Any, list[Any]]]:
        """`data_tools.parallel.ordered_map` on the cluster.

        A batch whose process or node dies is tried again elsewhere; after RETRIES its elements are tried one by one,
        and one that ends its process each time becomes `crashed(element)`.
        """
        with self.tasks(work) as tasks:
            pending: deque[tuple[Any, Sequence[Any], Any]] = deque()
            source, exhausted = iter(batches), False
            while pending or not exhausted:
                while not exhausted and len(pending) < tasks.most_under_way():
                    tag, batch = next(source, (None, None))
                    exhausted = batch is None
                    if not exhausted:
                        pending.append((tag, batch, tasks.submit(batch) if batch else None))
                if not pending:
                    break
                tag, batch, task = pending.popleft()
                yield tag, tasks.result(task, batch, crashed) if batch else []

    @contextmanager
    def tasks(self, work: Work) -> Iterator["Tasks"]:
        """Tasks that do `work`. Raises ValueError without Ray or without the cluster."""
        with self.connected():
            yield Tasks(self, work)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """One connection for several rounds of tasks."""
        ray = import_ray()
        if ray.is_initialized():
            yield
            return
        try:
            if self.address:  # other machines get the code of this one
                ray.init(self.address, runtime_env={"py_modules": packages()}, logging_level="warning")
            else:  # processes read it where it lies; Ray gives its own a niceness of 15, those of a pool have none
                own = {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}
                ray.init("local", logging_level="warning", **own)
        except Exception as error:  # Ray raises that very class where its processes do not start
            ray.shutdown()
            raise ValueError(
                f"no Ray cluster at {self.address or 'this machine'}: {first_line(error)}"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()

    def with_gpus(self, device: str) -> Self:
        """For work on `device`: auto takes a GPU a task where the cluster has any. To be asked while connected."""
        found = import_ray().cluster_resources().get("GPU", 0) > 0
        return replace(self, num_gpus=float(device.startswith("cuda") or (device == "auto" and found)))


class Tasks:
    """One kind of work on a cluster that is connected."""

    def __init__(self, cluster: RayCluster, work: Work) -> None:
        self._ray, self.cluster = import_ray(), cluster
        self._key, self._work = uuid.uuid4().hex, self._ray.put(work)
        options = {"num_cpus": 1, "num_gpus": cluster.num_gpus, "max_retries": RETRIES}
        self._call = self._ray.remote(**options)(_call)
        self._slots, self._looked = 0, 0.0

    def submit(self, batch: Sequence[Any]) -> Any:
        """A reference to `work(batch)`, which is under way; asyncio code may await it."""
        return self._call.remote(self._key, [self._work], batch)

    def slots(self) -> int:
        """Tasks that the cluster runs at a time, as it is now; at least 1."""
        if not self._slots or time.monotonic() - self._looked > 1:
            resources = self._ray.cluster_resources()
            self._slots = int(
                resources.get("GPU", 0) / self.cluster.num_gpus
                if self.cluster.num_gpus
                else resources.get("CPU", 0)
            )
            self._looked = time.monotonic()
        return max(1, self._slots)

    def most_under_way(self) -> int:
        return self.cluster.ahead * self.slots()

    def result(self, task: Any, batch: Sequence[Any], crashed: Callable[[Any], Any]) -> list[Any]:
        """What a task of `submit` returned, by trying its elements singly where it was lost."""
        try:
            return self._get(task)
        except _lost(self._ray):
            return [self._one(element, crashed) for element in batch]

    def _one(self, element: Any, crashed: Callable[[Any], Any]) -> Any:
        try:
            return self._get(self.submit([element]))[0]
        except self._ray.exceptions.WorkerCrashedError:
            return crashed(element)
        except _lost(self._ray) as error:
            raise OSError(f"the Ray cluster lost a task {RETRIES + 1} times: {first_line(error)}") from error

    def _get(self, task: Any) -> list[Any]:
        """Raises what the work raised."""
        said = False
        while not self._ray.wait([task], timeout=_LOOK_AFTER_S)[0]:
            if not said and not self._ray.cluster_resources().get("GPU" if self.cluster.num_gpus else "CPU"):
                said = True
                say("no node of the Ray cluster can do the work: waiting for one that joins")
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None


def import_ray() -> Any:
    """The package. Raises ValueError saying what to install."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: nothing is reported to anybody
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            "--engine ray needs the package ray, which is not installed: pip install -r requirements-ray.txt"
        ) from error
    return ray


def packages() -> list[str]:
    """Folders of the project's packages, for the nodes of a cluster."""
    found = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
    return [str(path) for path in found if path.name not in ("tests", "benchmarks")]


def _lost(ray: Any) -> tuple[type[BaseException], ...]:
    """What a task ends with whose process or node, or the node that held its result, died too often."""
    errors = ray.exceptions
    return (errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError, errors.OutOfMemoryError)


_works: dict[str, Work] = {}  # of this process, the last one: what it has loaded stays for the next task


def _call(key: str, held: list[Any], batch: Sequence[Any]) -> list[Any]:
    """Runs on a node."""
    if key not in _works:
        _works.clear()
        _works[key] = import_ray().get(held[0])
    return _works[key](batch)
