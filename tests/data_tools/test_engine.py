"""Ray against the local engine: the same bytes, also when a node dies; and one sentence where there is no Ray."""

import contextlib
import sys
from pathlib import Path

import crashing_work
import numpy as np
import pytest
from crashing_work import crash_on_three, slow_tens
from make_sources import write_t2i
from ray_nodes import alive, losing_a_node, needs_ray, two_nodes
from web import Server

from data_tools.clean import main as clean_main
from data_tools.dedup import main as dedup_main
from data_tools.download.fetch import FetchOptions
from data_tools.download.run import main as download_main
from data_tools.download.run import shared_limits
from data_tools.engine import EngineOptions, RayCluster, packages
from data_tools.images.phash import near_pairs
from data_tools.parallel import ordered_map
from data_tools.shard import main as shard_main
from data_tools.stats import main as stats_main


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestWithoutRay:
    def test_its_absence_is_one_sentence(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "ray", None)
        write_t2i(tmp_path / "src", 3)
        with pytest.raises(SystemExit) as stop:
            shard_main([str(tmp_path / "src"), str(tmp_path / "dst"), "--engine", "ray"])
        assert stop.value.code == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: --engine ray needs the package ray") and "requirements-ray.txt" in said

    def test_an_address_needs_the_engine(self):
        with pytest.raises(ValueError, match="needs --engine ray"):
            EngineOptions(ray_address="auto")

    def test_processes_are_counted_for_the_local_engine_alone(self):
        assert EngineOptions().workers(3) == 3 and EngineOptions().workers(-1) >= 1
        assert EngineOptions("ray", "auto").workers(-1) == RayCluster("auto")
        with pytest.raises(ValueError, match="leave it out"):
            EngineOptions("ray").workers(2)

    @pytest.mark.parametrize(("tasks", "at_once"), [(1, 1), (6, 6), (100, 8)])
    def test_the_limits_of_a_download_hold_for_all_tasks_together(self, tasks, at_once):
        share, found = shared_limits(FetchOptions(concurrency=128, per_host=8), tasks)
        assert found == at_once and share.per_host >= 1
        assert share.per_host * found <= 8 and share.concurrency * found <= 128

    def test_nodes_get_the_packages_and_no_tests(self):
        names = {Path(path).name for path in packages()}
        assert {"common", "data_tools", "vq", "dalle", "evaluation"} <= names and not names & {
            "tests",
            "docs",
        }


@pytest.fixture(scope="module")
def nodes():
    from data_tools.engine import import_ray

    with two_nodes() as cluster:
        import_ray().cloudpickle.register_pickle_by_value(crashing_work)  # nodes do not have the tests
        yield cluster


@needs_ray
@pytest.mark.slow
class TestRay:
    def test_results_in_order_and_a_crash_costs_one_element(self, nodes):
        batches = [
            (name, numbers) for name, numbers in zip("abcd", [[1, 2], [3, 4], [], [5, 6]], strict=True)
        ]
        cluster = RayCluster(nodes.address)
        results = list(ordered_map(crash_on_three, batches, cluster, lambda number: f"lost {number}"))
        assert results == [("a", [10, 20]), ("b", ["lost 3", 40]), ("c", []), ("d", [50, 60])]

    def test_what_the_work_raises_is_raised_here(self, nodes):
        with pytest.raises(TypeError, match=r"multiply|can't|unsupported"):
            list(ordered_map(slow_tens, [(0, [None])], RayCluster(nodes.address), str))

    def test_commands_give_the_bytes_of_the_local_engine(self, nodes, tmp_path, monkeypatch):
        write_t2i(tmp_path / "src", 40)
        for name, flags in (
            ("local", ["--workers", "0"]),
            ("ray", ["--engine", "ray", "--ray-address", nodes.address]),
        ):
            (tmp_path / name).mkdir()
            monkeypatch.chdir(tmp_path / name)  # the page names the folder that it is about
            with RayCluster(nodes.address).connected() if name == "ray" else contextlib.nullcontext():
                shard_main(["../src", "s", "--samples-per-shard", "16", "--size", "32", *flags])
                clean_main(["s", "c", "--samples-per-shard", "8", *flags])
                dedup_main(["c", "d", "--max-colour", "8", *flags])
                stats_main(["d", "--out", "p.html", *flags])
        found = tree(tmp_path / "ray")
        assert found == tree(tmp_path / "local")
        assert {name.partition("/")[0] for name in found} == {
            ".written.jsonl",
            "s",
            "c",
            "d",
            "p.html",
            "p.json",
        }

    def test_a_download_gives_the_bytes_of_the_local_engine(self, nodes, tmp_path):
        rows = [f"{{url}}/good/{i}" if i % 7 else "{url}/missing" for i in range(30)]
        with Server() as server:
            lines = ["url,caption", *(f"{row.format(url=server.url)},text {i}" for i, row in enumerate(rows))]
            (tmp_path / "list.csv").write_text("\n".join(lines) + "\n", "utf-8")
            for name, flags in (("local", []), ("ray", ["--engine", "ray", "--ray-address", nodes.address])):
                download_main([str(tmp_path / "list.csv"), str(tmp_path / name), "--samples-per-shard", "8",
                               "--allow-private", "--min-success", "0", *flags])  # fmt: skip
        assert tree(tmp_path / "ray") == tree(tmp_path / "local")

    def test_the_search_for_near_hashes_is_spread(self, nodes):
        """Below 200,000 images dedup searches in one process, so its tests do not come here."""
        hashes = np.unique(np.random.default_rng(0).integers(0, 2**64, 3000, np.uint64) // 2**20 * 2**20)
        hashes = np.unique(np.concatenate([hashes, hashes[::7] ^ np.uint64(5)]))
        alone, spread = (list(near_pairs(hashes, 4, workers)) for workers in (0, RayCluster(nodes.address)))
        assert len(alone) == len(spread) > 0
        for one, other in zip(alone, spread, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    def test_a_node_dies_in_the_middle_and_nothing_is_missing(self, nodes, tmp_path):
        write_t2i(tmp_path / "src", 200)
        options = [str(tmp_path / "src"), "--samples-per-shard", "16", "--size", "32"]
        shard_main([options[0], str(tmp_path / "local"), *options[1:], "--workers", "0"])
        with RayCluster(nodes.address).connected():
            import ray

            before = alive(ray)
            with losing_a_node(nodes, (tmp_path / "ray" / "train-00000.tar").exists):
                shard_main([options[0], str(tmp_path / "ray"), *options[1:], "--engine", "ray",
                            "--ray-address", nodes.address])  # fmt: skip
            assert alive(ray) == before  # one died, one came
            assert sum(not node["Alive"] for node in ray.nodes()) == 1
        assert tree(tmp_path / "ray") == tree(tmp_path / "local")

    def test_a_node_dies_before_its_results_were_fetched(self, nodes):
        batches, taken = [(i, [i, i + 0.5]) for i in range(30)], []

        def counted():
            for batch in batches:
                taken.append(batch)
                yield batch

        with losing_a_node(nodes, lambda: len(taken) > 8):
            found = list(ordered_map(slow_tens, counted(), RayCluster(nodes.address), str))
        assert found == [(i, [10 * i, 10 * i + 5]) for i in range(30)]
