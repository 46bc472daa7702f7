"""How much speed is left beside other processes? Sampling and training steps, alone and next to busy processes.

    python -m benchmarks.shared_machine
    python -m benchmarks.shared_machine --work train --busy 0 1 2

Goal on two cores: 8 images keep at least 40 % of the idle speed beside one busy process, 25 % beside two, and a step of
training likewise. A fair scheduler leaves two threads that wait for each other 50 % beside one (the thread that shares
its core is the slower one), and 50 % beside two. Threads that spin while they wait kept 2 %. Steps of training take as
many threads as the others leave, as trainings do (common/machine/busy_machine.py): each of their rounds begins with
the seconds that this takes. Rounds alternate, and the fastest of each counts; on a machine that is not idle already
the ratios say nothing.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from common.config import command, parse_options
from common.log import say
from common.machine.busy_machine import LOOK_S, BusyMachine
from common.machine.cpus import available_cpus
from common.optim import OptimConfig, adamw
from common.precision import autocast
from dalle import sequence
from dalle.engines import Engine, FastOptions, WeightType, prepare
from dalle.losses import CrossEntropy, LossConfig, dalle_loss
from dalle.model import Dalle, ModelOptions, SizeName
from dalle.sampling import SamplingOptions, noise_generator, sample_ids
from kernels import accelerate

TEXT_VOCAB, TEXT_LEN, CODES, GRID = 8192, 32, 1024, 16
BUSY = """
import os
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(0)
os.close(1)
os.close(2)
while os.path.exists("/proc/{owner}"):
    for _ in range(1_000_000):
        pass
"""
SETTLE_S = 2.5 * LOOK_S  # two looks at the machine
GOALS = {1: 0.40, 2: 0.25}  # share of the idle speed beside so many busy processes


@dataclass(frozen=True)
class Options:
    """Time work beside busy processes."""

    work: tuple[Literal["sample", "train"], ...] = ("sample", "train")
    """What is timed."""
    size: SizeName = "3m"
    """Row of the size table."""
    num_images: int = 8
    """Images of a round, with guidance; samples of a training step."""
    busy: tuple[int, ...] = (0, 1, 2)
    """Busy processes beside it; the first is what the others are compared with."""
    rounds: int = 3
    """Timed rounds of each."""
    engine: Engine = "auto"
    """Sampling engine."""
    weights: WeightType = "auto"
    """Numbers that weights are kept in."""

    def __post_init__(self) -> None:
        if not self.busy or min(self.busy) < 0 or self.rounds < 1:
            raise ValueError(f"busy must name numbers of processes and rounds be at least 1, not {self.busy}")


def make_model(options: Options) -> Dalle:
    torch.manual_seed(0)
    config = ModelOptions(size=options.size, text_embed_dim=64).config(TEXT_VOCAB, 0, TEXT_LEN, CODES, GRID)
    return Dalle(config)


def sampling(options: Options) -> Callable[[], object]:
    """Samples the tokens of `num_images` images."""
    decoder = prepare(make_model(options).eval(), FastOptions(options.engine, options.weights))
    text = torch.randint(1, TEXT_VOCAB, (options.num_images, TEXT_LEN))
    null = sequence.null_captions(options.num_images, TEXT_LEN, 0, torch.device("cpu"))
    generators = [noise_generator(0, i) for i in range(options.num_images)]
    return lambda: sample_ids(decoder, text, null, generators, SamplingOptions(cfg_scale=3.0))


def training(options: Options) -> Callable[[], object]:
    """A step as train_dalle.py takes it."""
    model, cross_entropy = make_model(options), CrossEntropy()
    say(str(accelerate(model, cross_entropy)))
    optimizer, device = adamw(model, OptimConfig()), torch.device("cpu")
    text = torch.randint(1, TEXT_VOCAB, (options.num_images, TEXT_LEN))
    image = torch.randint(CODES, (options.num_images, GRID**2))
    targets = sequence.text_targets(text, 0)

    def step() -> None:
        with autocast(device):
            output = model(text, image)
        dalle_loss(output, image, targets, len(targets), LossConfig(), cross_entropy).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes of somebody else: not children of this one, which BusyMachine would take for a part of the training."""
    code = BUSY.format(owner=os.getpid())
    found = [
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(count)
    ]
    try:
        time.sleep(0.3 if count else 0)
        yield
    finally:
        for process in found:
            os.kill(int(process.stdout), signal.SIGKILL)


def measure(work: Callable[[], object], options: Options, machine: BusyMachine | None) -> dict[int, float]:
    """Seconds of the fastest round beside each number of busy processes; one round warms up."""
    work()
    best = dict.fromkeys(options.busy, float("inf"))
    for _ in range(options.rounds):
        for count in options.busy:
            with busy_processes(count):
                if machine:
                    settle(work, machine)
                started = time.perf_counter()
                work()
                best[count] = min(best[count], time.perf_counter() - started)
    if machine:
        machine.restore()
    return best


def settle(work: Callable[[], object], machine: BusyMachine) -> None:
    until = time.perf_counter() + SETTLE_S
    while time.perf_counter() < until:
        work()
        machine.follow()


@command
def main(argv: Sequence[str] | None = None) -> dict[str, dict[int, float]]:
    """Print, and return the share of the first speed by kind of work and number of busy processes."""
    options = parse_options(Options, argv, description=__doc__)
    say(f"{torch.get_num_threads()} threads on {available_cpus()} CPUs, {options.size}")
    makers, shares = {"sample": sampling, "train": training}, {}
    for name in options.work:
        seconds = measure(makers[name](options), options, BusyMachine() if name == "train" else None)
        idle = seconds[options.busy[0]]
        shares[name] = {count: idle / s for count, s in seconds.items()}
        for count, share in shares[name].items():
            goal = f", goal {GOALS[count]:.0%}" if count in GOALS and options.busy[0] == 0 else ""
            say(
                f"{name} beside {count} busy processes: {seconds[count]:.2f} s, {share:.0%} of the first speed{goal}"
            )
    return shares


if __name__ == "__main__":
    main()
