"""A real Ray cluster on one machine: a head that does no work and two nodes of one processor, which tests may kill."""

import contextlib
import importlib.util
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is an optional package: requirements-ray.txt"
)
MEMORY = 100 * 2**20  # of a node's object store


def node_options() -> dict[str, int]:
    """A small object store, and ports of its own: Ray waits only 15 seconds for an agent that chooses them."""
    names = (
        "metrics_agent_port",
        "runtime_env_agent_port",
        "dashboard_agent_listen_port",
        "metrics_export_port",
    )
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return {"object_store_memory": MEMORY, **dict(zip(names, ports, strict=True))}


@contextlib.contextmanager
def two_nodes() -> Iterator[Any]:
    """The `ray.cluster_utils.Cluster`; its address is `cluster.address`."""
    from ray.cluster_utils import Cluster

    from data_tools.engine import import_ray

    ray = import_ray()
    with contextlib.ExitStack() as stack:
        head = {"num_cpus": 0, "include_dashboard": False, **node_options()}
        head["_system_config"] = {"worker_niceness": 0}  # else the tests wait for whatever else runs
        cluster = Cluster(
            initialize_head=True, head_node_args=head
        )  # nodes take the system's settings from it
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        for _ in range(2):
            cluster.add_node(num_cpus=1, **node_options())
        cluster.wait_for_nodes()
        yield cluster


@contextlib.contextmanager
def losing_a_node(cluster: Any, when: Callable[[], bool]) -> Iterator[None]:
    """While the body works, kills a node as soon as `when()` is true; afterwards a new one takes its place.

    Fails where the body ended before the node was killed: then nothing was tested.
    """
    ended, killed = threading.Event(), threading.Event()

    def run() -> None:
        while not when():
            if ended.wait(0.01):
                return
        if not ended.is_set():
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            killed.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert killed.is_set(), "the work ended before the node was killed"
    cluster.add_node(num_cpus=1, **node_options())
    cluster.wait_for_nodes()


def alive(ray: Any) -> int:
    """Nodes that live, the head included; a death is known a moment after it."""
    time.sleep(0.1)
    return sum(node["Alive"] for node in ray.nodes())
