"""The mean of generators: weights by hand, metrics as the trainer's, and what cannot be averaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_data import write_image_tokenizer, write_made

import train_dalle
from common.checkpoint import read_weights
from dalle.average import main, mean_weights
from dalle.release import main as release


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """tokens/ and three runs: first/, tuned/ that goes on from it, and wide/ of another size."""
    folder = write_made(tmp_path_factory.mktemp("made"))
    tokenizer = ("--image-tokenizer", str(folder / "tokenizer"), "--max-text-len", "24")
    sizes = ("--model.num-layers", "2", "--model.num-heads", "2")
    train(folder, "first", "--model.dim", "16", *sizes, *tokenizer)
    train(folder, "tuned", "--init", str(folder / "first"), "--model.dropout", "0.1")
    train(folder, "wide", "--model.dim", "32", *sizes, *tokenizer)
    return folder


def train(folder: Path, name: str, *more: str) -> None:
    flags = ["--data", str(folder / "tokens"), "--loop.run-dir", str(folder / name), "--loop.num-steps", "4"]
    flags += ["--loop.global-batch-size", "8", "--loop.tensorboard", "False", "--num-workers", "0"]
    flags += ["--device", "cpu", "--sample-images", "0", "--optim.warmup-steps", "1", "--optim.lr", "0.01"]
    train_dalle.main([*flags, *more])


def run(made: Path, target: Path, *sources: str, data: str = "tokens") -> dict[str, float]:
    places = [str(made / source) for source in sources]
    return main([*places, "--target", str(target), "--data", str(made / data), "--device", "cpu"])


def validation(run_dir: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "val"][-1]


def test_the_mean_is_the_mean_and_a_checkpoint_like_any_other(made, tmp_path, capsys):
    metrics = run(made, tmp_path / "mean", "first", "tuned")
    first, tuned, mean = (
        read_weights(p / "latest") for p in (made / "first", made / "tuned", tmp_path / "mean")
    )
    moved = 0.0
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (first[name] + tuned[name]) / 2)
        moved += float((tuned[name] - first[name]).abs().sum())
    assert moved > 0
    assert validation(tmp_path / "mean")["image_bits"] == metrics["image_bits"]
    assert not (tmp_path / "mean" / "latest" / "training_state").exists()
    release([str(tmp_path / "mean"), str(tmp_path / "released")])
    assert f"{metrics['image_bits']:.4g}" in (tmp_path / "released" / "README.md").read_text("utf-8")


def test_metrics_are_those_of_the_trainer(made, tmp_path):
    metrics = run(made, tmp_path / "mean", "first", "first")
    trained = validation(made / "first")
    for name in ("image_bits", "text_gain_bits"):
        assert metrics[name] == pytest.approx(trained[name], abs=2e-3)


def test_what_cannot_be_averaged(made, tmp_path, capsys):
    def refusal(*sources: str, data: str = "tokens", target: Path = tmp_path / "new") -> str:
        with pytest.raises(SystemExit) as stopped:
            run(made, target, *sources, data=data)
        assert stopped.value.code == 2 and not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "at least two" in refusal("first")
    assert "different sizes" in refusal("first", "wide")
    assert "exists already" in refusal("first", "tuned", target=made / "wide")
    assert "encode them first" in refusal("first", "tuned", data="images")
    other = made / "other"
    shutil.copytree(made / "first" / "latest", other)
    write_image_tokenizer(made / "other_tokenizer", seed=1)
    shutil.rmtree(other / "image_tokenizer")
    shutil.copytree(made / "other_tokenizer", other / "image_tokenizer")
    assert "other image codes" in refusal("first", "other")


def test_types_stay():
    models = [{"w": torch.tensor([1.0, 2.0], dtype=torch.float16)}, {"w": torch.tensor([2.0, 4.0])}]
    assert torch.equal(mean_weights(models)["w"], torch.tensor([1.5, 3.0], dtype=torch.float16))
