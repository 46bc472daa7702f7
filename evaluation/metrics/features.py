"""Images as vectors: the feature networks that statistics are computed on, and features kept on disk by content.

FID, KID and IS are these statistics on the published Inception weights and on nothing else; on any other network
they carry its name (`frechet_distance[efficientnet_lite1]`). Weights are never downloaded silently.
"""

import hashlib
import io
import pickle
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common.distributed import pick_device
from common.files import sha256_file
from common.image import to_tensor
from common.square import resize_square
from data_tools.engine import RayCluster
from data_tools.images.decode import BadImage
from data_tools.images.phash import image_signature
from data_tools.parallel import ordered_map
from data_tools.shards.loader import CorruptSample
from rankers.base import as_rgb, content_hash, identities
from vq.losses.imagenet_features import (
    CENTRE_WIDTH,
    JUDGE_NETWORK,
    SHALLOW_STAGES,
    load_imagenet_features,
    pooled_statistics,
)

CACHE = Path(".cache/features")
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA = "6726825d"  # the file's name ends with the first digits of its sha256
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"

Features = NDArray[np.float32]


class FeatureNetwork(Protocol):
    """What turns images into vectors."""

    name: str
    identity: str
    """Hex sha256 of what the features depend on."""

    def features(self, images: Sequence[Image.Image]) -> Features:
        """Images of any size and mode -> (N, D)."""
        ...

    def probabilities(self, features: Features) -> NDArray[np.float64] | None:
        """(N, D) -> (N, C) class probabilities; None for a network without classes."""
        ...


class Images(Protocol):
    """A sequence of images that are opened when they are looked at."""

    def __len__(self) -> int: ...

    def key(self, i: int) -> bytes:
        """Equal for equal images: the key of the features on disk."""
        ...

    def open(self, i: int) -> Image.Image:
        """RGB. Raises CorruptSample or BadImage."""
        ...


class ListedImages:
    """Images in memory."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def key(self, i: int) -> bytes:
        return content_hash(self.images[i])

    def open(self, i: int) -> Image.Image:
        return as_rgb(self.images[i])


class SampleImages:
    """The images of samples (evaluation.sets), by their files."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, i: int) -> bytes:
        return hashlib.sha256(self.samples[i].path.read_bytes()).digest()

    def open(self, i: int) -> Image.Image:
        return self.samples[i].image


class SomeImages:
    """Those at the given indices of a sequence."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images, self.indices = images, [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, i: int) -> bytes:
        return self.images.key(self.indices[i])

    def open(self, i: int) -> Image.Image:
        return self.images.open(self.indices[i])


class MirroredImages:
    """The same images, left and right exchanged."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def key(self, i: int) -> bytes:
        return self.images.key(i) + b"mirrored"

    def open(self, i: int) -> Image.Image:
        return self.images.open(i).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


# --- networks ------------------------------------------------------------------------------------------------------

INPUT_SIZE = 160


class JudgeNetwork:
    """The ImageNet network that evaluation alone uses, EfficientNet-Lite1, pooled for two purposes.

    Columns `deep`: the final features averaged over positions, which ImageNet's classes were read from; statistics and
    categories stand on them. Columns `shallow`: mean, deviation and centre-weighted mean of the first stages, where
    colour is not lost yet. Float32, so that features do not hang on the batch or on what the machine computes in.
    """

    def __init__(self, input_size: int = INPUT_SIZE, device: str = "auto") -> None:
        """Raises FileNotFoundError saying what to install."""
        self.device, self.input_size = pick_device(device), input_size
        self.network = load_imagenet_features(JUDGE_NETWORK, self.device)
        self.name = JUDGE_NETWORK
        pooled = f"deep mean; {SHALLOW_STAGES} mean, deviation, centre {CENTRE_WIDTH}"
        what = f"{self.network.identity} at {input_size}: {pooled}"
        self.identity = hashlib.sha256(what.encode()).hexdigest()
        config = self.network.config
        self.num_deep = config.head_channels
        self.num_shallow = 3 * sum(config.widths[stage] for stage in SHALLOW_STAGES)

    @property
    def deep(self) -> "FeatureColumns":
        return FeatureColumns(self, self.name, slice(0, self.num_deep))

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Features:
        """(N, deep + shallow)"""
        pixels = [to_tensor(resize_square(as_rgb(image), self.input_size)) for image in images]
        stages = self.network(torch.stack(pixels).to(self.device))
        deep = self.network.final(stages[-1]).mean((2, 3))
        shallow = [part for stage in SHALLOW_STAGES for part in pooled_statistics(stages[stage])]
        return torch.cat([deep, *shallow], dim=1).cpu().numpy()  # (N, 1280 + 120)

    def probabilities(self, features: Features) -> None:
        return None


@dataclass(frozen=True)
class FeatureColumns:
    """Some columns of a network's features as a network: they are computed and kept on disk with the others."""

    whole: FeatureNetwork
    name: str
    columns: slice

    @property
    def identity(self) -> str:
        return self.whole.identity

    def features(self, images: Sequence[Image.Image]) -> Features:
        return self.whole.features(images)[:, self.columns]

    def probabilities(self, features: Features) -> None:
        return None


class Inception:
    """Inception-v3 of FID (TensorFlow's weights of 2015-12-05, as torch-fidelity and torchmetrics read them).

    Features: the 2048 pooled ones; classes: the logits without bias, as IS wants them.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        """Raises ValueError when the file holds other weights."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.device = pick_device(device)
        self.identity = sha256_file(path)
        published = self.identity.startswith(INCEPTION_SHA)
        self.name = "inception-v3" if published else f"inception-v3@{self.identity[:8]}"
        weights = (
            io.BytesIO()
        )  # torch-fidelity would unpickle the file: it gets one that was read without that
        torch.save(_read_inception(path), weights)
        weights.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception-v3", ["2048"], weights)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold the weights of {INCEPTION_FILE}") from error
        self.network = network.to(self.device)

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> Features:
        """(N, 2048); images are resized as TensorFlow 1 did, so those of one size go together."""
        rows: dict[int, NDArray] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.size, []).append(i)
        for indices in by_size.values():
            pixels = np.stack([np.asarray(as_rgb(images[i])) for i in indices])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # uint8 (B, 3, H, W)
            rows |= dict(zip(indices, self.network(batch.to(self.device))[0].cpu().numpy(), strict=True))
        return np.stack([rows[i] for i in range(len(images))])

    @torch.inference_mode()
    def probabilities(self, features: Features) -> NDArray[np.float64]:
        """(N, 1008)"""
        weight = self.network.fc.weight.double().cpu()
        logits = torch.as_tensor(np.asarray(features, np.float64)) @ weight.T
        return logits.softmax(1).numpy()


def _read_inception(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is no file of PyTorch weights") from error


def find_inception(path: str = "") -> Path | None:
    """The weights of FID: the file named, else the one in torch's hub cache, else None.

    Raises FileNotFoundError for a named file that is not there, saying where to get it.
    """
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no Inception weights at {path}: get {INCEPTION_URL}, or leave --inception out"
            )
        return Path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    return cached if cached.is_file() else None


class RankerTower:
    """The image tower of a ranker with two towers."""

    def __init__(self, ranker: Any) -> None:
        """Raises ValueError for a ranker without features of its own."""
        if not hasattr(ranker, "image_features"):
            raise ValueError(f"the ranker {ranker.name} has no image features: name one that reads images")
        self.ranker, self.name = ranker, short_name(ranker.name)
        self.identity = identities(ranker)[0]

    def features(self, images: Sequence[Image.Image]) -> Features:
        """Unit vectors (N, D)."""
        return self.ranker.image_features(images).numpy()

    def probabilities(self, features: Features) -> None:
        return None


def short_name(name: str) -> str:
    """`runs/goods_128_ranker/step_00003000` -> `goods_128_ranker`; published names stay."""
    parts = [part for part in str(name).split("/") if not part.startswith("step_") and part != "latest"]
    return parts[-1] if parts and not name.startswith(("clip:", "brivl:", "chinese_clip:")) else str(name)


class PerceptualHash:
    """Not a network: the 64 bits of the DCT hash and the 4 x 4 colour grid of data_tools.images.phash, as (N, 112)."""

    name = "perceptual-hash"
    identity = hashlib.sha256(b"64 bits of the DCT, 4 x 4 RGB, version 1").hexdigest()

    def features(self, images: Sequence[Image.Image]) -> Features:
        """64 bits, then 48 levels in [0, 1]."""
        rows = []
        for image in images:
            found = image_signature(as_rgb(image))
            bits = np.unpackbits(np.frombuffer(found.phash.to_bytes(8, "big"), np.uint8))
            rows.append(np.concatenate([bits, np.frombuffer(found.colours, np.uint8) / 255]))
        return np.stack(rows).astype(np.float32)

    def probabilities(self, features: Features) -> None:
        return None


# --- features kept -------------------------------------------------------------------------------------------------


class FeatureStore:
    """Features of one network on disk: a SQLite file, whole after any kill, safe for several processes."""

    def __init__(self, network: FeatureNetwork, folder: Path = CACHE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in network.name)
        self.path = folder / f"{safe}-{network.identity[:16]}.sqlite"
        with closing(self._open()) as file, file:
            file.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID")

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Features]:
        """Those that are there."""
        found: dict[bytes, Features] = {}
        with closing(self._open()) as file:
            for start in range(0, len(keys), 500):  # SQLite takes no more than 999 values at once everywhere
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                for key, row in file.execute(f"SELECT key, row FROM features WHERE key IN ({marks})", part):
                    found[key] = np.frombuffer(row, np.float32)
        return found

    def put(self, rows: dict[bytes, Features]) -> None:
        values = [(key, np.ascontiguousarray(row, np.float32).tobytes()) for key, row in rows.items()]
        with closing(self._open()) as file, file:
            file.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", values)


def embed(
    network: FeatureNetwork,
    images: Images,
    store: FeatureStore | None = None,
    batch_size: int = 64,
    cluster: RayCluster | None = None,
) -> tuple[Features, NDArray[np.int64]]:
    """Features (M, D) of the readable images, and their indices (M,) in `images`.

    Every batch is stored when it is done, so a run that was killed goes on there. `cluster`: batches of images are
    its tasks. Raises ValueError when none can be read.
    """
    from common.console.progress import progress

    keys = [images.key(i) for i in range(len(images))]
    rows = store.get(list(dict.fromkeys(keys))) if store else {}
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    todo = sorted(i for key, i in first.items() if key not in rows)
    with progress(total=len(todo), desc=f"features of {network.name}", unit=" images") as bar:
        batches = _readable(images, todo, batch_size)
        for indices, found in ordered_map(EmbedBatch(network), batches, cluster or 0, _crashed):
            fresh = dict(zip([keys[i] for i in indices], found[0], strict=True)) if indices else {}
            if store and fresh:
                store.put(fresh)
            rows |= fresh
            bar.update(min(batch_size, bar.total - bar.n))
    kept = [i for i, key in enumerate(keys) if key in rows]
    if not kept:
        raise ValueError(f"none of the {len(keys)} images can be read")
    return np.stack([rows[keys[i]] for i in kept]).astype(np.float32), np.array(kept)


@dataclass(frozen=True)
class EmbedBatch:
    """Batches of images to their features (N, D)."""

    network: FeatureNetwork

    def __call__(self, batches: Sequence[list[Image.Image]]) -> list[Features]:
        return [self.network.features(images) for images in batches]


def _crashed(images: list[Image.Image]) -> Features:
    raise OSError(f"the features of {len(images)} images ended their process each time they were tried")


def _readable(
    source: Images, todo: Sequence[int], batch_size: int
) -> Iterator[tuple[list[int], list[list[Image.Image]]]]:
    """Places and the one batch of images at them; none where nothing can be read."""
    for start in range(0, len(todo), batch_size):
        indices, images = [], []
        for i in todo[start : start + batch_size]:
            try:
                images.append(source.open(i))
                indices.append(i)
            except (CorruptSample, BadImage):
                continue
        yield indices, [images] if images else []
