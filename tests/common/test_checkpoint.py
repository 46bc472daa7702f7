"""Checkpoint directories: strict, whole, and nothing in them is unpickled."""

import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import command_env
from torch import nn

from common import checkpoint
from common.checkpoint import write_model, write_training_state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2, bias=False)


def written(directory: Path, weights: dict | None = None, **extra) -> Path:
    directory.mkdir(parents=True)
    write_model(directory, "toy", {"dim": 3}, weights or Net().state_dict(), 7, **extra)
    return directory


def test_a_model_comes_back(tmp_path):
    net, other = Net(), Net()
    directory = written(tmp_path / "c", net.state_dict(), tokenizer="abc")
    config = checkpoint.read_config(directory, "toy")
    assert (config["model"], config["step"], config["tokenizer"]) == ({"dim": 3}, 7, "abc")
    checkpoint.load_weights(other, directory)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_others_may_read_weights_as_any_new_file(tmp_path):
    directory = written(tmp_path / "c")
    modes = {(directory / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_half_precision_is_widened(tmp_path):
    weights = {n: t.bfloat16() for n, t in Net().state_dict().items()}
    read = checkpoint.read_weights(written(tmp_path / "c", weights))
    assert {t.dtype for t in read.values()} == {torch.float32}
    assert torch.equal(read["a.weight"], weights["a.weight"].float())


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = Net().state_dict()
    missing = {n: t for n, t in state.items() if n != "b.weight"}
    for name, weights, message in (
        ("missing", missing, "lacks b.weight"),
        ("extra", state | {"c": torch.zeros(1)}, "has the unknown c"),
        ("both", missing | {"c": torch.zeros(1)}, "lacks b.weight and has the unknown c"),
        (
            "shape",
            state | {"a.weight": torch.zeros(4, 5)},
            r"a.weight has shape \(4, 5\), the config asks for \(4, 3\)",
        ),
    ):
        directory = written(tmp_path / name, weights)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_weights(Net(), directory)


def test_another_kind_or_format_is_named(tmp_path):
    directory = written(tmp_path / "c")
    with pytest.raises(ValueError, match="holds a checkpoint of kind 'toy', not 'generator'"):
        checkpoint.read_config(directory, "generator")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        checkpoint.read_config(tmp_path, "toy")
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="has format 9; this version reads 1"):
        checkpoint.read_config(directory, "toy")
    for model in ("", '"model": null, ', '"model": [], '):
        path.write_text(f'{{"format": 1, {model}"kind": "toy"}}')
        with pytest.raises(ValueError, match=r"config\.json does not say what the model is"):
            checkpoint.read_config(directory, "toy")
    path.write_text("[]")
    with pytest.raises(ValueError, match="of kind None"):
        checkpoint.read_config(directory, "toy")


def test_damaged_weights_are_named(tmp_path):
    directory = written(tmp_path / "c")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        checkpoint.load_weights(Net(), directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        checkpoint.load_weights(Net(), directory)


def save_steps(run_dir: Path, *steps: int) -> None:
    for step in steps:
        with checkpoint.new_step_directory(run_dir, step) as directory:
            write_model(directory, "toy", {}, {"w": torch.tensor(float(step))}, step)


def kept(run_dir: Path) -> list[str]:
    return [d.name for d in checkpoint.step_directories(run_dir)]


def test_latest_moves_last_and_old_ones_go(tmp_path):
    save_steps(tmp_path, 2, 10, 300)
    assert kept(tmp_path) == ["step_00000002", "step_00000010", "step_00000300"]
    assert (tmp_path / "latest").resolve().name == "step_00000300"
    with pytest.raises(RuntimeError), checkpoint.new_step_directory(tmp_path, 400) as directory:
        write_model(directory, "toy", {}, {"w": torch.zeros(1)}, 400)
        raise RuntimeError
    assert (tmp_path / "latest").resolve().name == "step_00000300"
    checkpoint.prune(tmp_path, keep_last=0)
    assert len(kept(tmp_path)) == 3
    checkpoint.prune(tmp_path, keep_last=1, keep=(checkpoint.step_directory(tmp_path, 2),))
    assert kept(tmp_path) == ["step_00000002", "step_00000300"]


def test_a_copied_run_whose_link_became_a_directory_goes_on(tmp_path):
    save_steps(tmp_path / "run", 1)
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (copied / "latest").is_symlink()
    save_steps(copied, 2)
    assert (copied / "latest").resolve().name == "step_00000002"


def test_a_directory_half_deleted_or_half_written_is_no_checkpoint(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / ".step_00000000.tmp").mkdir()  # a kill in the middle of prune or save
    (tmp_path / ".step_00000000.tmp" / "config.json").write_text("{}")
    (tmp_path / ".latest.77").symlink_to("step_00000000")
    (tmp_path / ".metrics.jsonl.77.tmp").write_text("half")
    (tmp_path / "step_00000009").mkdir()
    assert kept(tmp_path) == ["step_00000001"]
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000009"]


def test_names_resolve_to_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps(Path("runs/a"), 1, 2)
    assert checkpoint.resolve("runs/a/step_00000001") == Path("runs/a/step_00000001")
    assert checkpoint.resolve("runs/a").name == "step_00000002"
    with pytest.raises(FileNotFoundError, match="no checkpoint directory nothing"):
        checkpoint.resolve("nothing")
    with pytest.raises(FileNotFoundError, match=r"\./runs/b"):
        checkpoint.resolve("./runs/b")
    with pytest.raises(FileNotFoundError, match="runs is no checkpoint directory: it holds no config"):
        checkpoint.resolve("runs")


def test_the_newest_run_of_a_kind_is_found(tmp_path):
    assert checkpoint.newest_run("toy", tmp_path) is None
    save_steps(tmp_path / "a", 5)
    time.sleep(0.02)
    save_steps(tmp_path / "b", 1)
    assert checkpoint.newest_run("toy", tmp_path) == (tmp_path / "b" / "step_00000001").resolve()
    assert checkpoint.newest_run("generator", tmp_path) is None


def test_training_state_comes_back(tmp_path):
    state = {
        "step": 3,
        "best": {},
        "task": {"moments": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.randn(5)}}},
    }
    write_training_state(tmp_path, state)
    read = checkpoint.read_training_state(tmp_path)
    assert read["step"] == 3 and torch.equal(
        read["task"]["moments"]["w"]["exp_avg"], state["task"]["moments"]["w"]["exp_avg"]
    )
    with pytest.raises(FileNotFoundError, match="it can be used, but not trained on"):
        checkpoint.read_training_state(tmp_path / "training_state")


def test_a_damaged_or_foreign_training_state_is_refused(tmp_path):
    write_training_state(tmp_path, {"w": torch.zeros(1000)})
    path = tmp_path / "training_state" / "state.pt"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"state\.pt is damaged: delete"):
        checkpoint.read_training_state(tmp_path)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    torch.save({"w": Evil()}, path)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_training_state(tmp_path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read_training_state(tmp_path)
    assert not marker.exists(), "nothing in the file was run"


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from common import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a write beyond fails as on a full disk
run_dir, large = Path(sys.argv[1]), {"w": torch.zeros(100_000)}
for write in (
    lambda d: checkpoint.write_model(d, "toy", {}, large, 2),
    lambda d: checkpoint.write_training_state(d, large),
):
    try:
        with checkpoint.new_step_directory(run_dir, 2) as directory:
            write(directory)
    except OSError as error:
        print(error.strerror)
"""


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path):
    save_steps(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env=command_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("disk full while writing") == 2, done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert torch.equal(checkpoint.read_weights(checkpoint.resolve(tmp_path))["w"], torch.tensor(1.0))


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path):
    checkpoint.ensure_space(tmp_path, {"w": torch.zeros(10)})
    huge = torch.empty(2**50, device="meta")  # 4 PiB
    with pytest.raises(
        OSError, match=r"needs 4294967296.0 MiB and [\d.]+ MiB are free: the previous one is whole"
    ):
        checkpoint.ensure_space(tmp_path, {"task": {"moments": [huge]}})
