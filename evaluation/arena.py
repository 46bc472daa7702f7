"""The same prompts and seeds through any number of pipelines: figures with paired differences, and one page.

    python -m evaluation.arena --prompts prompts.txt --reference ../shared/data/goods \\
        --arm early=runs/dalle/step_00010000 late=runs/dalle guided="runs/dalle?cfg_scale=6" \\
        --judge runs/goods_128_judge --ranker runs/goods_128_ranker
    python -m evaluation.arena --reference DIR --arm ours=out theirs=out_other --num-images 4    # drawn before

An arm is a checkpoint of any kind that draws, with sampling options of its own behind a question mark; a directory of
pictures that were drawn before; or a function in Python: see evaluation/arms.py. The ranker chooses the best of 1, 4,
16; the judge, another network, says what that is worth. Pictures that stand in OUT are kept: killed, the same command
goes on. Writes OUT/report.html, OUT/metrics.json and OUT/arms/NAME/, each an out directory of generate.py.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from common.config import command, parse_options, to_mapping
from common.log import say
from common.output import OutputDirectory
from common.tables import plain_console
from dalle.sampling import SamplingOptions
from evaluation.arms import Arm, ArmSpec, open_arm
from evaluation.attributes import Lexicon
from evaluation.choice import Curve, check_independent, curve, judged, score_pictures, scorer_of
from evaluation.costs import read_costs
from evaluation.drawing import Plan, caption_texts, common_texts, draw_into, prompt_texts
from evaluation.metrics import (
    Figure,
    Networks,
    Reference,
    measure_all,
    networks_note,
    paired_difference,
    settings_of,
)
from evaluation.options import MeasuringOptions
from evaluation.parts import generated_part, pixel_colors_of
from evaluation.sets import SampleSet
from evaluation.statistics import Interval
from rankers import load_ranker


@dataclass(frozen=True)
class Options(MeasuringOptions):
    """Compare pipelines on the same prompts and seeds."""

    arm: tuple[str, ...] = ()
    """NAME=PATH of each arm, see above; the first is the one that others are compared with."""
    prompts: Path | None = None
    """File with one text a line, .tsv or .jsonl (see data_tools/prompts.py); None: captions of the reference's held-out
    split."""
    num_prompts: int = 0
    """So many of the prompts, drawn by the seed; 0: all of a file, 200 captions."""
    num_images: int = 4
    """Pictures of each prompt."""
    widths: tuple[int, ...] = (1, 4, 16)
    """Best of so many; widths above num_images are left out."""
    out: Path = Path("out/arena")
    """Directory for pictures, metrics.json and report.html."""
    ranker: str = ""
    """Ranker that chooses the best of n, see rankers; empty: the likelihoods of our generators."""
    seed: int = 0
    """Seed of the pictures."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How our generators draw, where an arm says nothing else."""
    batch_size: int = 16
    """Pictures drawn side by side; does not change them, but their seconds."""
    show_prompts: int = 24
    """Prompts whose pictures stand on the page."""

    def __post_init__(self) -> None:
        for name, least in (("num_images", 1), ("num_prompts", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be numbers of at least 1, not {list(self.widths)}")


@dataclass(frozen=True)
class ArmResult:
    """One arm, measured."""

    spec: ArmSpec
    samples: SampleSet
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]
    left_out: tuple[str, ...]
    values: dict[str, Any]
    """What the judge says of each picture, by name, in the order of the samples."""

    @property
    def seconds(self) -> float | None:
        """Median seconds a picture; None where they were not recorded."""
        found = [s.seconds for s in self.samples.samples if s.seconds is not None]
        return float(np.median(found)) if found else None

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.spec.what,
            "settings": settings_of(self.samples) | {"drawn": self.samples.settings},
            "seconds_per_picture": self.seconds,
            "costs": vars(read_costs(self.spec.what)),
            "figures": [figure.to_json() for figure in self.figures],
            "best_of": {
                c.name: {"scorer": c.scorer, "points": [p.to_json() for p in c.points]} for c in self.curves
            },
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class Difference:
    """One figure of two arms on the same prompts."""

    figure: str
    first: str
    second: str
    value: Interval
    """Of the second minus that of the first."""
    higher_is_better: bool | None

    @property
    def is_sure(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return self.value.low > 0 or self.value.high < 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "value": vars(self.value), "is_sure": self.is_sure}


@dataclass(frozen=True)
class Match:
    """All that the page and metrics.json are made of."""

    options: Options
    texts: tuple[str, ...]
    unusable: tuple[str, ...]
    """Why prompts were left out."""
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...]
    reference: Reference
    judges: tuple[str, ...]
    """What is known of those who judge."""
    networks: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "prompts": len(self.texts),
            "unusable_prompts": list(self.unusable),
            "arms": {arm.spec.name: arm.to_json() for arm in self.arms},
            "differences": [difference.to_json() for difference in self.differences],
            "judges": list(self.judges),
            "networks": self.networks,
            "options": to_mapping(self.options),
        }


# --- drawing -------------------------------------------------------------------------------------------------------


def parse_arms(options: Options) -> list[ArmSpec]:
    """Raises ValueError for no arms, equal names, and sampling options of pictures that are drawn already."""
    specs = [ArmSpec.parse(text) for text in options.arm]
    names = [spec.name for spec in specs]
    if not specs or len(set(names)) < len(names):
        raise ValueError("name the arms, each with a name of its own: --arm early=runs/a late=runs/b")
    drawn = next((spec for spec in specs if spec.is_drawn and spec.sampling), None)
    if drawn:
        raise ValueError(f"the pictures of arm {drawn.name} are drawn already: leave ?... away")
    return specs


def choose_texts(options: Options) -> list[str]:
    """The prompts. Raises FileNotFoundError or ValueError."""
    if options.prompts:
        return prompt_texts(options.prompts, options.num_prompts, options.seed)
    return caption_texts(options.reference, options.split, options.num_prompts or 200, options.seed)


def draw_all(
    options: Options, specs: Sequence[ArmSpec], texts: Sequence[str]
) -> tuple[list[SampleSet], list[str], list[str]]:
    """(the sets, prompts that every arm can draw, why others cannot be)."""
    arms: dict[str, Arm] = {
        spec.name: open_arm(spec, options.seed, options.sampling, options.batch_size, options.device)
        for spec in specs
        if not spec.is_drawn
    }
    usable, unusable = common_texts(texts, list(arms.values()))
    if not usable:
        raise ValueError(f"no prompt can be drawn by all arms: {unusable[0]}")
    plan = Plan(tuple(usable), options.num_images)
    sets = []
    for spec in specs:
        if spec.is_drawn:
            sets.append(plan.of(SampleSet.from_out_dir(Path(spec.what), spec.name)))
        else:
            folder = options.out / "arms" / spec.name
            sets.append(draw_into(folder, spec.name, arms[spec.name], plan))
    return sets, usable, unusable


# --- measuring -----------------------------------------------------------------------------------------------------


def measure_arm(
    options: Options,
    spec: ArmSpec,
    samples: SampleSet,
    reference: Reference,
    networks: Networks,
    ranker: Any | None,
) -> ArmResult:
    """Figures of all pictures of an arm, and curves of choosing among them."""
    figures, left_out = measure_all(samples, reference, networks, options.measure, options.cache)
    part = generated_part(samples, options.measure.draws, options.measure.seed, options.cache)
    train = reference.train
    measured = pixel_colors_of(train, range(len(train)), options.cache) if train else None
    values = judged(networks, Lexicon.of_reference(reference.facts), part, measured)
    if ranker is not None:
        samples = score_pictures(samples, ranker, part)
    scorer = scorer_of(samples, ranker)
    if not scorer:
        left_out.append("best of n: these pictures have no likelihoods, and no --ranker was named")
    how = (options.widths if scorer else (1,), options.measure.draws, options.measure.seed)
    curves = [curve(samples, name, found, scorer, *how) for name, found in values.items()]
    return ArmResult(spec, samples, tuple(figures), tuple(c for c in curves if c), tuple(left_out), values)


def differences(arms: Sequence[ArmResult]) -> list[Difference]:
    """Every figure that two arms share, the later minus the earlier one."""
    found = []
    for first, second in itertools.combinations(arms, 2):
        theirs = {figure.name: figure for figure in second.figures}
        for figure in first.figures:
            other = theirs.get(figure.name)
            if other is None or set(other.by_prompt) != set(figure.by_prompt):
                continue
            value = paired_difference(other, figure)
            names = (figure.name, first.spec.name, second.spec.name)
            found.append(Difference(*names, value, figure.higher_is_better))
    return found


def run(options: Options) -> Match:
    """Draw what is missing, measure, compare. Whatever can be refused is refused before anything is drawn."""
    specs = parse_arms(options)
    options.check_reference()
    texts = choose_texts(options)
    networks = options.networks()
    ranker = load_ranker(options.ranker, options.device) if options.ranker else None
    if ranker is not None:
        check_independent(ranker, networks)
    sets, usable, unusable = draw_all(options, specs, texts)
    reference = options.real_pictures(sets[0])
    arms = [
        measure_arm(options, spec, samples, reference, networks, ranker)
        for spec, samples in zip(specs, sets, strict=True)
    ]
    found = differences(arms)
    judges = tuple(networks_note(networks))
    options = replace(options, judge=options.judge_name())
    return Match(
        options,
        tuple(usable),
        tuple(unusable),
        tuple(arms),
        tuple(found),
        reference,
        judges,
        networks.identities,
    )


def show(match: Match) -> None:
    """Figures of all arms in the terminal."""
    from rich.table import Table

    title = f"{len(match.texts)} prompts, {match.options.num_images} pictures each, seed {match.options.seed}"
    table = Table(title=title)
    table.add_column("figure", overflow="fold")
    for arm in match.arms:
        table.add_column(arm.spec.name, justify="right")
    for name in dict.fromkeys(figure.name for arm in match.arms for figure in arm.figures):
        by_arm = [next((f for f in arm.figures if f.name == name), None) for arm in match.arms]
        table.add_row(name, *(str(f.value) if f else "-" for f in by_arm))
    seconds = [arm.seconds for arm in match.arms]
    table.add_row("seconds a picture, median", *("-" if s is None else f"{s:.3g}" for s in seconds))
    costs = [read_costs(arm.spec.what) for arm in match.arms]
    for name in ("parameters", "training_hours", "images_seen"):
        values = [getattr(c, name) for c in costs]
        table.add_row(name.replace("_", " "), *("-" if v is None else f"{v:,.4g}" for v in values))
    plain_console().print(table)
    say(winners(match))


def winners(match: Match) -> str:
    """One line: which system wins at what beyond doubt (95 % intervals of paired differences), and which is fastest."""
    won: dict[str, list[str]] = {}
    for name in dict.fromkeys(d.figure for d in match.differences if d.higher_is_better is not None):
        beaten, best = set(), set()
        for d in (d for d in match.differences if d.figure == name and d.is_sure):
            second_wins = (d.value.low > 0) == d.higher_is_better
            best.add(d.second if second_wins else d.first)
            beaten.add(d.first if second_wins else d.second)
        for system in sorted(best - beaten):
            won.setdefault(system, []).append(name.split("[")[0])
    timed = {arm.spec.name: arm.seconds for arm in match.arms if arm.seconds is not None}
    if len(timed) > 1:
        won.setdefault(min(timed, key=timed.get), []).append("seconds an image")
    parts = [f"{system} wins at {', '.join(dict.fromkeys(names))}" for system, names in won.items()]
    return "; ".join(parts) or "no system wins at anything beyond doubt"


def join_arms(argv: Sequence[str] | None) -> list[str] | None:
    """`--system A --arm B` as `--arm A B`: the parser knows one name, and would keep the last one only."""
    if argv is None:
        import sys

        argv = sys.argv[1:]
    rest, arms, taking = [], [], False
    for word in argv:
        if word in ("--arm", "--system"):
            taking = True
        elif word.startswith(("--arm=", "--system=")):
            arms.append(word.partition("=")[2])
            taking = False
        elif taking and not word.startswith("--"):
            arms.append(word)
        else:
            rest.append(word)
            taking = False
    return [*rest, *(["--arm", *arms] if arms else [])]


@command
def main(argv: Sequence[str] | None = None) -> Match:
    """Compare; returns what the page is made of."""
    from evaluation.arena_page import write_arena_page
    from evaluation.report import METRICS, PAGE

    options = parse_options(Options, join_arms(argv), description=__doc__)
    with OutputDirectory(options.out) as files:
        files.require_ours((METRICS, PAGE))
        match = run(options)
        show(match)
        for line in (*match.judges, *dict.fromkeys(r for arm in match.arms for r in arm.left_out)):
            say(line)
        files.write_json(METRICS, match.to_json())
        with files.writing(PAGE) as temporary:
            write_arena_page(temporary, match)
    say(f"wrote {options.out / PAGE} and {options.out / METRICS}")
    return match


if __name__ == "__main__":
    main()
