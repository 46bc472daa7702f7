"""What the ranker is worth: best of 8 by it against random of 8, on category and colour by an independent judge.

    python -m benchmarks.quality.best_of_n                             # the newest generator, ranker and judge of runs/
    python -m benchmarks.quality.best_of_n --checkpoint runs/goods_128_dalle --ranker runs/goods_128_ranker \\
        --judge runs/goods_128_judge --data ../shared/data/goods --num-prompts 300

Prompts are distinct captions of the held-out split that name a category which the judge knows: those that name a colour
first, then the same with another colour, so that there are enough to judge colours by, then the others. The judge was
trained apart from the ranker, and its weights are refused if they are the ranker's. "Random" is the mean of all 8
images, what a random choice gets. The target: the 95 % interval of the difference, over prompts, lies above zero.
Killed, the same command goes on. Writes results.json and report.html.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from common.checkpoint import newest_run
from common.config import command, parse_options, to_mapping
from common.console.tables import plain_console
from common.files import ensure_writable_directory, write_json
from common.log import say
from dalle import default_checkpoint
from dalle.sampling import SamplingOptions
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES
from evaluation import report
from evaluation.compare.choice import Curve, check_independent, chosen_set, curve, judged, score_images
from evaluation.compare.generating import Plan, common_texts, generate_into, some_of
from evaluation.compare.parts import Networks, generated_part, pixel_colors_of
from evaluation.compare.systems import Setting, SystemSpec, open_system
from evaluation.judges.goods import KIND, GoodsJudge
from evaluation.metrics.attributes import SlotWords
from evaluation.metrics.compute import networks_note
from evaluation.metrics.features import CACHE
from evaluation.reference import Facts, ReferenceImages
from evaluation.sets import SampleSet
from rankers import default_ranker, load_ranker
from rankers.training.pairs import AttributeConfig

FEWEST = 200  # prompts that a result needs


@dataclass(frozen=True)
class Options:
    """Measure what reranking is worth."""

    checkpoint: str = ""
    """Generator; empty: the one that was trained last."""
    ranker: str = ""
    """Ranker that chooses, see rankers; empty: the newest one trained here, else the one that ships."""
    judge: str = ""
    """Judge (python -m evaluation.train_judge); empty: the newest of runs/."""
    data: str = "../shared/data/goods"
    """Folder of image shards whose held-out captions are the prompts."""
    split: str = "val"
    """Held-out split."""
    train_split: str = "train"
    """Split whose images of known colour name colours in pixels; empty: none."""
    num_prompts: int = 360
    """Prompts at most; 0: all distinct captions."""
    recolored: int = 2
    """Prompts more of every caption that names a colour, with another colour in its place."""
    num_images: int = 8
    """Images of each prompt, of which the ranker takes the best."""
    seed: int = 0
    """Seed of the images and of which prompts."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    """How tokens are sampled."""
    batch_size: int = 16
    """Images generated side by side; does not change them."""
    replicates: int = 4000
    """Bootstrap replicates of the prompts for the intervals."""
    out: Path = Path("out/best_of_n")
    """Directory for images, results.json and report.html."""
    cache: Path = CACHE
    """Folder where features of images are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.num_images < 2:
            raise ValueError(f"num_images must be at least 2, not {self.num_images}")
        if min(self.num_prompts, self.recolored) < 0 or self.batch_size < 1 or self.replicates < 20:
            raise ValueError(
                "num_prompts and recolored must be 0 or more, batch_size at least 1, replicates at least 20"
            )


def choose_prompts(
    facts: Sequence[Facts], judge: Any, lexicon: SlotWords, count: int, seed: int, recolored: int = 0
) -> list[str]:
    """Distinct captions whose category the judge knows: those that name a colour it knows, `recolored` times each with
    another colour, then captions without; at most `count`, 0 takes all. Raises ValueError where there are none."""
    captions = dict.fromkeys(fact.caption for fact in facts if fact.caption)
    known = [text for text in captions if judge.words.categories_meant(text)[2]]
    if not known:
        raise ValueError("no caption names a category that the judge knows: it was trained on other goods")
    colored = [t for t in known if lexicon.parse(t).words.get("color", "") in judge.words.colors]
    others = [t for t in known if t not in set(colored)]
    groups = [colored, *_recolored(colored, set(captions), judge, lexicon, recolored, seed), others]
    chosen: list[str] = []
    for group in groups:
        room = count - len(chosen)
        chosen += some_of(group, room, seed) if count and room > 0 else [] if count else group
    return chosen


def _recolored(
    colored: Sequence[str], taken: set[str], judge: Any, lexicon: SlotWords, rounds: int, seed: int
) -> list[list[str]]:
    """Rounds of captions with another colour that the judge knows, none of them a caption."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(rounds):
        group = []
        for text in colored:
            parsed = lexicon.parse(text)  # a colour inside the category's name stays
            own, at = parsed.words["color"], parsed.starts["color"]
            found = [text[:at] + c + text[at + len(own) :] for c in judge.words.colors if c != own]
            found = [other for other in found if other not in taken]
            if found:
                group.append(found[int(rng.integers(len(found)))])
                taken = taken | {group[-1]}
        groups.append(group)
    return groups


def prepare(options: Options) -> tuple[Networks, Any, Options]:
    """Judge and ranker, apart from each other, and the options with what was found."""
    judge = options.judge or str(newest_run(KIND) or "")
    if not judge:
        raise FileNotFoundError(
            "no judge was trained under runs/: python -m evaluation.train_judge, or name one with --judge"
        )
    found = GoodsJudge.from_pretrained(judge, options.device)
    networks = Networks((found.network.deep,), found)
    name = options.ranker or str(default_ranker())
    ranker = load_ranker(name, options.device)
    check_independent(ranker, networks)
    checkpoint = options.checkpoint or str(default_checkpoint())
    return networks, ranker, replace(options, judge=judge, ranker=name, checkpoint=checkpoint)


def measure(
    options: Options, samples: SampleSet, networks: Networks, ranker: Any, lexicon: SlotWords
) -> tuple[SampleSet, list[Curve]]:
    """The scored images, and the curve of each measure at widths 1, 2, 4 ... num_images."""
    part = generated_part(samples, options.replicates, options.seed, options.cache)
    scored = score_images(samples, ranker, part)
    widths = [w for w in (1, 2, 4, 8, 16, 32, 64) if w < options.num_images] + [options.num_images]
    train = ReferenceImages.of_split(options.data, options.train_split, 128) if options.train_split else None
    measured = pixel_colors_of(train, range(len(train)), options.cache) if train else None
    values = judged(networks, lexicon, part, measured)
    how = (ranker.name, widths, options.replicates, options.seed)
    curves = [curve(scored, name, found, *how) for name, found in values.items()]
    return scored, [c for c in curves if c is not None]


def show(curves: Sequence[Curve], options: Options) -> None:
    from rich.table import Table

    names = ("by the judge", "prompts", "random", f"best of {options.num_images}", "difference, 95 %")
    table = Table(*names, title=f"random against best of {options.num_images} by {options.ranker}")
    for found in curves:
        first, last = found.points[0], found.points[-1]
        gain = f"{last.gain.value:+.1%} [{last.gain.low:+.1%}, {last.gain.high:+.1%}]"
        shares = [f"{p.value.value:.1%} [{p.value.low:.1%}, {p.value.high:.1%}]" for p in (first, last)]
        table.add_row(found.name, str(last.prompts), *shares, gain)
    plain_console().print(table)


def verdicts(curves: Sequence[Curve]) -> list[str]:
    """A sentence a measure: is the target met."""
    lines = []
    for found in curves:
        last = found.points[-1]
        met = "met" if last.gain.low > 0 else "MISSED"
        few = f", on fewer than {FEWEST} prompts" if last.prompts < FEWEST else ""
        lines.append(f"{found.name}: the target (the interval lies above zero) is {met}{few}")
    return lines


def write_page(options: Options, scored: SampleSet, ranker: Any, curves: Sequence[Curve]) -> Path:
    from data_tools.report import svg

    series = [
        (c.name, [(p.width, p.value.value, p.value.low, p.value.high) for p in c.points]) for c in curves
    ]
    rows = [
        (c.name, p.width, p.prompts, report.interval(p.value), report.difference(p.gain, True))
        for c in curves
        for p in c.points
    ]
    best = replace(chosen_set(scored, ranker, options.num_images), name=f"best of {options.num_images}")
    first = replace(scored.first(1), name="the first one")
    sections = [
        report.section("What was measured", report.facts(to_mapping(options))),
        report.section(
            "Choosing by the ranker, judged by the judge",
            report.side_by_side([("", svg.curves(series, "best of", "share right", log_x=True))]),
            report.table(("measure", "best of", "prompts", "share", "gain over random"), rows),
        ),
        report.section("Images", report.prompt_grids([first, best], report.spread(scored.texts, 60), 1)),
    ]
    return report.write_page(options.out / "report.html", "Best of n by the ranker", sections, report.ENGLISH)


@command
def main(argv: Sequence[str] | None = None) -> list[Curve]:
    """Prints the table; returns the curves."""
    options = parse_options(Options, argv, description=__doc__)
    index = ShardIndex.open(options.data, options.split).require(*IMAGE_SUFFIXES)
    networks, ranker, options = prepare(options)
    ensure_writable_directory(options.out)
    images = ReferenceImages(index, 64, AttributeConfig())
    facts = [images.facts(i) for i in range(len(images))]
    lexicon = SlotWords.of_reference(facts)
    how = (options.num_prompts, options.seed, options.recolored)
    texts = choose_prompts(facts, networks.judge, lexicon, *how)
    spec = SystemSpec("generator", options.checkpoint)
    setting = Setting(options.seed, options.sampling, options.batch_size, options.device)
    system = open_system(spec, setting)
    usable, unusable = common_texts(texts, [system])
    if not usable:
        raise ValueError(f"no prompt can be generated: {unusable[0]}")
    plan = Plan(tuple(usable), options.num_images)
    samples = generate_into(options.out / "images", "generator", system, plan)
    scored, curves = measure(options, samples, networks, ranker, lexicon)
    show(curves, options)
    for line in (*networks_note(networks), *verdicts(curves)):
        say(line)
    results = {
        "options": to_mapping(options),
        "generator": samples.settings,
        "judge": networks.identities,
        "curves": {c.name: [p.to_json() for p in c.points] for c in curves},
        "prompts": len(usable),
    }
    write_json(options.out / "results.json", results)
    say(f"wrote {write_page(options, scored, ranker, curves)} and {options.out / 'results.json'}")
    return curves


if __name__ == "__main__":
    main()
