"""The same prompts and seeds through any number of systems: quality with paired differences, costs, and one page.

    python -m evaluation.arena                                                       # what ships, on what is there
    python -m evaluation.arena --prompts prompts.txt --reference ../shared/data/goods \\
        --system ar=runs/dalle sd=runs/goods_128_diffusion gan=runs/goods_128_gan guided="runs/dalle?cfg_scale=6" \\
        --judge runs/goods_128_judge --ranker runs/goods_128_ranker
    python -m evaluation.arena --reference DIR --system ours=out theirs=out_other --num-images 4    # made before

A system is a checkpoint of any kind that makes images, with sampling options of its own behind a question mark; a
pipeline of diffusers; a directory of images that exist already; or a function in Python: see
evaluation/compare/systems.py. The ranker chooses the best of 1, 4, 8; the judge, another network, says what that is
worth. Images that stand in OUT are kept: killed, the same command goes on. Writes OUT/report.html,
OUT/metrics.json, the plots of quality against training hours and seconds an image, and OUT/systems/NAME/, each an
out directory of generate.py. Then: python -m evaluation.arena_table OUT, and python -m evaluation.human OUT.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.config import command, parse_options
from common.console.tables import plain_console
from common.log import say
from common.machine.memory import peak_memory
from common.outputs.image_list import LIST
from common.outputs.record import OutputDirectory
from common.text.language import Language, words_of
from dalle.sampling import SamplingOptions
from evaluation.compare.arena_results import Difference, Match, SystemResult
from evaluation.compare.choice import check_independent, curve, judged, score_images, scorer_of
from evaluation.compare.costs import COSTS, Costs, read_costs
from evaluation.compare.generating import (
    SYSTEMS,
    Plan,
    caption_texts,
    generate_into,
    prompt_texts,
    readable_texts,
)
from evaluation.compare.parts import generated_part, pixel_colors_of
from evaluation.compare.systems import Setting, SystemSpec, open_system
from evaluation.metrics.attributes import SlotWords
from evaluation.metrics.compute import (
    Networks,
    Reference,
    measure_all,
    networks_note,
    paired_difference,
)
from evaluation.options import MeasuringOptions
from evaluation.released import complete
from evaluation.sets import SampleSet
from rankers import load_ranker


@dataclass(frozen=True)
class Options(MeasuringOptions):
    """Compare systems on the same prompts and seeds."""

    system: tuple[str, ...] = ()
    """NAME=PATH of each system, see above; the first is the one that others are compared with. None: those that ship
    and those in runs/, on the data that they were trained on."""
    prompts: Path | None = None
    """File with one text a line, .tsv or .jsonl (see data_tools/prompts.py); None: captions of the reference's held-out
    split."""
    num_prompts: int = 0
    """So many of the prompts, chosen by the seed; 0: all of a file, 200 captions, 40 where no system is named."""
    num_images: int = 8
    """Images of each prompt."""
    widths: tuple[int, ...] = (1, 4, 8)
    """Best of so many; widths above num_images are left out."""
    out: Path = Path("out/arena")
    """Directory for images, metrics.json and report.html."""
    ranker: str = ""
    """Ranker that chooses the best of n, see rankers; empty: the likelihoods of our generators."""
    seed: int = 0
    """Seed of the images."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How our generators sample, where a system says nothing else."""
    batch_size: int = 16
    """Images generated side by side; does not change them, but their seconds and memory."""
    show_prompts: int = 24
    """Prompts whose images stand on the page."""
    language: Language = "auto"
    """Of the page: zh, en, or auto, which follows the locale."""

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("num_prompts", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be numbers of at least 1, not {list(self.widths)}")

    @property
    def setting(self) -> Setting:
        """What all systems share."""
        return Setting(self.seed, self.sampling, self.batch_size, self.device, self.reference, self.split)


# --- generating ----------------------------------------------------------------------------------------------------


def parse_systems(options: Options) -> list[SystemSpec]:
    """Raises ValueError for no systems, equal names, and sampling options of images that exist already."""
    specs = [SystemSpec.parse(text) for text in options.system]
    names = [spec.name for spec in specs]
    if not specs or len(set(names)) < len(names):
        raise ValueError("name the systems, each with a name of its own: --system early=runs/a late=runs/b")
    made = next((spec for spec in specs if spec.is_made and spec.sampling), None)
    if made:
        raise ValueError(f"the images of system {made.name} exist already: leave ?... away")
    return specs


def choose_texts(options: Options) -> list[str]:
    """The prompts. Raises FileNotFoundError or ValueError."""
    if options.prompts:
        return prompt_texts(options.prompts, options.num_prompts, options.seed)
    return caption_texts(options.reference, options.split, options.num_prompts or 200, options.seed)


def generate_all(
    options: Options, specs: Sequence[SystemSpec], texts: Sequence[str]
) -> tuple[list[SampleSet], list[str], list[str]]:
    """(the sets, prompts that every system can read, why others cannot be).

    One system is in memory at a time, so each is opened twice: for its complaints, and for its images.
    """
    usable, unusable = list(texts), []
    for spec in specs:
        if not spec.is_made:
            system = open_system(spec, options.setting)
            usable, complaints = readable_texts(usable, system)
            unusable += complaints
            del system
    if not usable:
        raise ValueError(f"no prompt can be read by all systems: {unusable[0]}")
    plan = Plan(tuple(usable), options.num_images)
    return [generate_one(options, spec, plan) for spec in specs], usable, unusable


def generate_one(options: Options, spec: SystemSpec, plan: Plan) -> SampleSet:
    """The images of a system, and what they took beside them."""
    if spec.is_made:
        return plan.of(SampleSet.from_out_dir(Path(spec.what), spec.name))
    folder = options.out / SYSTEMS / spec.name
    before = _size(folder / LIST)
    with peak_memory(options.device) as peak:
        samples = generate_into(folder, spec.name, open_system(spec, options.setting), plan)
    if _size(folder / LIST) != before:
        costs = read_costs(spec.what, spec.loras)
        with OutputDirectory(folder) as files:
            files.require_ours((COSTS,))
            files.write_json(COSTS, replace(costs, memory_bytes=peak.bytes).to_json())
    return samples


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def costs_of(options: Options, spec: SystemSpec) -> Costs:
    """As they were recorded beside the images, else by the checkpoint; hours as the user says."""
    folder = options.out / SYSTEMS / spec.name
    recorded = not spec.is_made and (folder / COSTS).is_file()
    costs = read_costs(folder) if recorded else read_costs(spec.what, spec.loras)
    if spec.training_hours is not None:
        costs = replace(costs, training_hours=spec.training_hours, note="hours as given")
    return costs


# --- measuring -----------------------------------------------------------------------------------------------------


def measure_system(
    options: Options,
    spec: SystemSpec,
    samples: SampleSet,
    reference: Reference,
    networks: Networks,
    ranker: Any | None,
) -> SystemResult:
    """Metrics of all images of a system, and curves of choosing among them."""
    metrics, left_out = measure_all(samples, reference, networks, options.measure, options.cache)
    part = generated_part(samples, options.measure.replicates, options.measure.seed, options.cache)
    train = reference.train
    measured = pixel_colors_of(train, range(len(train)), options.cache) if train else None
    values = judged(networks, SlotWords.of_reference(reference.facts), part, measured)
    if ranker is not None:
        samples = score_images(samples, ranker, part)
    scorer = scorer_of(samples, ranker)
    if not scorer:
        left_out.append("best of n: these images have no likelihoods, and no --ranker was named")
    how = (options.widths if scorer else (1,), options.measure.replicates, options.measure.seed)
    curves = [curve(samples, name, found, scorer, *how) for name, found in values.items()]
    known = tuple(c for c in curves if c)
    return SystemResult(
        spec, samples, tuple(metrics), known, tuple(left_out), values, costs_of(options, spec)
    )


def differences(systems: Sequence[SystemResult]) -> list[Difference]:
    """Every metric that two systems share, the later minus the earlier one."""
    found = []
    for first, second in itertools.combinations(systems, 2):
        theirs = {metric.name: metric for metric in second.metrics}
        for metric in first.metrics:
            other = theirs.get(metric.name)
            if other is None or set(other.by_prompt) != set(metric.by_prompt):
                continue
            value = paired_difference(other, metric)
            names = (metric.name, first.spec.name, second.spec.name)
            found.append(Difference(*names, value, metric.higher_is_better))
    return found


def run(options: Options) -> Match:
    """Generate what is missing, measure, compare. Whatever can be refused is refused before anything is generated."""
    specs = parse_systems(options)
    options.check_reference()
    texts = choose_texts(options)
    networks = options.networks()
    ranker = load_ranker(options.ranker, options.device) if options.ranker else None
    if ranker is not None:
        check_independent(ranker, networks)
    sets, usable, unusable = generate_all(options, specs, texts)
    reference = options.real_images(sets[0])
    systems = [
        measure_system(options, spec, samples, reference, networks, ranker)
        for spec, samples in zip(specs, sets, strict=True)
    ]
    found = differences(systems)
    judges = tuple(networks_note(networks))
    options = replace(options, judge=options.judge_name())
    return Match(
        options,
        tuple(usable),
        tuple(unusable),
        tuple(systems),
        tuple(found),
        reference,
        judges,
        networks.identities,
    )


def show(match: Match) -> None:
    """Metrics of all systems in the terminal."""
    from rich.table import Table

    title = f"{len(match.texts)} prompts, {match.options.num_images} images each, seed {match.options.seed}"
    table = Table(title=title)
    table.add_column("metric", overflow="fold")
    for system in match.systems:
        table.add_column(system.spec.name, justify="right")
    for name in dict.fromkeys(metric.name for system in match.systems for metric in system.metrics):
        found = [next((f for f in system.metrics if f.name == name), None) for system in match.systems]
        table.add_row(name, *(str(f.value) if f else "-" for f in found))
    seconds = [system.seconds for system in match.systems]
    table.add_row("seconds an image, median", *("-" if s is None else f"{s:.3g}" for s in seconds))
    for name in ("parameters", "training_hours", "images_seen", "memory_bytes"):
        values = [getattr(system.costs, name) for system in match.systems]
        table.add_row(name.replace("_", " "), *("-" if v is None else f"{v:,.4g}" for v in values))
    plain_console().print(table)
    say(match.winners(words_of("en", "arena")))


def join_systems(argv: Sequence[str] | None) -> list[str] | None:
    """`--system A --arm B` as `--system A B`: the parser knows one name, and would keep the last one only."""
    argv = sys.argv[1:] if argv is None else argv
    rest, systems, taking = [], [], False
    for word in argv:
        if word in ("--system", "--arm"):
            taking = True
        elif word.startswith(("--system=", "--arm=")):
            systems.append(word.partition("=")[2])
            taking = False
        elif taking and not word.startswith("--"):
            systems.append(word)
        else:
            rest.append(word)
            taking = False
    return [*rest, *(["--system", *systems] if systems else [])]


@command
def main(argv: Sequence[str] | None = None) -> Match:
    """Compare; returns what the page is made of."""
    from evaluation.compare.arena_page import write_arena_page
    from evaluation.compare.arena_plots import PLOTS, write_plots
    from evaluation.report import METRICS, PAGE

    options = complete(parse_options(Options, join_systems(argv), description=__doc__))
    with OutputDirectory(options.out) as files:
        files.require_ours((METRICS, PAGE, *PLOTS))
        match = run(options)
        show(match)
        for line in (*match.judges, *dict.fromkeys(r for system in match.systems for r in system.left_out)):
            say(line)
        files.write_json(METRICS, match.to_json())
        plots = write_plots(files, match)
        with files.writing(PAGE) as temporary:
            write_arena_page(temporary, match, plots)
    say(f"wrote {options.out / PAGE} and {options.out / METRICS}")
    say(f"next: python -m evaluation.human {options.out}")
    return match


if __name__ == "__main__":
    main()
