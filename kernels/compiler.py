"""Code compiled for the machine it runs on: the C++ of csrc/, for x86 CPUs with AVX512-BF16 or AVX2.

A source is compiled once by the machine's own compiler, in seconds, into ~/.cache. Without a compiler or such a CPU,
`unavailable_reason` says so, and the caller takes the operators of PyTorch. Products are of bfloat16 with float32 sums
on both kinds of CPU; those with AVX2 alone multiply floats, and PyTorch would only emulate bfloat16 there.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
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
SOURCES = Path(__file__).parent / "csrc"
ABI_VERSION = 1  # as in abi.h


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
def prefers_torch() -> bool:
    """Whether PyTorch multiplies faster than these sources can: on CPUs with AMX, which has several times the
    operations. What only waits for the memory, a decode step, is not concerned."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


@dataclass(frozen=True)
class Source:
    """A file of csrc/, and the structures by which Python hands it its work, in the order of its EXPORT_ABI."""

    name: str
    structures: tuple[type[ctypes.Structure], ...] = ()
    declare: Callable[[ctypes.CDLL], None] = lambda library: None
    """Sets the argument and result types of the library's functions."""

    @property
    def path(self) -> Path:
        return SOURCES / self.name


@functools.cache
def unavailable_reason(source: Source) -> str:
    """Why this machine cannot run `source`; empty where it can. Compiles it at the first call."""
    if not level():
        missing = [flag for flag in LEVELS["avx2"] if flag not in cpu_flags()]
        return f"the CPU lacks {', '.join(missing)}"
    try:
        load(source)
    except OSError as error:
        return f"compiling {source.name} failed: {error}"
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        return f"compiling {source.name} failed: {next((line for line in said if 'error' in line), said[0])}"
    except AbiMismatch as error:
        return str(error)
    return ""


class AbiMismatch(RuntimeError):
    """The structures of Python and C++ differ: nothing may be called."""


@functools.cache
def load(source: Source) -> ctypes.CDLL:
    """`source` compiled, loaded and compared with its structures.

    Raises OSError or CalledProcessError where it can be neither found nor compiled, AbiMismatch.
    """
    library = compile_and_open(source.path)
    library.abi.argtypes, library.abi.restype = (ctypes.c_int64,), ctypes.c_int64
    if (version := library.abi(0)) != ABI_VERSION:
        raise AbiMismatch(f"{source.name} has version {version}, its Python module {ABI_VERSION}")
    for i, structure in enumerate(source.structures, 1):
        if (size := library.abi(i)) != ctypes.sizeof(structure):
            raise AbiMismatch(
                f"{structure.__name__} has {size} bytes in {source.name}, {ctypes.sizeof(structure)} in its Python "
                "module"
            )
    source.declare(library)
    return library


def compile_and_open(path: Path) -> ctypes.CDLL:
    """Raises OSError or CalledProcessError."""
    given = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
    compiler = shlex.split(given)  # "ccache g++", "g++ -march=..."
    if not compiler:
        raise OSError("no C++ compiler (g++)")
    flags = [f"-m{flag.replace('_', '')}" for flag in LEVELS[level()]]
    # no contraction: whether a product and a sum are fused would depend on what the compiler inlines where
    exact = ("-O3", "-ffp-contract=off", "-fno-strict-aliasing", *flags)
    options = ("-std=c++17", *exact, "-pthread", "-shared", "-fPIC", f"-I{SOURCES}")
    texts = [header.read_bytes() for header in (*sorted(SOURCES.glob("*.h")), path)]
    text = b"".join(texts) + "\0".join([*compiler, *exact]).encode()
    stamp = f"{path.stem}-{hashlib.sha256(text).hexdigest()[:16]}"
    target = cache_directory() / "native" / f"{stamp}.so"
    if not target.is_file():
        say(f"compiling {path.name} for this machine, once")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{stamp}.{os.getpid()}.so")
        command = [*compiler, *options, str(path), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(temporary, target)
    return ctypes.CDLL(str(target))


def address(tensor: Tensor, dtype: torch.dtype) -> int:
    """Where the numbers of a tensor stand. Raises ValueError unless it is dense, on the CPU and of that type, as C++
    takes it."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"compiled code takes contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device} with strides "
            f"{tensor.stride()} of {tuple(tensor.shape)}"
        )
    return tensor.data_ptr()
