"""Options of sampling, and of how a generator is run when it samples; without PyTorch, so that a process that only
answers requests need not import it."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

MOST_GUIDANCE = 1000.0
MOST_SCALE = 10.0  # of line drawings

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is sampled from the model's logits."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability; 0 keeps all."""
    cfg_scale: float = 4.5
    """Guidance: how far to go from the image without text (0) through the plain one (1) beyond it."""
    cfg_schedule: Schedule = "constant"
    """How guidance grows from 1 to cfg_scale over the positions of an image."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (keep all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], not {self.min_p}")
        if not 0 <= self.cfg_scale <= MOST_GUIDANCE:
            raise ValueError(f"cfg_scale must lie in [0, {MOST_GUIDANCE:.0f}], not {self.cfg_scale}")

    @property
    def is_guided(self) -> bool:
        return self.cfg_scale != 1.0


Engine = Literal["auto", "torch", "cpu_kernel", "cuda_graph", "packed", "plain", "native", "graph"]
WeightType = Literal["auto", "float32", "bfloat16", "int8"]
EARLIER_NAMES: dict[str, Engine] = {"plain": "torch", "native": "cpu_kernel", "graph": "cuda_graph"}


@dataclass(frozen=True)
class FastOptions:
    """How to run the generator; the defaults are the fastest on the machine."""

    engine: Engine = "auto"
    """auto: cuda_graph on a CUDA GPU, torch on another; on a CPU cpu_kernel where it can run (AVX512-BF16 or AVX2, a
    C++ compiler), else packed; torch on request. plain, native and graph are earlier names of torch, cpu_kernel and
    cuda_graph."""
    weights: WeightType = "auto"
    """Numbers that weights and cache are kept in: auto takes bfloat16 where the machine or the engine computes in it.
    int8 (weights alone, cpu_kernel and packed engines) is the fastest for one image at a time, and costs a little
    accuracy."""
    kernels: Annotated[Literal["auto", "off"], tyro.conf.arg(prefix_name=False)] = "auto"
    """auto: compiled code and hand-written passes where they are faster; off: PyTorch alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", EARLIER_NAMES.get(self.engine, self.engine))
        if self.weights == "int8" and self.engine not in ("auto", "cpu_kernel", "packed"):
            raise ValueError(f"int8 weights need the cpu_kernel or packed engine, not {self.engine}")
        if self.kernels == "off" and self.engine == "cpu_kernel":
            raise ValueError("--kernels off leaves out the cpu_kernel engine: choose torch or packed")
