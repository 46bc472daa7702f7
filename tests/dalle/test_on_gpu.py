"""What only a GPU can show: `make test-gpu` on a machine that has one."""

import threading

import pytest
import torch
from small_checkpoint import CAPTIONS
from tiny_data import write_made

import generate
import train_dalle
from dalle.engines import FastOptions
from dalle.pipeline import TextToImage

pytestmark = pytest.mark.gpu


def test_generate_draws_the_same_bytes_twice(generator_dir, tmp_path):
    for name in ("a", "b"):
        generate.main(
            [CAPTIONS[0], "3", str(tmp_path / name), "--checkpoint", str(generator_dir), "--device", "cuda"]
        )
    files = [sorted((tmp_path / name).glob("0*.png")) for name in ("a", "b")]
    assert len(files[0]) == 3
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]]


def test_graphs_draw_as_plain_steps_do(generator_dir):
    """In float32 nearly every code is the same, and the likelihoods are those of one pass."""
    drawn = {}
    for engine in ("torch", "cuda_graph"):
        pipeline = TextToImage.from_pretrained(generator_dir, "cuda", FastOptions(engine, "float32"))
        drawn[engine] = list(pipeline.generate(CAPTIONS[:2], 3, seed=1))
    same = [(a.ids == b.ids).float().mean() for a, b in zip(*drawn.values(), strict=True)]
    assert sum(same) / len(same) > 0.95
    assert all(p.log_likelihood < 0 and p.null_log_likelihood < 0 for p in drawn["cuda_graph"])


def test_graphs_are_captured_while_another_thread_pins_memory(generator_dir):
    """As a training's loader does while the sample grid is drawn."""
    done = threading.Event()

    def pin() -> None:
        size = 1000
        while not done.is_set():
            torch.empty(size := size + 4096).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        pipeline = TextToImage.from_pretrained(generator_dir, "cuda", FastOptions("cuda_graph"))
        assert len(pipeline(CAPTIONS[0], 5)) == 5
    finally:
        done.set()
        thread.join()


def test_a_training_with_sample_grids(tmp_path):
    made = write_made(tmp_path / "made")
    train_dalle.main(
        [
            *(
                "--data",
                str(made / "tokens"),
                "--image-tokenizer",
                str(made / "tokenizer"),
                "--device",
                "cuda",
            ),
            *(
                "--loop.run-dir",
                str(tmp_path / "run"),
                "--loop.num-steps",
                "6",
                "--loop.global-batch-size",
                "8",
            ),
            *("--loop.sample-every", "2", "--num-workers", "1", "--optim.warmup-steps", "2"),
            *("--model.dim", "32", "--model.num-layers", "2", "--model.num-heads", "2"),
        ]
    )
    assert len(list((tmp_path / "run" / "samples").glob("samples_*.png"))) == 3
