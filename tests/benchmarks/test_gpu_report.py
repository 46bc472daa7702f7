"""The report on GPUs: its logic on a CPU with a tiny model, its pages, and one sentence where there is no GPU."""

import json
from typing import get_args

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_report import Line, Options, cells, main, markdown, page, peak_tflops, report


def test_without_a_gpu_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("error: this machine has no CUDA GPU")


def test_a_gpu_is_known_by_its_name():
    assert peak_tflops("NVIDIA H100 PCIe") == 756 and peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312 and peak_tflops("NVIDIA H20") == 148
    assert peak_tflops("NVIDIA H200") == 989 and peak_tflops("GeForce GT 710") is None


def test_verdicts():
    assert Line("a", "b", 0.5, goal=0.45).verdict == "reached"
    assert Line("a", "b", 0.4, goal=0.45).verdict == "missed"
    assert Line("a", "b", 0.9, goal=1.0, more_is_better=False).verdict == "reached"
    assert Line("a", "b", 1.1, goal=1.0, more_is_better=False).verdict == "missed"
    assert Line("a", "b", 1.1).verdict == "" and Line("a", "b", failed=True).verdict == "failed"


def test_pages_hold_what_is_said_and_load_nothing():
    lines = [
        Line("train", "x | <y>", 12345.6, "samples/s"),
        Line("ranked", "z", 1.5, "s", 1.0, False, "late"),
    ]
    assert cells(lines[1]) == ["ranked", "z", "1.5 s", "under 1", "missed", "late"]
    assert "| train | x \\| <y> | 12,346 samples/s |" in markdown(lines, ["a machine"])
    written = page(lines, ["a <machine>"])
    assert "x | &lt;y&gt;" in written and 'class="missed">missed' in written and "http" not in written


def test_a_tiny_model_goes_through_and_what_breaks_is_a_line(tmp_path, monkeypatch):
    def broken(options):
        yield Line("ranked", "before", 1.0)
        raise RuntimeError("no\nmodel")

    monkeypatch.setitem(gpu_report.SECTIONS, "ranked", broken)
    # a training with torch.compile takes a minute on a processor
    real = gpu_report.train_speed.main.__wrapped__
    called = []

    def without_compile(argv):
        called.append(argv)
        return {"ours_seconds": 0.5} if "--compile" in argv else real(argv)

    monkeypatch.setattr(gpu_report.train_speed.main, "__wrapped__", without_compile)
    monkeypatch.setattr(gpu_report.train_speed, "measure_peak_flops", lambda device, size: 1e12)
    monkeypatch.setattr(gpu_report.decode_speed, "GRID", 4)  # 16 image tokens
    sections = ("train", "sample", "ranked", "nccl")
    lines = report(Options(tmp_path, sections, "3m", batch_size=2, rounds=1, device="cpu"))
    assert [len(argv) for argv in called] == [len(called[0])] * 2 + [len(called[0]) + 1]
    found = {line.what: line for line in lines}
    assert found["3m, bf16, torch.compile"].value == 4.0 and found["3m, float32"].value > 0
    assert found[gpu_report.TOKENS].goal == 8000 and found[gpu_report.TOKENS].value > 0
    assert found["before"].value == 1.0 and [x.what for x in lines if x.failed] == ["ranked"]
    assert (
        found["ranked"].note == "RuntimeError: no model" and "nothing to reduce" in found["all-reduce"].note
    )
    written = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [line["what"] for line in written["lines"]] == [line.what for line in lines]
    assert (tmp_path / "report.html").is_file() and "GPU report" in (tmp_path / "report.md").read_text(
        "utf-8"
    )


def test_what_a_gpu_samples_with_are_contenders_of_the_benchmark(monkeypatch):
    asked = []

    def measured(options, size, batch_size, cfg_scale):
        asked.extend(options.contenders)
        return dict.fromkeys(options.contenders, 0.5)

    monkeypatch.setattr(gpu_report.decode_speed, "measure", measured)
    lines = list(gpu_report.sampling(Options(device="cuda")))
    assert not any(line.failed for line in lines) and lines[-1].value == 16
    assert len(asked) > 1 and set(asked) <= set(get_args(gpu_report.decode_speed.Contender))
