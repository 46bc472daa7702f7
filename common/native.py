"""Code compiled for the machine it runs on: C++ sources beside our modules, for x86 CPUs with AVX512-BF16 or AVX2.

A source is compiled once by the machine's own compiler, in seconds, into ~/.cache. Without a compiler or such a CPU,
`why_not` says so, and the caller takes the operators of PyTorch. Products are of bfloat16 with float32 sums on both
kinds of CPU; those with AVX2 alone multiply floats, and PyTorch would only emulate bfloat16 there.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from common.files import cache_directory
from common.log import say

LEVELS = {
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}
LEVEL_VARIABLE = "PAINTER_CPU_LEVEL"  # avx2: as if the CPU had no more
HEADERS = Path(__file__).parent  # what sources share
GROUP = 32  # outputs of a group of weights, as there
HUGE_PAGE = 2**21


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this processor can do, as Linux tells it; empty elsewhere."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    except OSError:
        return frozenset()


def level() -> str:
    """The first of LEVELS that this processor reaches, or "". Raises ValueError for a wrong LEVEL_VARIABLE."""
    least = os.environ.get(LEVEL_VARIABLE, "avx512")
    if least not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}, not {least!r}")
    names = list(LEVELS)[list(LEVELS).index(least) :]
    return next((name for name in names if cpu_flags().issuperset(LEVELS[name])), "")


@functools.cache
def is_outdone() -> bool:
    """Whether PyTorch multiplies faster than these sources can: on CPUs with AMX, which has several times the
    operations. What only waits for the memory, a decode step, is not concerned."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@functools.cache
def why_not(source: Path) -> str:
    """Why this machine cannot run `source`; empty where it can. Compiles it at the first call."""
    if not level():
        missing = [flag for flag in LEVELS["avx2"] if flag not in cpu_flags()]
        return f"the CPU lacks {', '.join(missing)}"
    try:
        library(source)
    except OSError as error:
        return f"compiling {source.name} failed: {error}"
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        return f"compiling {source.name} failed: {next((line for line in said if 'error' in line), said[0])}"
    return ""


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """`source` compiled and loaded. Raises OSError or CalledProcessError where it can be neither found nor compiled."""
    given = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    compiler = shlex.split(given)  # "ccache g++", "g++ -march=..."
    if not compiler:
        raise OSError("no C++ compiler (g++)")
    flags = [f"-m{flag.replace('_', '')}" for flag in LEVELS[level()]]
    # no contraction: whether a product and a sum are fused would depend on what the compiler inlines where
    exact = ("-O3", "-ffp-contract=off", "-fno-strict-aliasing", *flags)
    options = ("-std=c++17", *exact, "-fopenmp", "-shared", "-fPIC", f"-I{HEADERS}")
    headers = (*HEADERS.glob("*.h"), *source.parent.glob("*.h"))
    texts = [path.read_bytes() for path in (*sorted(headers), source)]
    text = b"".join(texts) + "\0".join([*compiler, *exact]).encode()
    stamp = f"{source.parent.name}-{hashlib.sha256(text).hexdigest()[:16]}"
    path = cache_directory() / "native" / f"{stamp}.so"
    if not path.is_file():
        say(f"compiling {source.parent.name}/{source.name} for this machine, once")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{stamp}.{os.getpid()}.so")
        command = [*compiler, *options, str(source), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(temporary, path)
    return ctypes.CDLL(str(path))


def memory(size: int) -> Tensor:
    """(size,) bytes, on huge pages where the kernel has them: what is read at a stride misses them less."""
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, whole + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    return raw[-raw.data_ptr() % HUGE_PAGE :][:size]


def group_weights(weight: Tensor) -> Tensor:
    """(N, T, K), K even -> (N' / 32, T, K / 2, 2, 16, 2): N' = N rounded up to 32, the rest zeros; see kernels.h."""
    outputs, taps, inputs = weight.shape
    weight = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, -outputs % GROUP))
    groups = weight.view(-1, 2, GROUP // 2, taps, inputs // 2, 2)
    return groups.permute(0, 3, 4, 1, 2, 5).contiguous()
