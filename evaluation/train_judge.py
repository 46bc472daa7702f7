"""Train the judge of goods: category and colour of an image, from the facts in the shards' JSON.

    python -m evaluation.train_judge                                        # the embedded default
    python -m evaluation.train_judge --config configs/goods_128/judge.yaml  # 10 minutes on a core of a CPU
    python -m evaluation.train_judge --data DIR --attributes.label-field category

Needs image shards whose JSON names the category; the colour is learned where it is named. Features of a frozen ImageNet
network are taken once and kept by the content of each image (a run that was killed goes on there), then two linear
heads are fitted to them: multinomial logistic regression, a convex problem with one solution, so there is no seed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from common import checkpoint
from common.config import command, parse_options, to_mapping
from common.files import ensure_writable_directory, write_json
from common.image import make_grid
from common.lock import locked
from common.log import say
from data_tools.shards.holdout import open_splits
from data_tools.shards.index import ShardIndex
from data_tools.shards.loader import IMAGE_SUFFIXES
from data_tools.synthetic.shards import EMBEDDED, ensure_synthetic
from evaluation.judges.goods import GoodsJudge, JudgeHeads, Vocabulary, save_judge
from evaluation.metrics.features import CACHE, INPUT_SIZE, FeatureStore, JudgeNetwork, embed
from evaluation.metrics.statistics import wilson
from evaluation.reference import Facts, ReferenceImages
from rankers.training.pairs import AttributeConfig
from vq.losses.labels import LABEL_KEYS

MAX_CATEGORIES = 5000
TOP = 5


@dataclass(frozen=True)
class Options:
    """Image shards -> judge of categories and colours."""

    data: str = ""
    """Folder of image shards (train-*.tar, val-*.tar); empty: the embedded default in data/synthetic."""
    attributes: AttributeConfig = field(default_factory=AttributeConfig)
    """Which fields of the JSON name category and colour."""
    word_field: str = "item_zh"
    """Field with the noun that a caption uses for the category, where it is another than the label; empty: none."""
    image_sizes: tuple[int, ...] = (128,)
    """Sides in pixels at which images are learned, those at which images will be judged."""
    input_size: int = INPUT_SIZE
    """Side in pixels to which images are resized for the frozen network."""
    l2: float = 3e-3
    """Weight of the squared weights of the head of categories."""
    color_l2: float = 3e-3
    """The same of the head of colours, which has fewer images to learn from."""
    max_iterations: int = 150
    """Iterations of L-BFGS a head."""
    max_images: int = 0
    """Training images at most, the first ones; 0: all."""
    run_dir: Path = Path("runs/judge")
    """Directory of the judge."""
    cache: Path = CACHE
    """Folder where features of images are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if not self.image_sizes or min(self.image_sizes) < 32:
            raise ValueError(f"image_sizes must be at least 32, not {list(self.image_sizes)}")
        if self.input_size < 32:
            raise ValueError(f"input_size must be at least 32, not {self.input_size}")
        if min(self.l2, self.color_l2) <= 0 or self.max_iterations < 1 or self.max_images < 0:
            raise ValueError(
                "l2 and color_l2 must be above 0, max_iterations at least 1 and max_images not negative"
            )
        if not self.attributes.label_field:
            raise ValueError(
                "the judge learns categories: name the field that holds them, --attributes.label-field"
            )


@dataclass(frozen=True)
class Labelled:
    """Images of one split at one size, with what the shards say of them."""

    images: ReferenceImages
    facts: tuple[Facts, ...]

    @classmethod
    def of_split(cls, options: Options, split: str, side: int) -> "Labelled":
        """Raises FileNotFoundError or ValueError when the shards cannot be read."""
        source = options.data or str(EMBEDDED)
        index = open_splits(source)[split == "val"].require(*IMAGE_SUFFIXES)
        for problem in index.problems if side == options.image_sizes[0] else ():
            say(problem)
        limit = options.max_images if split == "train" else 0
        images = ReferenceImages(index, side, options.attributes, options.word_field, limit)
        found = tuple(images.facts(i) for i in range(len(images)))
        if not any(fact.category for fact in found):
            images, found = _by_other_field(options, index, side, limit) or (images, found)
        return cls(images, found)


def _by_other_field(
    options: Options, index: ShardIndex, side: int, limit: int
) -> tuple[ReferenceImages, tuple[Facts, ...]] | None:
    """By the first usual name of a label that these shards have, where they lack the field of the options."""
    for name in LABEL_KEYS:
        attributes = AttributeConfig(name, options.attributes.color_field, options.attributes.fact_fields)
        images = ReferenceImages(index, side, attributes, options.word_field, limit)
        found = tuple(images.facts(i) for i in range(len(images)))
        if any(fact.category for fact in found):
            say(
                f"no image of {images.name} has {options.attributes.label_field!r}: categories are read from {name!r}"
            )
            return images, found
    return None


def scan_vocabulary(facts: Sequence[Facts], where: str, label_field: str) -> Vocabulary:
    """Categories, colours and the words for categories. Raises ValueError for fewer than two categories."""
    categories = Counter(fact.category for fact in facts if fact.category)
    if not categories:
        raise ValueError(
            f"none of the {len(facts)} images of {where} has a category: a judge needs the field {label_field!r} (or "
            f"{', '.join(LABEL_KEYS)}) in every KEY.json; name yours with --attributes.label-field"
        )
    if len(categories) == 1:
        raise ValueError(
            f"all labelled images of {where} are of one category, {next(iter(categories))!r}: a judge needs at least "
            "two to tell apart; name a finer field with --attributes.label-field"
        )
    if len(categories) > MAX_CATEGORIES:
        raise ValueError(
            f"{label_field!r} has {len(categories)} values in {where}, more than {MAX_CATEGORIES}: it looks like a "
            "title, not a category; name another field with --attributes.label-field"
        )
    names: dict[str, set[str]] = {}
    for fact in facts:
        for word in {fact.category, fact.word} - {""} if fact.category else ():
            names.setdefault(word, set()).add(fact.category)
    colors = sorted({fact.known_color for fact in facts if fact.known_color})
    words = {word: sorted(meant) for word, meant in sorted(names.items())}
    return Vocabulary(tuple(sorted(categories)), tuple(colors) if len(colors) > 1 else (), words)


def fit_head(
    features: Tensor, targets: Tensor, num_classes: int, l2: float, max_iterations: int
) -> tuple[Tensor, Tensor]:
    """(N, D) standardised features, (N,) classes -> weight (C, D) and bias (C,) of logistic regression.

    Minimises the mean cross-entropy plus l2 / 2 times the squared weights by L-BFGS from zero.
    """
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, targets) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def fit_heads(
    network: JudgeNetwork, words: Vocabulary, features: NDArray, facts: Sequence[Facts], options: Options
) -> JudgeHeads:
    """Both heads, each on the images (N, D) whose class is known."""
    rows = torch.from_numpy(features)
    heads = JudgeHeads(network.num_deep, network.num_shallow, len(words.categories), len(words.colors))
    heads.mean.copy_(rows.mean(0))
    heads.scale.copy_(rows.std(0) + 1e-3)
    deep, shallow = heads.standardised(rows)
    tasks = [("category", heads.category, deep, words.categories, options.l2)]
    tasks += [("color", heads.color, shallow, words.colors, options.color_l2)] * (heads.color is not None)
    for name, head, inputs, classes, l2 in tasks:
        number = {value: i for i, value in enumerate(classes)}
        values = [fact.category if name == "category" else fact.known_color for fact in facts]
        known = [i for i, value in enumerate(values) if value]
        targets = torch.tensor([number[values[i]] for i in known])
        say(f"fitting the head of {len(classes)} values of {name} to {len(known)} rows of features")
        fitted = fit_head(inputs[known], targets, len(classes), l2, options.max_iterations)
        with torch.no_grad():
            head.weight.copy_(fitted[0])
            head.bias.copy_(fitted[1])
    return heads.eval()


def take_features(
    network: JudgeNetwork, sizes: Sequence[Labelled], options: Options
) -> tuple[NDArray, list[Facts]]:
    """Features (N, D) and facts of the readable images, every image at every size."""
    rows, facts = [], []
    for data in sizes:
        found, kept = embed(network, data.images, FeatureStore(network, options.cache))
        rows.append(found)
        facts += [data.facts[i] for i in kept]
    return np.concatenate(rows), facts


def validate(
    judge: GoodsJudge, features: NDArray, facts: Sequence[Facts]
) -> tuple[dict[str, float], NDArray]:
    """Shares named right with 95 % intervals, and which images (N,) have a category that is named wrong."""
    number = {name: i for i, name in enumerate(judge.words.categories)}
    wanted = np.array([number.get(fact.category, -1) for fact in facts])
    order = np.argsort(-judge.probabilities(features), axis=1, kind="stable")
    hits = {
        "category": (order[:, 0] == wanted)[wanted >= 0],
        f"category_top{TOP}": (order[:, :TOP] == wanted[:, None]).any(1)[wanted >= 0],
    }
    if judge.words.colors:
        index_of = {name: i for i, name in enumerate(judge.words.colors)}
        colors = np.array([index_of.get(fact.known_color, -1) for fact in facts])
        hits["color"] = (judge.color_probabilities(features).argmax(1) == colors)[colors >= 0]
    metrics: dict[str, float] = {}
    for name, found in hits.items():
        if len(found):
            share = wilson(int(found.sum()), len(found))
            metrics |= {f"{name}_accuracy": share.value, f"{name}_low": share.low, f"{name}_high": share.high}
            metrics[f"{name}_count"] = float(len(found))
    return metrics, (order[:, 0] != wanted) & (wanted >= 0)


@command
def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Fit the heads; returns the shares named right on the validation images."""
    options = parse_options(Options, argv, description=__doc__)
    with locked(ensure_writable_directory(options.run_dir)):
        if not options.data:
            say("no --data given: training on the embedded default, made by data_tools.synthetic")
            if not any(EMBEDDED.glob("train-*.tar")):
                ensure_synthetic(EMBEDDED)
        sizes = [Labelled.of_split(options, "train", side) for side in options.image_sizes]
        words = scan_vocabulary(sizes[0].facts, sizes[0].images.name, options.attributes.label_field)
        val = [Labelled.of_split(options, "val", side) for side in options.image_sizes]
        network = JudgeNetwork(options.input_size, options.device)
        return _train(options, network, words, sizes, val)


def _train(
    options: Options,
    network: JudgeNetwork,
    words: Vocabulary,
    train: Sequence[Labelled],
    val: Sequence[Labelled],
) -> dict[str, float]:
    checkpoint.clean(options.run_dir)
    labelled = sum(bool(fact.category) for fact in train[0].facts)
    say(
        f"{len(train[0].facts)} images, {labelled} with one of {len(words.categories)} categories, "
        f"{len(words.colors)} colours; features of {network.name} at {network.input_size} pixels"
    )
    heads = fit_heads(network, words, *take_features(network, train, options), options)
    judge = GoodsJudge(network, heads, words, "")
    shown, metrics = [], {}
    for data in val:
        features, facts = take_features(network, [data], options)
        found, wrong = validate(judge, features, facts)
        if "category_accuracy" not in found:
            raise ValueError(f"no validation image of {data.images.name} has a category that was learned")
        for name in ("category", f"category_top{TOP}", "color"):
            if f"{name}_accuracy" in found:
                share = [found[f"{name}_{part}"] for part in ("accuracy", "low", "high")]
                say(
                    f"{data.images.side} px | {name} right {share[0]:.1%} [{share[1]:.1%}, {share[2]:.1%}] of "
                    f"{found[f'{name}_count']:.0f} real held-out images"
                )
        index_of = {
            fact.key: i for i, fact in enumerate(data.facts)
        }  # images that cannot be read have no features
        shown = shown or [data.images.open(index_of[facts[i].key]) for i in np.flatnonzero(wrong)[:64]]
        metrics = metrics or found
    with checkpoint.new_step_directory(options.run_dir, 1) as directory:
        save_judge(directory, network, heads, words, 1, metrics)
        write_json(directory / "train_config.json", to_mapping(options))
        if shown:
            make_grid(shown).save(directory / "category_wrong.png")
    say(f"wrote {options.run_dir / 'latest'}")
    return metrics


if __name__ == "__main__":
    main()
