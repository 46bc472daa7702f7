"""Data that are damaged or were changed, and runs that must not go on as they are asked to, through `main`."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_data import write_made

import train_dalle
from dalle.text_tokenizer import TextTokenizer

ROOT = Path(train_dalle.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return write_made(tmp_path_factory.mktemp("made"))


def flags(made: Path, run_dir: Path, *more: str, data: Path | None = None, steps: int = 4) -> list[str]:
    return [
        *("--data", str(data or made / "tokens"), "--image-tokenizer", str(made / "tokenizer")),
        *("--loop.run-dir", str(run_dir), "--loop.num-steps", str(steps), "--loop.global-batch-size", "8"),
        *("--loop.log-every", "1", "--loop.tensorboard", "False", "--num-workers", "0", "--device", "cpu"),
        *("--model.dim", "16", "--model.num-layers", "1", "--model.num-heads", "2"),
        *("--optim.warmup-steps", "2", "--sample-images", "0", *more),
    ]


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train_dalle.main(flags(made, run_dir))
    return run_dir


def refusal(capsys, arguments: list[str]) -> str:
    """The one sentence that a wrong command ends with."""
    with pytest.raises(SystemExit) as ended:
        train_dalle.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def rewritten(made: Path, target: Path, split: str, change: Callable[[int, str, bytes], bytes]) -> Path:
    """The token shards with members of a split changed: change(number of the sample, suffix, bytes)."""
    shutil.copytree(made / "tokens", target)
    number = -1
    for path in sorted(target.glob(f"{split}-*.tar")):
        buffer = io.BytesIO()
        with tarfile.open(path) as before, tarfile.open(fileobj=buffer, mode="w") as after:
            key = None
            for member in before:
                stem, _, suffix = member.name.partition(".")
                number, key = number + (stem != key), stem
                data = change(number, suffix, before.extractfile(member).read())
                member.size = len(data)
                after.addfile(member, io.BytesIO(data))
        path.write_bytes(buffer.getvalue())
    return target


def npy(codes: list[list[int]]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(codes, np.uint16))
    return buffer.getvalue()


def test_blank_validation_captions_are_passed_over(made, tmp_path):
    def blank(number: int, suffix: str, data: bytes) -> bytes:
        return "  　 ".encode() if suffix == "txt" and number in (0, 2) else data

    data = rewritten(made, tmp_path / "tokens", "val", blank)
    train_dalle.main(flags(made, tmp_path / "run", "--sample-images", "1", data=data))
    assert list((tmp_path / "run" / "samples").glob("samples_*.png"))


def test_validation_captions_that_are_all_blank_are_named(made, tmp_path, capsys):
    data = rewritten(made, tmp_path / "tokens", "val", lambda n, s, d: b" " if s == "txt" else d)
    said = refusal(capsys, flags(made, tmp_path / "run", "--sample-images", "1", data=data))
    assert "no validation caption holds anything that the text tokenizer knows" in said


@pytest.mark.parametrize("codes", [[[4000] * 16], [[1] * 9]], ids=["a code too large", "too few codes"])
def test_one_sample_with_wrong_codes_is_replaced_and_reported(codes, made, tmp_path, capsys):
    def spoil(number: int, suffix: str, data: bytes) -> bytes:
        return npy(codes) if suffix == "ids.npy" and number == 3 else data

    data = rewritten(made, tmp_path / "tokens", "train", spoil)
    train_dalle.main(flags(made, tmp_path / "run", data=data, steps=12))
    assert "000003: it holds" in capsys.readouterr().out


def test_codes_of_another_grid_everywhere_are_one_sentence(made, tmp_path, capsys):
    data = rewritten(
        made, tmp_path / "tokens", "train", lambda n, s, d: npy([[1] * 9]) if s == "ids.npy" else d
    )
    assert "it holds 9 codes, not 16" in refusal(capsys, flags(made, tmp_path / "run", data=data))


def test_validation_that_cannot_be_read_is_one_sentence(made, tmp_path, capsys):
    data = rewritten(made, tmp_path / "tokens", "val", lambda n, s, d: b"?" * len(d) if s == "ids.npy" else d)
    said = refusal(capsys, flags(made, tmp_path / "run", data=data))
    assert f"no sample of {data} can be read, the last one is" in said and "ids.npy is damaged" in said
    assert "pickle" not in said


def test_a_shard_damaged_in_the_middle_is_reported(made, tmp_path, capsys):
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    path = tmp_path / "tokens" / "train-00001.tar"
    data = bytearray(path.read_bytes())
    data[12000:20000] = b"\xff" * 8000
    path.write_bytes(data)
    train_dalle.main(flags(made, tmp_path / "run", data=tmp_path / "tokens"))
    assert "train-00001.tar is damaged at byte" in capsys.readouterr().out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of a finished run to go on with."""
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


def test_a_run_keeps_its_text_tokenizer(made, run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    TextTokenizer.train(["一个红色蓝色绿色黑色的圆盘"] * 9, vocab_size=40, model_type="char").save(other)
    said = refusal(capsys, flags(made, run, "--text-tokenizer", str(other), steps=5))
    assert "was started with another text tokenizer" in said
    train_dalle.main(flags(made, run, "--text-tokenizer", str(tmp_path / "gone"), steps=5))
    assert "gone cannot be read, the run goes on with its own copy" in capsys.readouterr().out
    train_dalle.main(flags(made, run, "--text-tokenizer", str(run / "text_tokenizer"), steps=6))


def test_a_run_keeps_its_seed_and_its_average(made, run, capsys):
    assert "started with seed 0, not 5" in refusal(capsys, flags(made, run, "--loop.seed", "5", steps=5))
    said = refusal(capsys, flags(made, run, "--ema-decay", "0", steps=5))
    assert "was trained with a moving average" in said
    train_dalle.main(flags(made, run, steps=5))


def test_other_data_of_the_same_size_are_noted(made, run, tmp_path, capsys):
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    first, last = (tmp_path / "tokens" / f"train-0000{i}.tar" for i in (0, 2))
    swapped = first.read_bytes()
    shutil.copyfile(last, first)
    last.write_bytes(swapped)
    train_dalle.main(flags(made, run, data=tmp_path / "tokens", steps=5))
    assert "the samples of the data are others: the run goes on in a new order" in capsys.readouterr().out
    train_dalle.main(flags(made, run, data=tmp_path / "tokens", steps=6))
    assert "new order" not in capsys.readouterr().out


def test_two_trainings_do_not_share_a_run_directory(made, run, capsys):
    code = "from pathlib import Path; from common.lock import DirectoryLock; "
    code += f"lock = DirectoryLock(Path({str(run)!r})); print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        said = refusal(capsys, flags(made, run, steps=5))
        assert f"another command is writing to {run}" in said
    finally:
        holder.kill()
        holder.communicate()
    train_dalle.main(flags(made, run, steps=5))


def test_a_first_step_that_is_not_finite_says_that_nothing_was_saved(made, tmp_path, capsys):
    said = refusal(capsys, flags(made, tmp_path / "run", "--optim.lr", "1e30", "--optim.warmup-steps", "0"))
    assert "is not finite at step" in said and "nothing was saved yet" in said


def test_a_metrics_file_with_strange_lines_is_no_obstacle(made, run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('3\n[]\n{"kind": "event"}\n')
    train_dalle.main(flags(made, run, steps=5))
    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]["step"] == 5


@pytest.mark.parametrize("content", ["[]", "3", '{"sha256": 4}'])
def test_a_strange_description_of_the_shards_is_one_sentence(content, made, tmp_path, capsys):
    shutil.copytree(made / "tokens", tmp_path / "tokens")
    (tmp_path / "tokens" / "tokenizer.json").write_text(content)
    assert "encode the images again" in refusal(
        capsys, flags(made, tmp_path / "run", data=tmp_path / "tokens")
    )


def test_a_seed_that_no_generator_takes_is_one_sentence(made, tmp_path, capsys):
    said = refusal(capsys, flags(made, tmp_path / "run", "--loop.seed", "99999999999999"))
    assert "seed must lie in" in said
