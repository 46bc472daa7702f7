"""Checkpoint directories: `runs/NAME/step_00020000/` holds all that a friend's machine needs.

    config.json            format, kind, model config, step, versions, sha256 of the weights
    model.safetensors      plain names; the moving average if it was on
    train_config.json      the options of the run
    training_state/        optimizer, schedule, sample counter: only for going on with the run
    image_tokenizer/ ...   whatever else the kind needs

Written under a temporary name and renamed; `latest` moves last (see common/run_dir.py). Weights are safetensors and
the training state is read with `weights_only=True`: nothing is unpickled.
"""

import contextlib
import errno
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from common.compact import widen
from common.files import read_json, require_content, sha256_file, shipped, size_of, write_json
from common.run_dir import (
    LATEST,
    clean,
    latest_step,
    new_step_directory,
    newest_run,
    prune,
    step_directories,
    step_directory,
)

__all__ = [
    "clean",
    "latest_step",
    "new_step_directory",
    "newest_run",
    "prune",
    "step_directories",
    "step_directory",
]  # beside what is defined here

FORMAT = 1


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """A safetensors file that others may read as they may any new file. Raises OSError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # save_file leaves its own files to their owner alone
    try:
        save_file({n: t.detach().to("cpu").contiguous().clone() for n, t in weights.items()}, str(path))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    with contextlib.suppress(OSError):  # file systems without modes
        path.chmod(mode)


def write_model(
    directory: Path,
    kind: str,
    model_config: dict[str, Any],
    weights: dict[str, Tensor],
    step: int,
    **extra: Any,
) -> None:
    """`config.json` and `model.safetensors` into an existing directory."""
    save_weights(directory / "model.safetensors", weights)
    config = {
        "format": FORMAT,
        "kind": kind,
        "model": model_config,
        "step": step,
        "sha256": sha256_file(directory / "model.safetensors"),
        "versions": {"torch": torch.__version__},
        **extra,
    }
    write_json(directory / "config.json", config)


def ensure_space(run_dir: Path, state: dict[str, Any]) -> None:
    """Raises OSError naming the space needed when a checkpoint with this training state cannot fit."""
    previous = step_directories(run_dir)
    needed = max(tensor_bytes(state), size_of(previous[-1]) if previous else 0)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint in {run_dir} needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free: the "
            "previous one is whole; free some space and run the same command again",
        )


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(tensor_bytes(v) for v in value)


def resolve(name: str | Path) -> Path:
    """A checkpoint directory, a run directory (its newest checkpoint) or a hub id -> a local checkpoint directory.

    Raises FileNotFoundError when it is none of these.
    """
    path = Path(os.path.expanduser(name))
    if str(name).startswith("pretrained/"):
        path = shipped(str(name))
    if (path / "config.json").is_file():
        return path
    run_dir = path.parent if path.name == LATEST else path
    found = latest_step(run_dir)
    if found:
        return found
    if path.exists():
        raise FileNotFoundError(f"{path} is no checkpoint directory: it holds no config.json")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return _download(str(name))
    raise FileNotFoundError(f"no checkpoint directory {name}")


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, ignore_patterns=["training_state/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a local directory nor a hub repository that can be reached"
        ) from error


def read_config(directory: Path, kind: str) -> dict[str, Any]:
    """`config.json` of a checkpoint of that kind. Raises ValueError for another kind or format."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no checkpoint directory: it holds no config.json")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("kind") != kind:
        found = config.get("kind") if isinstance(config, dict) else None
        raise ValueError(f"{directory} holds a checkpoint of kind {found!r}, not {kind!r}")
    if config.get("format") != FORMAT:
        raise ValueError(f"{directory} has format {config.get('format')}; this version reads {FORMAT}")
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"{path} does not say what the model is: the checkpoint is not whole")
    return config


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Tensors of `model.safetensors`; 16 and 8 bits are widened to float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no model.safetensors")
    require_content(path)
    try:
        return widen(load_file(str(path)))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def require_intact(directory: Path) -> None:
    """Raises ValueError where the weights are not those that config.json tells of: damaged on the way, or of another
    model. Numbers that are merely wrong would generate without a word."""
    path, known = directory / "model.safetensors", read_json(directory / "config.json").get("sha256")
    if known and path.is_file() and sha256_file(path) != known:
        raise ValueError(
            f"{path} is not the file that was saved (its sha256 is another): copy or download it again"
        )


def load_weights(model: nn.Module, directory: Path) -> None:
    """Strictly: every weight of the model, no other, each of its shape, from the very file that was saved. Raises
    ValueError naming what differs."""
    weights, expected = read_weights(directory), model.state_dict()
    missing, extra = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has the unknown {_some(extra)}"] * bool(
            extra
        )
        raise ValueError(
            f"{directory}/model.safetensors does not fit its config.json: it {' and '.join(parts)}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{directory}/model.safetensors: {name} has shape {tuple(tensor.shape)}, the config asks for "
                f"{tuple(expected[name].shape)}"
            )
    require_intact(directory)
    model.load_state_dict(weights)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Written:
    """A file that remembers why a write failed: torch.save turns that into a RuntimeError without the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_training_state(directory: Path, state: dict[str, Any]) -> None:
    """Raises OSError when the file cannot be written."""
    path = directory / "training_state"
    path.mkdir()
    with (path / "state.pt").open("wb", buffering=0) as file:
        written = _Written(file)
        try:
            torch.save(state, written)
        except RuntimeError as error:
            raise written.error or error from error


def read_training_state(directory: Path) -> dict[str, Any]:
    """Tensors are mapped from the file, so that many processes of a node share its pages.

    Raises FileNotFoundError when the checkpoint was released without it, ValueError when it is damaged.
    """
    path = directory / "training_state" / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no training_state: it can be used, but not trained on; where there is a checkpoint "
            "before it, move this one away to go on from that"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged: delete {directory} to go on from the checkpoint before it"
        ) from error
