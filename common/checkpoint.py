"""Checkpoint directories: `runs/NAME/step_00020000/` holds all that a friend's machine needs.

    config.json            format, kind, model config, step, versions, sha256 of the weights
    model.safetensors      plain names; the moving average if it was on
    train_config.json      the options of the run
    training_state/        optimizer, schedule, sample counter: only for going on with the run
    image_tokenizer/ ...   whatever else the kind needs

Written under a temporary name and renamed; the link `latest` moves last. Weights are safetensors and the training
state is read with `weights_only=True`: nothing is unpickled.
"""

import contextlib
import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from common.compact import widen
from common.files import atomic_directory, read_json, sha256_file, size_of, write_json

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


@contextlib.contextmanager
def new_step_directory(run_dir: Path, step: int) -> Iterator[Path]:
    """Fill the yielded directory; it becomes that of the step in `run_dir` and `latest` points to it."""
    final = step_directory(run_dir, step)
    with atomic_directory(final) as temporary:
        yield temporary
    point_latest(run_dir, final.name)


def point_latest(run_dir: Path, name: str) -> None:
    link, temporary = run_dir / "latest", run_dir / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    if link.is_dir() and not link.is_symlink():  # the run was copied by a program that follows links
        shutil.rmtree(link)
    os.replace(temporary, link)


def step_directory(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}"


def step_directories(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(d for d in run_dir.glob("step_*") if (d / "config.json").is_file())


def prune(run_dir: Path, keep_last: int, keep: tuple[Path, ...] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints and those in `keep`; 0 keeps all."""
    for directory in step_directories(run_dir)[:-keep_last] if keep_last else []:
        if directory not in keep:
            doomed = directory.with_name(
                f".{directory.name}.tmp"
            )  # killed half-way, it is no checkpoint any more
            os.replace(directory, doomed)
            shutil.rmtree(doomed)


def clean(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for leftover in (*run_dir.glob(".step_*.tmp"), *run_dir.glob(".step_*.old")):
        shutil.rmtree(leftover)
    for leftover in (*run_dir.glob(".latest.*"), *run_dir.glob(".*.tmp")):
        if not leftover.is_dir():
            leftover.unlink()


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


def newest_run(kind: str, runs: Path = Path("runs")) -> Path | None:
    """The `latest` checkpoint of that kind that was written last, over all runs."""
    found = []
    for link in runs.glob("*/latest"):
        directory = link.resolve()
        config = directory / "config.json"
        if config.is_file() and read_json(config).get("kind") == kind:
            found.append((config.stat().st_mtime, directory))
    return max(found)[1] if found else None


def resolve(name: str | Path) -> Path:
    """A checkpoint directory, a run directory (its `latest`) or a hub id -> a local checkpoint directory.

    Raises FileNotFoundError when it is none of these.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    if (path / "latest" / "config.json").is_file():
        return (path / "latest").resolve()
    if path.exists():
        raise FileNotFoundError(f"{path} is no checkpoint directory: it holds no config.json")
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")):
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
    return config


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Tensors of `model.safetensors`; 16 and 8 bits are widened to float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no model.safetensors")
    try:
        return widen(load_file(str(path)))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def require_intact(directory: Path) -> None:
    """Raises ValueError where the weights are not those that config.json tells of: damaged on the way, or of another
    model. Numbers that are merely wrong would draw without a word."""
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
