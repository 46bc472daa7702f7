"""train_vqgan.py under torchrun and deepspeed: two processes train what one trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_vqgan
from common.checkpoint import read_weights

ROOT = Path(train_vqgan.__file__).parent


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29653"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "quantizer"), [("torchrun", "vq"), ("torchrun", "ema"), ("deepspeed", "vq")]
)
def test_two_processes_follow_one(tmp_path, shards, small_flags, launcher, quantizer):
    flags = ["--data", str(shards), *small_flags, "--model.quantizer", quantizer, "--loop.num-steps", "4"]
    flags += [
        "--loop.global-batch-size",
        "8",
        "--loop.log-every",
        "1",
        "--val-images",
        "8",
        "--num-workers",
        "0",
    ]
    flags += ["--device", "cpu", "--precision", "fp32", "--loop.tensorboard", "False", "--kmeans-step", "0"]
    flags += ["--revive-every", "0", "--preset", "vqgan", "--adversary.warmup-steps", "1"]
    flags += ["--adversary.discriminator.channels", "32", "--adversary.discriminator.layers", "1"]
    flags += ["--adversary.rollback-share", "0", "--adversary.adaptive", "False", "--multiscale", "1", "1.5"]
    train_vqgan.main([*flags, "--loop.run-dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
    command += [str(ROOT / "train_vqgan.py"), *flags, "--loop.run-dir", str(tmp_path / "two")]
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": paths}
    environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]

    def losses(name):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [row["rec_loss"] for row in rows if row["kind"] == "train"]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-3)
    one, two = (read_weights(tmp_path / name / "step_00000004") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=2e-2)
