"""How far generated images are from validation images: the kernel distance in ImageNet features.

KID (Binkowski et al. 2018, arXiv:1801.01401) is unbiased, so a hundred images tell something where FID, whose bias
falls with the number of images, does not. The features are EfficientNet-Lite0's: numbers compare within a run alone.
`python -m evaluation` has the Frechet distance of a finished checkpoint, with an interval.
"""

import torch
from torch import Tensor

from common.distributed import World
from common.image import to_image, to_tensor
from diffusion.base import DiffusionBase
from diffusion.sampling import SamplingOptions
from diffusion.tuning.data import TuneData
from diffusion.tuning.options import TuneOptions
from diffusion.tuning.samples import sample_pixels

BATCH = 16
FEATURE_SIDE = 128  # pixels a side that features are taken at


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased squared maximum mean discrepancy of features (M, D) and (N, D), kernel (x.y / D + 1)^3.

    Raises ValueError for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a kernel distance needs two images of each, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    dim = a.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / dim + 1.0) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2.0 * kernel(a, b).mean())


def image_distance(base: DiffusionBase, data: TuneData, options: TuneOptions, world: World) -> float:
    """Of images for the first validation captions from these very images; the main process generates, all return it."""
    value = torch.zeros(1, dtype=torch.float64, device=world.device)
    if world.is_main:
        value[0] = _measure(base, data, options, world)
    return float(world.from_main_(value))


@torch.no_grad()
def _measure(base: DiffusionBase, data: TuneData, options: TuneOptions, world: World) -> float:
    from vq.losses.imagenet_features import TRAINING_NETWORK, load_imagenet_features

    network = load_imagenet_features(TRAINING_NETWORK, world.device)
    sampling = SamplingOptions(num_steps=options.sample_steps, cfg_scale=options.guidance)
    real, generated = [], []
    for batch in data.val_batches(BATCH, options.distance_images):
        names = [f"{options.loop.seed}/kid/{key}" for key in batch["key"]]
        pixels = sample_pixels(base, batch["text"], names, data.resolution, sampling, options.precision)
        levels = torch.stack([to_tensor(to_image(image)) for image in pixels])  # as they would be saved
        for images, features in ((batch["image"], real), (levels, generated)):
            small = torch.nn.functional.interpolate(
                images, (FEATURE_SIDE,) * 2, mode="bilinear", antialias=True
            )
            features.append(network.pooled(small.to(world.device)).cpu())
    return kernel_distance(torch.cat(real), torch.cat(generated))
