"""Parts of a comparison: images with texts, generated or real, and their features, each computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.log import say
from evaluation.judges.goods import GoodsJudge
from evaluation.metrics.attributes import SlotWords
from evaluation.metrics.features import (
    CACHE,
    FeatureColumns,
    FeatureNetwork,
    Features,
    FeatureStore,
    Images,
    Inception,
    JudgeNetwork,
    MirroredImages,
    RankerTower,
    SampleImages,
    SomeImages,
    embed,
    find_inception,
)
from evaluation.metrics.pixel_colors import ColorHistogram, PixelColors
from evaluation.metrics.resampling import Resampling
from evaluation.reference import Facts, ReferenceImages, common_side
from evaluation.sets import SampleSet
from rankers import load_ranker


@dataclass(frozen=True)
class Networks:
    """What measures. None of them may have chosen the images."""

    statistics: tuple[FeatureNetwork, ...] = ()
    """For distances between sets, diversity and memorisation; the first is the main one."""
    judge: GoodsJudge | None = None
    """Names categories and colours."""
    scorer: RankerTower | None = None
    """Scores texts with images."""

    @classmethod
    def load(cls, judge: str = "", clip: str = "", inception: str = "", device: str = "auto") -> "Networks":
        """From a judge's directory, a ranker's name, and the file of FID's weights (empty: torch's hub cache).

        Statistics are on Inception where its weights are, and on the judge's ImageNet network, which needs no judge.
        Raises FileNotFoundError or ValueError in one sentence.
        """
        weights = find_inception(inception)
        found_judge = GoodsJudge.from_pretrained(judge, device) if judge else None
        scorer = RankerTower(load_ranker(clip, device)) if clip else None
        network = found_judge.network if found_judge else JudgeNetwork(device=device)
        statistics: tuple[FeatureNetwork, ...] = (Inception(weights, device),) if weights else ()
        return cls((*statistics, network.deep), found_judge, scorer)

    @property
    def identities(self) -> dict[str, str]:
        """Identity of every network by its name."""
        networks = [
            *self.statistics,
            *([self.judge] if self.judge else []),
            *([self.scorer] if self.scorer else []),
        ]
        return {network.name: network.identity for network in networks}


class Part:
    """Images with their texts."""

    def __init__(
        self,
        texts: Sequence[str],
        images: Images,
        resampling: Resampling,
        cache: Path | None = CACHE,
        rows: NDArray | None = None,
        whole: "Part | None" = None,
    ) -> None:
        """`rows`, `whole`: this is a choice of another part, whose features are taken."""
        self.texts, self.images, self.resampling = list(texts), images, resampling
        self.cache, self.rows, self.whole = cache, rows, whole
        self._features: dict[str, Features] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def features(self, network: FeatureNetwork, mirrored: bool = False) -> Features:
        """(N, D); NaN in the row of an image that cannot be read. Raises ValueError when none can."""
        if isinstance(network, FeatureColumns):
            return self.features(network.whole, mirrored)[:, network.columns]
        if self.whole is not None:
            return self.whole.features(network, mirrored)[self.rows]
        name = network.identity + "m" * mirrored
        if name not in self._features:
            images = MirroredImages(self.images) if mirrored else self.images
            store = FeatureStore(network, self.cache) if self.cache else None
            found, kept = embed(network, images, store)
            rows = np.full((len(self), found.shape[1]), np.nan, np.float32)
            rows[kept] = found
            self._features[name] = rows
        return self._features[name]

    def readable(self, network: FeatureNetwork) -> "Part":
        """Without the images that cannot be read; how many they are is said."""
        sound = np.isfinite(self.features(network)[:, 0])
        if sound.all():
            return self
        say(f"left out {int((~sound).sum())} of {len(self)} real images that cannot be read")
        return self.choice(np.flatnonzero(sound), 1)

    def choice(self, rows: NDArray, replicates: int) -> "Part":
        """Some of the images, as a part of its own."""
        texts = [self.texts[i] for i in rows]
        whole, indices = (self, rows) if self.whole is None else (self.whole, self.rows[rows])
        return Part(texts, self.images, Resampling(texts, replicates), self.cache, indices, whole)


@dataclass(frozen=True)
class Reference:
    """Real images: those that generated ones should look like, and those that the generator was trained on."""

    real: ReferenceImages
    """Held out from training."""
    train: ReferenceImages | None = None
    facts: tuple[Facts, ...] = field(default=(), repr=False)
    """Of `real`."""

    @classmethod
    def open(
        cls, source: str, samples: SampleSet, split: str = "val", train_split: str = "train", **options: Any
    ) -> "Reference":
        """Both splits of a folder of image shards, at the size of the samples.

        `train_split` empty: no training images, so no memorisation. Raises FileNotFoundError or ValueError.
        """
        side = common_side([sample.image for sample in samples.samples[:256]])
        real = ReferenceImages.of_split(source, split, side, **options)
        train = ReferenceImages.of_split(source, train_split, side) if train_split else None
        return cls(real, train, tuple(real.facts(i) for i in range(len(real))))


def rows_like(texts: Sequence[str], prompts: Sequence[str], count: int, seed: int) -> NDArray[np.int64]:
    """Rows of real images with captions `texts` to read with prompts: those whose caption is a prompt, where half
    of the prompts are captions, else `count` chosen from all with a caption."""
    wanted = set(prompts)
    own = [i for i, text in enumerate(texts) if text in wanted]
    if 2 * len({texts[i] for i in own}) >= len(wanted):
        return np.array(own)
    captioned = np.array([i for i, text in enumerate(texts) if text], np.int64)
    return np.sort(np.random.default_rng(seed).permutation(captioned)[:count])


def generated_part(samples: SampleSet, replicates: int, seed: int, cache: Path | None = CACHE) -> Part:
    texts = [sample.text for sample in samples.samples]
    return Part(texts, SampleImages(samples.samples), Resampling(texts, replicates, seed), cache)


def real_part(images: ReferenceImages, facts: Sequence[Facts] | None, cache: Path | None = CACHE) -> Part:
    """`facts` None: images that are looked at without their captions."""
    texts = [fact.caption for fact in facts] if facts else [""] * len(images)
    return Part(texts, images, Resampling(texts, 1), cache)


@dataclass(frozen=True)
class MeasureOptions:
    """How metrics are computed."""

    EARLIER_NAMES: ClassVar = {"draws": "replicates", "set_draws": "set_replicates"}

    replicates: int = 1000
    """Drawings of the prompts for intervals."""
    set_replicates: int = 100
    """Drawings for the Frechet distance, each of which costs a decomposition."""
    seed: int = 0
    """Of the drawings, of R-precision's other texts and of choices among real images."""
    neighbours: int = 5
    """k of precision, recall, density and coverage."""
    top: int = 5
    """R-precision against all texts: the own one among so many."""
    among: int = 100
    """R-precision against a sample of texts: the own one first among so many."""
    near: float = 0.01
    """A sample is near a training image when this share of real held-out images is nearer still."""
    pairs: int = 24
    """Nearest training images that are kept to be looked at."""

    def __post_init__(self) -> None:
        if self.replicates < 20 or not 2 <= self.set_replicates <= self.replicates:
            raise ValueError(
                f"replicates must be at least 20 and set_replicates lie in [2, replicates], not {self.replicates} "
                f"and {self.set_replicates}"
            )
        if min(self.neighbours, self.top) < 1 or self.among < 2:
            raise ValueError("neighbours and top must be at least 1, among at least 2")
        if not 0 < self.near < 1:
            raise ValueError(f"near must lie between 0 and 1, not {self.near}")


MOST_COLORED = 5000  # training images of known colour that name colours


def pixel_colors_of(
    images: ReferenceImages, indices: Sequence[int], cache: Path | None
) -> PixelColors | None:
    """What names colours in pixels, from those of `images` at `indices` whose colour is known; None where too few
    are."""
    found = [(int(index), images.facts(int(index)).color) for index in indices]
    found = [(index, color) for index, color in found if color]
    found = found[:: max(1, -(-len(found) // MOST_COLORED))]
    colors = [color for _, color in found]
    if not PixelColors.enough(colors):
        return None
    chosen = SomeImages(images, [index for index, _ in found])
    part = Part(colors, chosen, Resampling(colors, 1), cache)
    return PixelColors(part.features(ColorHistogram()), colors)


class Bench:
    """The parts that are compared, and what is learned from the real ones."""

    def __init__(
        self,
        samples: SampleSet,
        reference: Reference,
        networks: Networks,
        options: MeasureOptions,
        cache: Path | None,
    ) -> None:
        self.reference, self.networks, self.options = reference, networks, options
        main = networks.statistics[0]
        self.generated = generated_part(samples, options.replicates, options.seed, cache)
        self.real = real_part(reference.real, reference.facts, cache).readable(main)
        self.train = real_part(reference.train, None, cache).readable(main) if reference.train else None
        rows = rows_like(self.real.texts, self.generated.texts, len(self.generated), options.seed)
        self.captioned = self.real.choice(rows, 1) if len(rows) else None
        self.lexicon = SlotWords.of_reference(reference.facts)
        self._colors: PixelColors | None = None

    def pixel_colors(self) -> PixelColors | None:
        """What names colours in pixels, from training images of known colour; None where too few are known."""
        if self._colors is None and self.train is not None:
            images = self.reference.train
            indices = range(len(images)) if self.train.rows is None else self.train.rows
            self._colors = pixel_colors_of(images, indices, self.train.cache)
        return self._colors

    def train_like_generated(self) -> Part | None:
        """As many training images as generated ones: what a perfect generator would give."""
        if self.train is None:
            return None
        count = min(len(self.generated), len(self.train))
        rows = np.random.default_rng(self.options.seed).permutation(len(self.train))[:count]
        return self.train.choice(np.sort(rows), 1)
