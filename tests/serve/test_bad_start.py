"""Everything a user can get wrong at the start of the service: one sentence, exit code 2, nothing left behind."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serve.__main__ import listen, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def taken():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield str(holder.getsockname()[1])


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--port", "70000"), "port must lie in [0, 65535], not 70000"),
        (("--open", "--host", "0.0.0.0"), "for loopback addresses"),
        (("--host", "203.0.113.7"), "cannot listen at 203.0.113.7:0"),
        (("--database", "sqlite:////dev/null/keys.db"), "cannot be used"),
        (("--database", "nonsense"), "is no database URL"),
        (("--audit-dir", "file"), "file"),
        (("--image-dir", "file"), "file"),
        (("--deny-list", "missing.txt"), "no deny list missing.txt"),
        (("--max-images", "0"), "max_images must be at least 1"),
        (("--deadline", "-1"), "deadline must be above 0"),
        (("--label.label-producer", " "), "label-producer"),
        (("--surprise",), "--surprise"),
    ],
)
def test_options_that_cannot_be(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert said in refused(capsys, "--port", "0", "--checkpoint", "nowhere", *flags)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_process_that_answers_imports_no_pytorch():
    """Which takes longer than everything else of its start; models are the worker's."""
    code = (
        "import sys; from serve.__main__ import make_dispatcher; from serve.app import create_app; "
        "from serve.options import ServeOptions; options = ServeOptions(open=True); "
        "make_dispatcher(options); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_an_occupied_port(taken, capsys):
    assert f"cannot listen at 127.0.0.1:{taken}: Address already in use" in refused(capsys, "--port", taken)
    with listen("127.0.0.1", 0) as first, pytest.raises(ValueError, match="choose another with --port"):
        listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("change", ["missing", "another kind", "another tokenizer", "damaged", "ranker"])
def test_a_model_that_is_missing_or_does_not_fit_ends_the_service(
    small_generator, tmp_path, capsys, monkeypatch, change
):
    monkeypatch.chdir(tmp_path)
    model, ranker = tmp_path / "model", "none"
    if change != "missing":
        shutil.copytree(small_generator, model)
    if change == "another kind":
        model = model / "image_tokenizer"
    elif change == "another tokenizer":
        config = model / "image_tokenizer/config.json"
        config.write_text(config.read_text().replace('"sha256": "', '"sha256": "0'))
    elif change == "damaged":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-50])
    elif change == "ranker":
        ranker = str(model / "image_tokenizer")
    flags = ("--open", "--port", "0", "--checkpoint", str(model), "--ranker", ranker, "--device", "cpu")
    said = refused(capsys, *flags, "--fast.engine", "plain", "--fast.weights", "float32")
    assert str(model) in said or "tokenizer" in said
