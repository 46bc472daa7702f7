"""Image shards -> token shards: every image is encoded once, not once an epoch.

    python -m vq.encode_shards runs/goods_128_vqgan ../shared/data/goods data/goods_128_tokens --views 6

Each input shard becomes one output shard of the same name with `{key}.ids.npy` (A, N), the caption and the metadata.
View 0 is the plain centre crop; the others are augmented, drawn from the key. `tokenizer.json` beside the shards
holds the identity of its codes: shards of two tokenizers never mix. Whole shards are kept when the command runs again.
On a Ray cluster (`--work.engine ray`) the nodes read the source (a URL, or a path that all of them have) and get the
tokenizer from here, where their shards come back.
"""

import copy
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from common.config import command, parse_options
from common.distributed import World, pick_device, start_world, stop_world
from common.files import ensure_writable_directory, write_json
from common.image import make_grid, stack_rows, to_image, to_tensor
from common.lock import alone_in
from common.log import say
from common.outputs.record import RECORD, OutputDirectory
from common.precision import Precision, autocast
from common.square import resize_square
from data_tools.augment import Chain, ImageAugment
from data_tools.engine import EngineOptions
from data_tools.images.crops import CropFlip
from data_tools.shards.encode import Views
from data_tools.shards.encode import encode_shards as encode_image_shards
from data_tools.shards.image_shards import DATASET_FILE
from data_tools.shards.index import ShardIndex, ShardSource
from data_tools.shards.line_views import LineSource
from data_tools.shards.loader import IMAGE_SUFFIXES, open_image
from data_tools.shards.remote import RemoteOptions
from kernels import OFF, Kernels, Report, accelerate
from vq.encoding import TOKENIZER_FILE, ImageEncoder, require_tokenizer
from vq.losses.reconstruction import psnr
from vq.model import ImageTokenizer

ROUNDTRIP = "roundtrip.png"


@dataclass(frozen=True)
class Options:
    """Encode image shards to token shards."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """Image tokenizer: a checkpoint or run directory."""
    source: Annotated[str, tyro.conf.Positional]
    """Image shards (train-*.tar, val-*.tar): a folder, http://, s3:// ..."""
    target: Annotated[Path, tyro.conf.Positional]
    """Folder for the token shards."""
    views: int = 4
    """Encoded views a training image: the plain one and views - 1 augmented ones. Validation images have one."""
    augment: CropFlip = field(default_factory=CropFlip)
    move: ImageAugment = field(default_factory=ImageAugment)
    lines: LineSource = "none"
    """Line drawings beside the codes, for train_dalle.py --lines: canny, xdog and contour draw each view, mixed takes
    the three in turn, given takes the drawings of data_tools.lines."""
    batch_size: int = 64
    """Images of one forward pass."""
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    check: int = 16
    """Images decoded back at the end into roundtrip.png; 0: none."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 autocast where the machine has it."""
    kernels: Kernels = "auto"
    """auto: code compiled once for CPUs with AVX512-BF16 or AVX2, where PyTorch has no AMX to compute with; off:
    PyTorch."""
    engine: Literal["", "auto", "native", "plain"] = ""
    """Earlier name of kernels: auto, and plain for off. native insists on compiled code, also beside AMX."""
    work: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        for name, low in (("views", 1), ("batch_size", 1), ("check", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.kernels == "off" and self.engine not in ("", "plain"):
            raise ValueError(f"--kernels off and --engine {self.engine} contradict each other")


def encode_shards(tokenizer: ImageTokenizer, options: Options, world: World) -> dict[str, int]:
    """Encode every shard of `options.source` that is not done yet; shards are dealt over processes.

    Returns {"images", "skipped", "shards_kept"} of this process. Raises ValueError for a target of another tokenizer.
    """
    target = ensure_writable_directory(options.target)
    made_by = {"sha256": tokenizer.codes_sha256, "grid_size": tokenizer.grid_size}
    made_by |= {"codebook_size": tokenizer.codebook_size, "views": options.views}
    made_by |= {} if options.lines == "none" else {"lines": options.lines}
    if not (target / TOKENIZER_FILE).is_file():
        _require_empty(target)
    world.barrier()
    if (target / TOKENIZER_FILE).is_file():
        found = require_tokenizer(target, tokenizer.codes_sha256)
        if found.get("lines", "none") != options.lines:
            raise ValueError(
                f"{target} holds shards with --lines {found.get('lines', 'none')}, not {options.lines}"
            )
        if found.get("views") != options.views:
            raise ValueError(
                f"{target} holds shards of {found.get('views')} views an image, not {options.views}"
            )
    elif world.is_main:
        write_json(target / TOKENIZER_FILE, made_by)
    encode = Codes(tokenizer, options)
    augment = Chain((options.move, options.augment)) if options.move.is_on else options.augment
    views = Views(tokenizer.image_size, options.views, augment, options.batch_size, options.lines)
    source = ShardSource(str(options.source), options.remote)
    cluster = options.work.cluster
    if cluster is None:
        encode.on(world.device)
        return encode_image_shards(source, target, views, "ids.npy", encode, world)
    with cluster.connected():
        cluster = replace(cluster.with_gpus(options.device), ahead=2)
        return encode_image_shards(source, target, views, "ids.npy", encode, world, cluster)


class Codes:
    """Images (n, 3, S, S) in [-1, 1] to codes (n, N), uint16 where the codebook has no more.

    Picklable before it computes: in another process it takes the device and the kernels that it finds there.
    """

    def __init__(self, tokenizer: ImageTokenizer, options: Options) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.dtype = np.uint16 if tokenizer.codebook_size <= 65536 else np.uint32
        self._encoder: ImageEncoder | None = None

    def on(self, device: torch.device) -> None:
        """Where it computes, with the tokenizer as it is."""
        self._encoder = ImageEncoder(self.tokenizer.to(device), device, self.options.precision)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encoder": None, "tokenizer": copy.deepcopy(self.tokenizer).cpu()}

    def __call__(self, images: Tensor) -> np.ndarray:
        if self._encoder is None:
            device = pick_device(self.options.device)
            switch_kernels(self.tokenizer, self.options, device)
            self.on(device)
        return self._encoder(images).cpu().numpy().astype(self.dtype)


def switch_kernels(tokenizer: ImageTokenizer, options: Options, device: torch.device) -> Report:
    """Raises ValueError for --engine native where compiled code cannot encode."""
    in_bf16 = options.precision != "fp32"
    if options.engine == "native" and (device.type != "cpu" or not in_bf16):
        raise ValueError(
            f"the native engine computes in bf16 on a CPU, not in {options.precision} on {device}"
        )
    if options.kernels == "off" or options.engine == "plain":
        return OFF
    return accelerate(tokenizer, in_bf16=in_bf16, insist=options.engine == "native")


def _require_empty(target: Path) -> None:
    """Raises ValueError where a folder without our tokenizer.json holds what this command would write or count."""
    found = [
        p.name for p in sorted(target.iterdir()) if p.suffix == ".tar" or p.name in (DATASET_FILE, ROUNDTRIP)
    ]
    if found:
        raise ValueError(
            f"{target} holds {found[0]}, not written here: choose another folder for the token shards"
        )


@torch.no_grad()
def roundtrip(tokenizer: ImageTokenizer, options: Options, world: World) -> float:
    """Decode a few stored codes, write them under their originals as roundtrip.png; returns the mean PSNR in dB."""
    source = ShardIndex.open(str(options.source), "train", options.remote).require(*IMAGE_SUFFIXES)
    tokens = ShardIndex.open(options.target, "train").require("ids.npy")
    index_of = {s.key: i for i, s in enumerate(source.samples)}
    originals, ids = [], []
    for i in np.linspace(0, len(tokens) - 1, min(options.check, len(tokens))).astype(int):
        members = source.read(index_of[tokens.samples[i].key], IMAGE_SUFFIXES)
        originals.append(
            to_tensor(resize_square(open_image(next(iter(members.values()))), tokenizer.image_size))
        )
        views = np.load(io.BytesIO(tokens.read(i)["ids.npy"]), allow_pickle=False)
        ids.append(torch.from_numpy(views[0].astype(np.int64)))
    with autocast(world.device, options.precision):
        decoded = tokenizer.decode_ids(torch.stack(ids).to(world.device)).cpu()
    images = torch.stack(originals)
    rows = [make_grid([to_image(x) for x in part], columns=len(part)) for part in (images, decoded)]
    with OutputDirectory(options.target) as files:
        if not (options.target / RECORD).exists() and (options.target / ROUNDTRIP).is_file():
            files.adopt([ROUNDTRIP])  # a release before the record wrote it beside its tokenizer.json
        with files.writing(ROUNDTRIP) as temporary:
            stack_rows([[row] for row in rows]).save(temporary, format="PNG")
    return float(psnr(decoded, images).mean())


@command
def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    options = parse_options(Options, argv, description=__doc__)
    world = start_world(options.device)
    try:
        ShardSource(options.source, options.remote).find("train")  # the user's own first
        tokenizer = ImageTokenizer.from_pretrained(options.checkpoint, world.device)
        ensure_writable_directory(options.target)
        if options.work.cluster is None:  # the nodes of a cluster switch their own
            report = switch_kernels(tokenizer, options, world.device)
            if world.is_main:
                say(str(report))
        with alone_in(options.target, world, ".encoding.lock"):
            counts = encode_shards(tokenizer, options, world)
            if world.is_main:
                kept = f", {counts['shards_kept']} shards were there already" if counts["shards_kept"] else ""
                say(f"encoded {counts['images']} images, skipped {counts['skipped']} corrupt ones{kept}")
            if world.is_main and options.check:
                metric = roundtrip(tokenizer, options, world)
                say(f"stored codes decode back at {metric:.2f} dB: look at {options.target / ROUNDTRIP}")
        return counts
    finally:
        stop_world()


if __name__ == "__main__":
    main()
