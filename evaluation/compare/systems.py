"""Systems: what takes part in a comparison, named on the command line as NAME=WHAT.

    ar=runs/dalle                            a checkpoint directory, run directory or hub id, by its kind
    guided=runs/dalle?cfg_scale=4&top_p=0.9  the same with sampling options of its own
    ar+lines=runs/lines?lines=canny          follows a drawing of the reference image that has the prompt as its caption
    sd=runs/goods_128_diffusion              a diffusion base: a run or any folder in diffusers' layout
    lora=runs/base?lora=FILE:0.8&num_steps=20   the same with adapters merged, several separated by commas
    gan=runs/gan?psi=0.8                     a run of gan.train
    vae=runs/goods_128_diffusion/vae         an AutoencoderKL, sampled from its prior: images of no text
    theirs=pipeline_folder                   any other pipeline of diffusers, by its model_index.json
    other=out                                images that exist already: an out directory, a folder with texts
    mine=python:package.module:function      function() -> pipeline(text, num_images, seed=..., **sampling) -> images

`?training_hours=3.5` says what a training took where the checkpoint does not. Another kind of checkpoint plugs in with
one line: `register(kind, loader)`, where `kind` is what its config.json says.
"""

import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from PIL import Image

from common import checkpoint
from common.config import from_mapping, to_mapping
from common.files import read_json, sha256_file
from common.outputs.image_list import LIST
from dalle import model
from dalle.lines import LineControl
from dalle.pipeline import Request, TextToImage
from dalle.published import dalle_pytorch
from dalle.sampling import SamplingOptions
from data_tools.images.decode import SUFFIXES
from evaluation.compare.diffusion_system import (
    DiffusionSystem,
    PriorSystem,
    is_autoencoder,
    is_diffusion,
    is_other_pipeline,
    load_other_pipeline,
)
from evaluation.compare.gan_system import GanSystem
from evaluation.reference_drawings import ReferenceDrawings
from gan.model import KIND as GAN

Pipeline = Callable[..., list[Image.Image]]
Loader = Callable[[Path, str], Pipeline]
"""(checkpoint directory, device) -> pipeline(text, num_images, seed=..., **sampling) -> images."""

HOURS = "training_hours"
_LOADERS: dict[str, Loader] = {}


def register(kind: str, loader: Loader) -> None:
    """Checkpoints whose config.json says `kind` are sampled from with `loader(directory, device)`."""
    _LOADERS[kind] = loader


def _load_own(directory: Path, device: str) -> Pipeline:
    return TextToImage.from_pretrained(directory, device)


register(model.KIND, _load_own)
register(dalle_pytorch.KIND, _load_own)


@dataclass(frozen=True)
class SystemSpec:
    """What NAME=WHAT?KEY=VALUE says."""

    name: str
    what: str
    sampling: dict[str, str] = field(default_factory=dict)
    training_hours: float | None = None
    """As the user says; None: as the checkpoint records it."""

    @classmethod
    def parse(cls, text: str) -> "SystemSpec":
        """Raises ValueError saying how a system is written."""
        name, equals, rest = text.partition("=")
        what, mark, query = rest.partition("?")
        if not equals or not what.strip() or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"a system is NAME=PATH, the name of letters, digits and . + - _; not {text!r}")
        pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)
        if mark and (not pairs or any(not value for _, value in pairs)):
            raise ValueError(f"sampling options of a system are ?KEY=VALUE&KEY=VALUE, not {query!r}")
        sampling = dict(pairs)
        hours = _hours(sampling.pop(HOURS)) if HOURS in sampling else None
        return cls(name, what.strip(), sampling, hours)

    @property
    def loras(self) -> tuple[str, ...]:
        """FILE or FILE:WEIGHT of the adapters that are merged into a base."""
        return tuple(filter(None, self.sampling.get("lora", "").split(",")))

    @property
    def is_made(self) -> bool:
        """Whether its images exist already."""
        path = Path(self.what)
        if not path.is_dir() or (path / "config.json").is_file() or is_diffusion(path):
            return False  # a folder of weights may show samples
        return (path / LIST).is_file() or any(
            f.suffix.lower().lstrip(".") in SUFFIXES for f in path.iterdir()
        )


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{HOURS} is a number of hours, not {text!r}")
    return value


@dataclass(frozen=True)
class Generated:
    """One image; what `common.outputs.out_directory.OutDirectory` writes of it."""

    image: Image.Image
    text: str
    index: int
    log_likelihood: float | None
    null_log_likelihood: float | None
    seconds: float
    key: str | None = None


class System(Protocol):
    """What the arena asks of a pipeline."""

    origin: dict[str, Any]  # all that its images depend on beside text and index: stored with each of them

    def complaint(self, text: str) -> str:
        """Why there can be no image of this text, or ""."""
        ...

    def generate(self, requests: Sequence[Request]) -> Iterator[Any]:
        """One image a request, in order; see common.outputs.out_directory.Made."""
        ...


class OwnSystem:
    """Our generator: batches across texts, and knows its likelihoods."""

    def __init__(
        self, pipeline: TextToImage, seed: int, sampling: SamplingOptions, batch_size: int, negative: str = ""
    ) -> None:
        self.pipeline, self.seed, self.sampling = pipeline, seed, sampling
        self.batch_size, self.negative = batch_size, negative
        self.origin = {
            "seed": seed,
            "sampling": to_mapping(sampling),
            "negative": negative,
            "source": None,
            "weights": "auto",
            "checkpoint": pipeline.sha256,
        }

    def complaint(self, text: str) -> str:
        try:
            self.pipeline.encode_text(text)
        except ValueError as error:
            return str(error)
        return ""

    def generate(self, requests: Sequence[Request]) -> Iterator[Any]:
        return self.pipeline.generate_requests(
            requests, self.seed, self.sampling, self.negative, self.batch_size
        )


class LineSystem(OwnSystem):
    """Our generator with a drawing for each prompt, made of the reference image that has it as its caption.

    It is told more than the other systems are: the outline of a real image.
    """

    def __init__(
        self,
        pipeline: TextToImage,
        seed: int,
        sampling: SamplingOptions,
        batch_size: int,
        drawings: ReferenceDrawings,
        scales: dict[str, float],
    ) -> None:
        """`scales`: fields of LineControl. Raises ValueError for a generator that follows no drawings."""
        super().__init__(pipeline, seed, sampling, batch_size)
        if pipeline.line_encoder is None:
            raise ValueError(
                "this generator follows no drawings: train it with `python train_dalle.py --lines --init CHECKPOINT`"
            )
        self.drawings, self.scales = drawings, scales
        self.origin["source"] = {"lines": drawings.method, "of": drawings.identity} | scales

    def complaint(self, text: str) -> str:
        return super().complaint(text) or self.drawings.complaint(text)

    def generate(self, requests: Sequence[Request]) -> Iterator[Any]:
        size = self.pipeline.image_tokenizer.image_size
        for text, group in groupby(requests, key=lambda request: request.text):
            line = LineControl(self.drawings.lines(text, size), **self.scales)
            arguments = (self.seed, self.sampling, self.negative, self.batch_size)
            yield from self.pipeline.generate_requests(list(group), *arguments, line=line)


class AnySystem:
    """Any `pipeline(text, num_images, seed=..., **sampling)`; a text's images 0 .. n - 1 come of one call."""

    def __init__(self, pipeline: Pipeline, identity: str, seed: int, sampling: dict[str, Any]) -> None:
        self.pipeline, self.seed, self.sampling = pipeline, seed, sampling
        self.origin = {"seed": seed, "sampling": sampling, "checkpoint": identity}

    def complaint(self, text: str) -> str:
        return ""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generated]:
        """Raises ValueError when the pipeline gives another number of images than it was asked for."""
        for text, group in groupby(requests, key=lambda request: request.text):
            indices = [request.index for request in group]
            count = max(indices) + 1
            started = time.perf_counter()
            images = self.pipeline(text, count, seed=self.seed, **self.sampling)
            seconds = (time.perf_counter() - started) / count
            if len(images) != count:
                raise ValueError(f"the pipeline gave {len(images)} images of {text!r} instead of {count}")
            for index in indices:
                yield Generated(images[index].convert("RGB"), text, index, None, None, seconds)


@dataclass(frozen=True)
class Setting:
    """What all systems of a comparison share."""

    seed: int = 0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """Of our generators, where a system says nothing else."""
    batch_size: int = 8
    device: str = "auto"
    reference: str = ""
    """Image shards that drawings are made of."""
    split: str = "val"


def open_system(spec: SystemSpec, setting: Setting) -> System:
    """The system, ready to generate. Raises FileNotFoundError or ValueError in one sentence that names it."""
    try:
        return _open(spec, setting)
    except (FileNotFoundError, ValueError) as error:
        said = str(error)
        where = f"system {spec.name}"
        raise type(error)(said if where in said else f"{where}: {said}") from error


def _open(spec: SystemSpec, setting: Setting) -> System:
    if spec.what.startswith("python:"):
        pipeline, identity = _from_python(spec.what.removeprefix("python:"))
        return AnySystem(pipeline, identity, setting.seed, _numbers(spec.sampling))
    in_layout = is_diffusion(spec.what) or is_autoencoder(spec.what)
    directory = Path(spec.what) if in_layout else checkpoint.resolve(spec.what)
    if is_other_pipeline(directory):
        pipeline, identity = load_other_pipeline(directory, setting.device)
        return AnySystem(pipeline, identity, setting.seed, _numbers(spec.sampling))
    if is_diffusion(directory):
        return DiffusionSystem(
            directory, spec.sampling, spec.name, setting.seed, setting.batch_size, setting.device
        )
    if is_autoencoder(directory):
        return PriorSystem(directory, spec.sampling, setting.seed, setting.device)
    config = read_json(directory / "config.json")
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind == GAN:  # a run directory means its best checkpoint
        return GanSystem(spec.what, spec.sampling, spec.name, setting.seed, setting.device)
    if kind not in _LOADERS:
        known = ", ".join(sorted([*_LOADERS, GAN]))
        raise ValueError(
            f"{spec.what} is a checkpoint of kind {kind}, which makes no images (kinds that do: {known})"
        )
    pipeline = _LOADERS[kind](directory, setting.device)
    if isinstance(pipeline, TextToImage):
        return _own_system(spec, pipeline, setting)
    return AnySystem(pipeline, config.get("sha256", str(directory)), setting.seed, _numbers(spec.sampling))


def _own_system(spec: SystemSpec, pipeline: TextToImage, setting: Setting) -> OwnSystem:
    values = dict(spec.sampling)
    method = values.pop("lines", "")
    scales = {n: values.pop(f"line_{n}") for n in ("scale", "cfg_scale") if f"line_{n}" in values}
    sampling = own_sampling(SystemSpec(spec.name, spec.what, values), setting.sampling)
    if not method:
        if scales:
            raise ValueError("line_scale and line_cfg_scale need lines=canny, xdog or contour")
        return OwnSystem(pipeline, setting.seed, sampling, setting.batch_size)
    drawings = ReferenceDrawings.open(setting.reference, setting.split, method)
    numbers = {name: _number(value) for name, value in scales.items()}
    return LineSystem(pipeline, setting.seed, sampling, setting.batch_size, drawings, numbers)


def own_sampling(spec: SystemSpec, shared: SamplingOptions) -> SamplingOptions:
    """The shared options with the system's own over them. Raises ValueError for an unknown one."""
    return from_mapping(SamplingOptions, to_mapping(shared) | spec.sampling, where=f"system {spec.name}")


def _from_python(name: str) -> tuple[Pipeline, str]:
    """`module:function` -> what the function returns, and what tells its code from an older one."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"a pipeline in Python is python:package.module:function, not python:{name}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ValueError(f"no module {module_name} for the system python:{name}") from error
        raise
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise ValueError(f"the module {module_name} has no function {function_name}")
    digest = sha256_file(Path(module.__file__))[:16] if module.__file__ else ""
    return factory(), f"python:{name}@{digest}"


def _numbers(values: dict[str, str]) -> dict[str, Any]:
    """Numbers as numbers, words as words."""
    return {name: _number(text) for name, text in values.items()}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
