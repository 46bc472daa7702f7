"""Arms: what takes part in a comparison, named on the command line as NAME=WHAT.

    ours=runs/dalle                          a checkpoint directory, run directory or hub id, by its kind
    guided=runs/dalle?cfg_scale=4&top_p=0.9  the same with sampling options of its own
    sd=runs/goods_128_diffusion              a diffusion base: a run or any folder in diffusers' layout
    lora=runs/base?lora=FILE:0.8&num_steps=20   the same with adapters merged, several separated by commas
    theirs=out                               pictures that were drawn before: an out directory, a folder with texts
    other=python:package.module:function     function() -> pipeline(text, num_images, seed=..., **sampling) -> pictures

A later arm plugs in with one line: `register(kind, loader)`, where `kind` is what its config.json says.
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
from dalle import dalle_pytorch, model
from dalle.pipeline import Request, TextToImage
from dalle.sampling import SamplingOptions
from data_tools.images import SUFFIXES
from evaluation.diffusion_system import DiffusionSystem, is_diffusion
from rankers.outdir import LIST

Pipeline = Callable[..., list[Image.Image]]
Loader = Callable[[Path, str], Pipeline]
"""(checkpoint directory, device) -> pipeline(text, num_images, seed=..., **sampling) -> pictures."""

_LOADERS: dict[str, Loader] = {}


def register(kind: str, loader: Loader) -> None:
    """Checkpoints whose config.json says `kind` are drawn from with `loader(directory, device)`."""
    _LOADERS[kind] = loader


def _load_own(directory: Path, device: str) -> Pipeline:
    return TextToImage.from_pretrained(directory, device)


register(model.KIND, _load_own)
register(dalle_pytorch.KIND, _load_own)


@dataclass(frozen=True)
class ArmSpec:
    """What NAME=WHAT?KEY=VALUE says."""

    name: str
    what: str
    sampling: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "ArmSpec":
        """Raises ValueError saying how an arm is written."""
        name, equals, rest = text.partition("=")
        what, mark, query = rest.partition("?")
        if not equals or not what.strip() or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"an arm is NAME=PATH, the name of letters, digits and . + - _; not {text!r}")
        pairs = parse_qsl(query, keep_blank_values=True)
        if mark and (not pairs or any(not value for _, value in pairs)):
            raise ValueError(f"sampling options of an arm are ?KEY=VALUE&KEY=VALUE, not {query!r}")
        return cls(name, what.strip(), dict(pairs))

    @property
    def is_drawn(self) -> bool:
        """Whether its pictures stand already."""
        path = Path(self.what)
        if not path.is_dir() or (path / "config.json").is_file():
            return False
        return (path / LIST).is_file() or any(
            f.suffix.lower().lstrip(".") in SUFFIXES for f in path.iterdir()
        )


@dataclass(frozen=True)
class Drawn:
    """One picture; what `common.out_directory.OutDirectory` writes of it."""

    image: Image.Image
    text: str
    index: int
    log_likelihood: float | None
    null_log_likelihood: float | None
    seconds: float
    key: str | None = None


class Arm(Protocol):
    """What the arena asks of a pipeline."""

    origin: dict[str, Any]  # all that its pictures depend on beside text and index: stored with each of them

    def complaint(self, text: str) -> str:
        """Why this text cannot be drawn, or ""."""
        ...

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """One picture a request, in order."""
        ...


class OwnArm:
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

    def draw(self, requests: Sequence[Request]) -> Iterator[Any]:
        return self.pipeline.draw(requests, self.seed, self.sampling, self.negative, self.batch_size)


class AnyArm:
    """Any `pipeline(text, num_images, seed=..., **sampling)`; it draws a text's pictures 0 .. n - 1 in one call."""

    def __init__(self, pipeline: Pipeline, identity: str, seed: int, sampling: dict[str, Any]) -> None:
        self.pipeline, self.seed, self.sampling = pipeline, seed, sampling
        self.origin = {"seed": seed, "sampling": sampling, "checkpoint": identity}

    def complaint(self, text: str) -> str:
        return ""

    def draw(self, requests: Sequence[Request]) -> Iterator[Drawn]:
        """Raises ValueError when the pipeline gives another number of pictures than it was asked for."""
        for text, group in groupby(requests, key=lambda request: request.text):
            indices = [request.index for request in group]
            count = max(indices) + 1
            started = time.perf_counter()
            images = self.pipeline(text, count, seed=self.seed, **self.sampling)
            seconds = (time.perf_counter() - started) / count
            if len(images) != count:
                raise ValueError(f"the pipeline drew {len(images)} pictures of {text!r} instead of {count}")
            for index in indices:
                yield Drawn(images[index].convert("RGB"), text, index, None, None, seconds)


def open_arm(
    spec: ArmSpec, seed: int, sampling: SamplingOptions, batch_size: int = 8, device: str = "auto"
) -> Arm:
    """The arm, ready to draw. Raises FileNotFoundError or ValueError in one sentence that names it."""
    if spec.what.startswith("python:"):
        pipeline, identity = _from_python(spec.what.removeprefix("python:"))
        return AnyArm(pipeline, identity, seed, _numbers(spec.sampling))
    if is_diffusion(spec.what):
        return DiffusionSystem(spec, seed, batch_size, device)
    directory = checkpoint.resolve(spec.what)
    config = read_json(directory / "config.json")
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in _LOADERS:
        raise ValueError(
            f"arm {spec.name}: {spec.what} is a checkpoint of kind {kind}, which draws no pictures "
            f"(kinds that do: {', '.join(sorted(_LOADERS))})"
        )
    pipeline = _LOADERS[kind](directory, device)
    if isinstance(pipeline, TextToImage):
        return OwnArm(pipeline, seed, own_sampling(spec, sampling), batch_size)
    return AnyArm(pipeline, config.get("sha256", str(directory)), seed, _numbers(spec.sampling))


def own_sampling(spec: ArmSpec, shared: SamplingOptions) -> SamplingOptions:
    """The shared options with the arm's own over them. Raises ValueError for an unknown one."""
    return from_mapping(SamplingOptions, to_mapping(shared) | spec.sampling, where=f"arm {spec.name}")


def _from_python(name: str) -> tuple[Pipeline, str]:
    """`module:function` -> what the function returns, and what tells its code from an older one."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"a pipeline in Python is python:package.module:function, not python:{name}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ValueError(f"no module {module_name} for the arm python:{name}") from error
        raise
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise ValueError(f"the module {module_name} has no function {function_name}")
    digest = sha256_file(Path(module.__file__))[:16] if module.__file__ else ""
    return factory(), f"python:{name}@{digest}"


def _numbers(values: dict[str, str]) -> dict[str, Any]:
    """Numbers as numbers, words as words."""

    def read(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    return {name: read(text) for name, text in values.items()}
