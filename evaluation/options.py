"""What every command that measures asks for: real images, the networks that look, and where their features stay."""

from dataclasses import dataclass, field
from pathlib import Path

from common.checkpoint import newest_run
from data_tools.shards.index import ShardIndex
from evaluation.compare.parts import MeasureOptions, Networks, Reference
from evaluation.judges.goods import KIND
from evaluation.metrics.features import CACHE
from evaluation.sets import SampleSet
from rankers.training.pairs import AttributeConfig


def judge_name() -> str:
    """The newest judge of runs/; empty where none was trained."""
    return str(newest_run(KIND) or "")


@dataclass(frozen=True)
class MeasuringOptions:
    """Options that evaluation, arena and sweep have in common."""

    reference: str = ""
    """Folder of image shards with real images."""
    split: str = "val"
    """Their held-out split: what images are compared with."""
    train_split: str = "train"
    """Their training split, for memorisation; empty: none."""
    judge: str = ""
    """Judge of categories and colours (python -m evaluation.train_judge); empty: the newest of runs/, or none."""
    clip: str = ""
    """Ranker that scores texts with images, see rankers; never the one that chooses; empty: none."""
    inception: str = ""
    """File with the Inception weights of FID; empty: torch's hub cache, where they are there."""
    attributes: AttributeConfig = field(default_factory=AttributeConfig)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    cache: Path = CACHE
    """Folder where features of images are kept."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check_reference(self) -> None:
        """Raises ValueError or FileNotFoundError where no real images are."""
        if not self.reference:
            raise ValueError("name real images to compare with: --reference FOLDER_OF_SHARDS")
        ShardIndex.open(self.reference, self.split)

    def networks(self) -> Networks:
        """Raises FileNotFoundError or ValueError in one sentence; without any network too."""
        return Networks.load(self.judge_name(), self.clip, self.inception, self.device)

    def judge_name(self) -> str:
        """Empty where none is named and none was trained."""
        return self.judge or judge_name()

    def real_images(self, samples: SampleSet) -> Reference:
        """What the set is compared with."""
        splits = (self.split, self.train_split)
        return Reference.open(self.reference, samples, *splits, attributes=self.attributes)
