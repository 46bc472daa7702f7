"""Tensors out of other people's files, without running what a pickle asks for.

`.safetensors` is read as it is. A torch file is read with `weights_only=True`; where that refuses because the pickle
names foreign classes (Lightning callbacks, say), a second reading keeps tensors and plain containers and puts an inert
object in the place of everything else: no foreign code is imported or called.
"""

import collections
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console.terminal import first_line
from common.files import require_content


class Inert:
    """Stands where a foreign object stood; takes any state and does nothing with it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Inert":
        return Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


OUTER = r"(?:(?:module|model|first_stage_model)\.)"
INNER = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool"
_STORAGE_TYPES = {f"{kind}Storage": getattr(torch, f"{kind}Storage") for kind in _STORAGES.split()}
_READ_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,  # of a file that was cut: it was opened before
)


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        return Inert


class _RestrictedPickle:
    """What `torch.load` asks of a pickle module."""

    Unpickler = _RestrictedUnpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _RestrictedUnpickler(file, **kwargs).load()


def read_foreign(path: Path) -> Any:
    """The object in a torch file: tensors in plain containers, foreign objects replaced by `Inert`.

    Raises FileNotFoundError, or ValueError saying that it is no torch file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the weights file inside it")
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    require_content(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        if not zipfile.is_zipfile(path) and not _looks_pickled(path):
            raise ValueError(f"{path} is no torch file: {first_line(error)}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_RestrictedPickle)
    except _READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read as plain tensors: {first_line(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name out of a file; see `tensors_of`."""
    return tensors_of(read_foreign(path), path)


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Tensors by name; the entry `ema`, `state_dict`, `model` or `weights` is looked into when there is one.

    Raises ValueError naming `path` when there are none.
    """
    entries = ("ema", "state_dict", "model_state_dict", "model", "module", "weights")
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inside = next((content[entry] for entry in entries if isinstance(content.get(entry), dict)), None)
        if inside is None:
            break
        content = inside
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors (entries: {', '.join(map(str, list(content)[:5]))})")
    return {n.removeprefix("module."): t.detach() for n, t in tensors.items()}


def unwrapped(tensors: dict[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """Names without what wrappers put before them: `module.`, `_orig_mod.`, `model.`, `first_stage_model.` in any
    nesting. `anchor`: a regular expression of how some weight of the model itself begins.

    What stands beside an autoencoder in the file of a latent diffusion model (`first_stage_model.`) is left out.
    """
    named = {INNER.sub(r"\1", name): tensor for name, tensor in tensors.items()}
    found = [m[1] for m in (re.match(rf"({OUTER}*)(?:{anchor})", name) for name in named) if m]
    prefix = max(dict.fromkeys(found), key=found.count, default="")
    inside = {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
    if "first_stage_model." in prefix:
        return inside
    return {name: t for name, t in named.items() if not name.startswith(prefix)} | inside


def require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError naming a weight that holds NaN or infinity: of a training that had diverged, or damaged."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path} is damaged: the weight {name} holds numbers that are not finite")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {first_line(error)}") from error


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"
