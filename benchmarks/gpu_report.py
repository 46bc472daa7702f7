"""One page about this machine's GPUs: do the tests pass, how fast is it, and are the goals reached?

    python -m benchmarks.gpu_report                       # or: make gpu-report
    python -m benchmarks.gpu_report --out runs/gpu_report --sections train sample ranked

Runs the GPU tests, trains and samples with a generator of 110M parameters in float32, bf16, with torch.compile and
CUDA graphs, times 8 ranked PNGs with the models that ship, trains under ZeRO 1 to 3 and measures NCCL's all-reduce on
all GPUs found. Writes report.md, report.html and report.json. What fails is a line of the page, and the rest goes on.
Goals: 45 % of the GPU's bf16 peak by its data sheet in training; 8,000 image tokens a second at batch 8 with guidance;
8 ranked PNGs in under a second. Exit code 1 where a goal is missed or a section failed, 2 without a CUDA GPU.
"""

import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro

from benchmarks import decode_speed, text_to_ranked, train_speed
from common.config import command, parse_options
from common.console.html import render
from common.files import write_json
from common.log import say
from common.outputs.record import OutputDirectory
from common.text.language import Words
from dalle.model import SIZES, SizeName
from dalle.plan import train_flops

Section = Literal["tests", "train", "sample", "ranked", "zero", "nccl"]
ROOT = Path(__file__).parent.parent
PAGES = ("report.md", "report.html", "report.json")
# Dense bf16 TFLOP/s by NVIDIA's data sheets; the first name that the GPU's name holds counts.
PEAKS = {
    "GB200": 2500.0, "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "H800": 989.0, "H20": 148.0,
    "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L40": 181.0, "L20": 119.5, "A40": 150.0, "A10": 125.0, "L4": 121.0,
    "RTX 5090": 209.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip
GOAL_MFU, GOAL_TOKENS, GOAL_SECONDS = 0.45, 8000.0, 1.0
MFU, TOKENS, RANKED = "best share of the data sheet's peak", "best image tokens/s", "8 ranked PNGs"


@dataclass(frozen=True)
class Options:
    """Measure this machine's GPUs."""

    out: Path = Path("runs/gpu_report")
    """Directory for the page."""
    sections: tuple[Section, ...] = ("tests", "train", "sample", "ranked", "zero", "nccl")
    """What is done."""
    size: SizeName = "110m"
    """Of the generator that trains and samples."""
    batch_size: int = 64
    """Samples of a training step."""
    rounds: int = 10
    """Timed rounds."""
    checkpoint: str = ""
    """Generator of the ranked images; empty: the newest, else the one that ships."""
    device: Annotated[Literal["cuda", "cpu"], tyro.conf.Suppress] = (
        "cuda"  # no flag; cpu: tests of this module
    )


@dataclass(frozen=True)
class Line:
    """One measured number, or what came of a section without one."""

    section: str
    what: str
    value: float | None = None
    unit: str = ""
    goal: float | None = None
    more_is_better: bool = True
    note: str = ""
    failed: bool = False

    @property
    def verdict(self) -> str:
        """reached, missed, failed, or nothing where no goal is set."""
        if self.failed:
            return "failed"
        if self.goal is None or self.value is None:
            return ""
        return "reached" if (self.value > self.goal) == self.more_is_better else "missed"


def peak_tflops(name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name; None for one that is not in the table."""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def gpu_tests(options: Options) -> Iterator[Line]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:xdist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1].strip("= ")
    broken = re.findall(r"^FAILED (\S+)", done.stdout, flags=re.M)
    passed = re.search(r"(\d+) passed", last)
    note = f"{last}{': ' if broken else ''}{', '.join(broken)}"
    yield Line(
        "tests",
        "GPU tests passed",
        float(passed[1]) if passed else 0.0,
        note=note,
        failed=done.returncode != 0,
    )


def training(options: Options) -> Iterator[Line]:
    """Steps of one process: float32, bf16, bf16 compiled."""
    dim, num_layers, num_heads = SIZES[options.size]
    wanted = [
        *("--dim", str(dim), "--num-layers", str(num_layers), "--num-heads", str(num_heads)),
        *("--batch-size", str(options.batch_size), "--rounds", str(options.rounds), "--contenders", "ours"),
        *("--device", options.device),
    ]
    config = train_speed.Options(dim=dim, num_layers=num_layers, num_heads=num_heads).model_config()
    flops = options.batch_size * train_flops(config, config.max_text_len)
    peak = peak_tflops(torch.cuda.get_device_name()) if options.device == "cuda" else None
    shares = []
    for name, flags in (
        ("float32", ["--precision", "fp32"]),
        ("bf16", ["--precision", "bf16"]),
        ("bf16, torch.compile", ["--precision", "bf16", "--compile"]),
    ):
        try:
            seconds = train_speed.main.__wrapped__([*wanted, *flags])["ours_seconds"]
        except Exception as error:  # the others are measured all the same
            yield failure("train", name, error)
            continue
        share = flops / seconds / 1e12 / peak if peak else None
        shares += [share] if share else []
        note = f"{seconds * 1e3:.1f} ms a step of {options.batch_size}" + (
            f", {share:.1%} of the peak" if share else ""
        )
        yield Line("train", f"{options.size}, {name}", options.batch_size / seconds, "samples/s", note=note)
    if shares:
        yield Line("train", MFU, max(shares), goal=GOAL_MFU, note=f"of {peak:g} TFLOP/s in bf16")
    else:
        yield Line("train", MFU, note="the GPU is not in the table of peaks: add it to PEAKS")


def sampling(options: Options) -> Iterator[Line]:
    """Batch 8 with guidance, the model's own steps against CUDA graphs."""
    names = ("torch_bf16", "cuda_graph_bf16") if options.device == "cuda" else ("torch_fp32",)
    settings = decode_speed.Options((options.size,), (8,), (3.0,), names, rounds=max(1, options.rounds // 3),
                                    device=options.device)  # fmt: skip
    tokens = []
    for name in names:
        try:
            alone = decode_speed.Options(**{**vars(settings), "contenders": (name,)})
            seconds = decode_speed.measure(alone, options.size, 8, 3.0)[name]
        except Exception as error:
            yield failure("sample", name, error)
            continue
        tokens.append(8 / seconds)
        yield Line("sample", f"{options.size}, batch 8, guidance 3, {name}", tokens[-1], "image tokens/s")
    if tokens:
        yield Line("sample", TOKENS, max(tokens), "image tokens/s", goal=GOAL_TOKENS)


def ranked(options: Options) -> Iterator[Line]:
    flags = ["--device", options.device, "--rounds", str(max(1, options.rounds // 2))]
    flags += ["--checkpoint", options.checkpoint] if options.checkpoint else []
    found = text_to_ranked.main.__wrapped__(flags)
    note = ", ".join(f"{name} {found[name]:.3f} s" for name in ("draw", "rank", "write", "slowest"))
    yield Line("ranked", RANKED, found["all"], "s", goal=GOAL_SECONDS, more_is_better=False, note=note)


def zero(options: Options) -> Iterator[Line]:
    """train_dalle.py on the embedded default under the deepspeed launcher, all GPUs, stages 1 to 3."""
    gpus = torch.cuda.device_count() if options.device == "cuda" else 1
    for stage in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            launched = [
                *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(gpus)),
                *(
                    "--master_port",
                    str(free_port()),
                    str(ROOT / "train_dalle.py"),
                    "--loop.run-dir",
                    str(run),
                ),
                *(
                    "--model.size",
                    options.size,
                    "--engine",
                    "deepspeed",
                    "--deepspeed.zero-stage",
                    str(stage),
                ),
                *(
                    "--loop.num-steps",
                    "30",
                    "--loop.log-every",
                    "10",
                    "--loop.global-batch-size",
                    str(8 * gpus),
                ),
                *("--loop.sample-every", "0", "--sample-images", "0", "--device", options.device),
            ]
            paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            started = time.perf_counter()
            done = subprocess.run(
                launched, capture_output=True, text=True, env=os.environ | {"PATH": paths}, cwd=ROOT
            )
            name = f"{options.size}, ZeRO {stage}, {gpus} processes"
            if done.returncode:
                said = (done.stdout + done.stderr).strip().splitlines()
                yield Line("zero", name, note=" ".join(said[-3:])[-400:], failed=True)
                continue
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
            rates = [row["samples_per_second"] for row in rows if "samples_per_second" in row]
            note = f"{time.perf_counter() - started:.0f} s in all"
            yield Line("zero", name, rates[-1] if rates else None, "samples/s", note=note)


def nccl(options: Options) -> Iterator[Line]:
    """Bus bandwidth of an all-reduce of 256 MiB, as nccl-tests counts it: 2 (n - 1) / n bytes a byte."""
    count = torch.cuda.device_count() if options.device == "cuda" else 1
    if count < 2:
        yield Line("nccl", "all-reduce", note="one GPU: there is nothing to reduce over")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "seconds.json"
        torch.multiprocessing.spawn(reduce_all, (count, free_port(), 256 * 2**20, str(found)), count)
        seconds = json.loads(found.read_text())
    yield Line(
        "nccl", f"all-reduce of 256 MiB over {count} GPUs", 2 * (count - 1) / count * 0.25 / seconds, "GiB/s"
    )


def reduce_all(rank: int, count: int, port: int, num_bytes: int, found: str) -> None:
    """One process of `nccl`; the first writes the median seconds."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    buffer, seconds = torch.ones(num_bytes // 4, device="cuda"), []
    for _ in range(25):
        torch.cuda.synchronize()
        started = time.perf_counter()
        dist.all_reduce(buffer)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        Path(found).write_text(json.dumps(sorted(seconds[5:])[10]))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


SECTIONS: dict[Section, Callable[[Options], Iterator[Line]]] = {
    "tests": gpu_tests, "train": training, "sample": sampling, "ranked": ranked, "zero": zero, "nccl": nccl,
}  # fmt: skip


def failure(section: str, what: str, error: BaseException) -> Line:
    """The line of what ended with `error`."""
    traceback.print_exception(error)
    said = " ".join(str(error).split())[:300]
    return Line(section, what, note=f"{type(error).__name__}: {said}", failed=True)


def measure(options: Options) -> Iterator[Line]:
    """The lines of all sections; what a section raises is its last line."""
    for name in options.sections:
        say(f"--- {name}")
        try:
            yield from SECTIONS[name](options)
        except Exception as error:  # one broken section must not cost the others
            yield failure(name, name, error)


def machine(options: Options) -> list[str]:
    """What was measured on."""
    lines = [f"{platform.platform()}, Python {platform.python_version()}, PyTorch {torch.__version__}"]
    if options.device != "cuda":
        return [*lines, "no GPU: the numbers are this processor's, the goals are not meant for it"]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        peak = peak_tflops(found.name)
        sheet = f"{peak:g} TFLOP/s in bf16 by its data sheet" if peak else "not in the table of peaks"
        size = f"{found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        lines.append(f"GPU {i}: {found.name}, {size}, {sheet}")
    nccl_version = ".".join(map(str, torch.cuda.nccl.version()))
    return [*lines, f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl_version}"]


def cells(line: Line) -> list[str]:
    """Of a row of the table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"

    goal = "" if line.goal is None else f"{'over' if line.more_is_better else 'under'} {number(line.goal)}"
    return [
        line.section,
        line.what,
        f"{number(line.value)} {line.unit}".strip(),
        goal,
        line.verdict,
        line.note,
    ]


HEADINGS = ["section", "what", "measured", "goal", "", "note"]


def markdown(lines: Sequence[Line], about: Sequence[str]) -> str:
    rows = [
        HEADINGS,
        ["---"] * len(HEADINGS),
        *([c.replace("|", "\\|") for c in cells(line)] for line in lines),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "# GPU report\n\n" + "".join(f"- {line}\n" for line in about) + f"\n{table}\n"


def page(lines: Sequence[Line], about: Sequence[str]) -> str:
    """The same as HTML that loads nothing."""
    rows = [(line.verdict, cells(line)) for line in lines]
    words = Words({}, "en")
    return render("benchmarks/templates/gpu_report.html", words, about=about, headings=HEADINGS, rows=rows)


@command
def main(argv: Sequence[str] | None = None) -> list[Line]:
    """Measure and write the page; returns its lines."""
    lines = report(parse_options(Options, argv, description=__doc__))
    if any(line.verdict in ("missed", "failed") for line in lines):
        raise SystemExit(1)
    return lines


def report(options: Options) -> list[Line]:
    """The lines of the page, which is written."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "this machine has no CUDA GPU that PyTorch can use: run make gpu-report on one that has"
        )
    with OutputDirectory(options.out) as files:
        files.require_ours(PAGES)
        about = [f"{datetime.date.today()}", *machine(options)]
        lines = list(measure(options))
        texts = (markdown(lines, about), page(lines, about))
        for name, text in zip(PAGES[:2], texts, strict=True):
            with files.writing(name) as temporary:
                temporary.write_text(text, "utf-8")
        with files.writing(PAGES[2]) as temporary:
            write_json(
                temporary, {"machine": about, "lines": [asdict(x) | {"verdict": x.verdict} for x in lines]}
            )
    say(markdown(lines, about))
    say(f"wrote {options.out / PAGES[0]}, {options.out / PAGES[1]}")
    return lines


if __name__ == "__main__":
    main()
