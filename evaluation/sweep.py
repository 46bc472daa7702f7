"""Which guidance, temperature, top-k and top-p sample best? Found on a few prompts, reported on many others.

    python -m evaluation.sweep --checkpoint runs/dalle --reference ../shared/data/goods --judge runs/goods_128_judge
    python -m evaluation.sweep ... --cfg-scales 2 3 4 6 8 --top-ps 1 0.95 0.9 --search-prompts 60 --report-prompts 400
    python generate.py "..." 8 out/ --config out/sweep/winner.yaml

One knob after the other (guidance first, the others as they stand), or all combinations (--grid full). A setting wins
by its mean rank over the objectives, whose scales never meet. The winner is then compared with the defaults on prompts
that the search has not seen: paired differences, so a lucky search shows. Images stand in OUT, so a killed sweep
goes on. Writes OUT/sweep.html, OUT/sweep.json and OUT/winner.yaml, and prints the winning flags.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml

from common.config import command, parse_options, to_mapping
from common.log import say
from common.outputs.record import OutputDirectory
from dalle import default_checkpoint
from dalle.sampling import SamplingOptions
from evaluation.compare.arena_results import Difference
from evaluation.compare.generating import Plan, caption_texts, common_texts, generate_into, prompt_texts
from evaluation.compare.sweep_results import KNOBS, Stage, Sweep, Trial, flags, mean_ranks, setting_name
from evaluation.compare.systems import OwnSystem, Setting, SystemSpec, open_system
from evaluation.metrics.compute import (
    Metric,
    measure_all,
    paired_difference,
)
from evaluation.options import MeasuringOptions
from evaluation.sets import SampleSet


@dataclass(frozen=True)
class Options(MeasuringOptions):
    """Find how a generator samples best."""

    checkpoint: str = ""
    """Generator; empty: the one that was trained last."""
    prompts: Path | None = None
    """File of prompts, see data_tools/prompts.py; None: captions of the reference."""
    cfg_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 4.5, 6.0)
    """Guidance to try."""
    temperatures: tuple[float, ...] = (0.9, 1.0)
    """Temperatures to try."""
    top_ks: tuple[int, ...] = (0, 256)
    """Values of top-k to try; 0 keeps all."""
    top_ps: tuple[float, ...] = (0.9, 0.95, 1.0)
    """Values of top-p to try; 1 keeps all."""
    grid: Literal["one_by_one", "full"] = "one_by_one"
    """One knob after the other, or all combinations."""
    objectives: tuple[str, ...] = ("frechet_distance", "category_right")
    """Metrics of evaluation whose mean rank decides; frechet_distance stands for FID too."""
    search_prompts: int = 40
    """Prompts of the search."""
    report_prompts: int = 200
    """Other prompts of the report."""
    num_images: int = 4
    """Images of each prompt."""
    seed: int = 0
    """Seed of the images and of which prompts."""
    batch_size: int = 16
    """Images generated side by side; does not change them."""
    train_split: str = ""
    """Training split, for memorisation; empty: none, which is no objective."""
    out: Path = Path("out/sweep")
    """Directory for images and results."""

    def __post_init__(self) -> None:
        for name in ("search_prompts", "report_prompts", "num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.objectives:
            raise ValueError("name at least one objective")
        for values in self.values.values():
            if not values:
                raise ValueError("every knob needs at least one value")
        for sampling in self.all_settings():
            assert sampling  # SamplingOptions refuses values out of range

    @property
    def values(self) -> dict[str, tuple[float, ...]]:
        """Values to try, by knob."""
        return dict(zip(KNOBS, (self.cfg_scales, self.temperatures, self.top_ks, self.top_ps), strict=True))

    def all_settings(self) -> list[SamplingOptions]:
        """All combinations."""
        combinations = itertools.product(*self.values.values())
        return [SamplingOptions(**dict(zip(KNOBS, values, strict=True))) for values in combinations]


def search(options: Options, evaluate: Callable[[SamplingOptions], dict[str, Metric]]) -> list[Stage]:
    """Stages, the last of which ends with the winner; `evaluate` is asked once a setting."""
    known: dict[SamplingOptions, Trial] = {}

    def compare(knob: str, settings: Sequence[SamplingOptions]) -> Stage:
        for sampling in settings:
            if sampling not in known:
                known[sampling] = Trial(sampling, evaluate(sampling))
        trials = tuple(known[sampling] for sampling in settings)
        ranks = mean_ranks(trials, options.objectives)
        return Stage(knob, trials, trials[min(range(len(trials)), key=lambda i: ranks[i])])

    if options.grid == "full":
        return [compare("", options.all_settings())]
    best = SamplingOptions(**{name: _start(name, values) for name, values in options.values.items()})
    stages = []
    for knob, values in options.values.items():
        if len(values) > 1:
            stages.append(compare(knob, [replace(best, **{knob: value}) for value in sorted(set(values))]))
            best = stages[-1].winner.sampling
    return stages or [compare("", [best])]


def _start(name: str, values: Sequence[float]) -> float:
    """The default where it is among the values, else the value nearest to it."""
    default = getattr(SamplingOptions(), name)
    return min(values, key=lambda value: abs(value - default))


def split_texts(options: Options, system: OwnSystem) -> tuple[Plan, Plan]:
    """Prompts of the search and others of the report. Raises ValueError when there are too few."""
    wanted = options.search_prompts + options.report_prompts
    if options.prompts:
        texts = prompt_texts(options.prompts, wanted, options.seed)
    else:
        texts = caption_texts(options.reference, options.split, wanted, options.seed)
    usable, _ = common_texts(texts, [system])
    if len(usable) <= options.search_prompts:
        raise ValueError(
            f"{len(usable)} prompts leave none for the report after {options.search_prompts} for the search: give "
            "more, or lower --search-prompts"
        )
    step = len(usable) / options.search_prompts  # evenly, since neighbours in a list are often alike
    chosen = {usable[int(i * step)] for i in range(options.search_prompts)}
    rest = [text for text in usable if text not in chosen]
    return (
        Plan(tuple(t for t in usable if t in chosen), options.num_images),
        Plan(tuple(rest), options.num_images),
    )


def run(options: Options) -> Sweep:
    """Search, then report."""
    options.check_reference()
    networks = options.networks()
    checkpoint = options.checkpoint or str(default_checkpoint())
    setting = Setting(options.seed, batch_size=options.batch_size, device=options.device)
    system = open_system(SystemSpec("sweep", checkpoint), setting)
    if not isinstance(system, OwnSystem):
        raise ValueError(f"{checkpoint} is no generator of ours: only those have these knobs")
    first, second = split_texts(options, system)

    def metrics_of(part: str, plan: Plan, sampling: SamplingOptions) -> tuple[SampleSet, dict[str, Metric]]:
        name = setting_name(sampling)
        own = OwnSystem(system.pipeline, options.seed, sampling, options.batch_size)
        samples = generate_into(options.out / part / name, name, own, plan)
        metrics, _ = measure_all(
            samples, options.real_images(samples), networks, options.measure, options.cache
        )
        return samples, {metric.name: metric for metric in metrics}

    stages = search(options, lambda sampling: metrics_of("search", first, sampling)[1])
    winner = stages[-1].winner.sampling
    contestants = dict.fromkeys((SamplingOptions(), winner))
    report = []
    for sampling in contestants:
        samples, metrics = metrics_of("report", second, sampling)
        report.append((setting_name(sampling), samples, tuple(metrics.values())))
    found = _differences(report) if len(report) > 1 else []
    sizes = (len(first.texts), len(second.texts))
    options = replace(options, judge=options.judge_name())
    return Sweep(options, tuple(stages), winner, tuple(report), tuple(found), sizes)


def _differences(report: Sequence[tuple[str, SampleSet, tuple[Metric, ...]]]) -> list[Difference]:
    (default, _, before), (winner, _, after) = report
    pairs = [(a, next((b for b in after if b.name == a.name), None)) for a in before]
    return [
        Difference(a.name, default, winner, paired_difference(b, a), a.higher_is_better)
        for a, b in pairs
        if b is not None and set(a.by_prompt) == set(b.by_prompt)
    ]


@command
def main(argv: Sequence[str] | None = None) -> Sweep:
    """Sweep; returns what sweep.json holds."""
    from evaluation.compare.sweep_page import show, write_sweep_page

    options = parse_options(Options, argv, description=__doc__)
    with OutputDirectory(options.out) as files:
        files.require_ours(("sweep.json", "sweep.html", "winner.yaml"))
        sweep = run(options)
        show(sweep)
        written = files.write_json("sweep.json", sweep.to_json())
        text = f"# python generate.py TEXT 8 out/ --config {options.out / 'winner.yaml'}\n"
        winner = files.write_text(
            "winner.yaml", text + yaml.safe_dump({"sampling": to_mapping(sweep.winner)})
        )
        with files.writing("sweep.html") as temporary:
            write_sweep_page(temporary, sweep)
    say(f"wrote {options.out / 'sweep.html'}, {written} and {winner}")
    say(f"winning flags: {flags(sweep.winner)}")
    return sweep


if __name__ == "__main__":
    main()
