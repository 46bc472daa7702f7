"""Run directories: `step_00020000/`, one a checkpoint, `latest`, which names the newest, and `best`, which names that
of the best evaluation.

Both are symbolic links where the file system has them, so that programs of others follow them, and else files with
the name (network drives, exFAT). Where `latest` is lost or points to nothing, the newest whole step counts.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import atomic_directory, atomic_path, ensure_writable_directory, read_json

LATEST, BEST, MARK = "latest", "best", ".run"
STEP = re.compile(r"step_(\d{8,})")
LEFTOVER = re.compile(
    r"\.(?:step_\d{8,}\.(?:tmp|old)|(?:latest|best)\.\d+|(?:latest|best|[a-z_]+\.jsonl?|wandb_id|\.run)(?:\.\d+)?\.tmp)"
)
WRITTEN = (
    "options.json",
    "metrics.jsonl",
    "samples",
    "tensorboard",
    "image_tokenizer",
    "text_tokenizer",
    "towers",
    "text",
    "labels.json",
)


@contextlib.contextmanager
def new_step_directory(run_dir: Path, step: int) -> Iterator[Path]:
    """Fill the yielded directory; it becomes that of the step in `run_dir` and `latest` points to it."""
    final = step_directory(run_dir, step)
    with atomic_directory(final) as temporary:
        yield temporary
    point_latest(run_dir, final.name)


def point_latest(run_dir: Path, name: str) -> None:
    _point(run_dir, LATEST, name)


def point_best(run_dir: Path, name: str) -> None:
    """Leaves alone what a user has put there: a copy of a checkpoint, say."""
    pointer = run_dir / BEST
    if pointer.is_symlink() or not pointer.exists() or _named_in(pointer):
        _point(run_dir, BEST, name)


def _point(run_dir: Path, pointer: str, name: str) -> None:
    link, temporary = run_dir / pointer, run_dir / f".{pointer}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    if link.is_dir() and not link.is_symlink():  # the run was copied by a program that follows links
        shutil.rmtree(link)
    try:
        temporary.symlink_to(name)
        os.replace(temporary, link)
    except OSError:  # no symbolic links here, or none that can be replaced
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if link.is_symlink():
            link.unlink()
        with atomic_path(link) as written:
            written.write_text(name + "\n", encoding="utf-8")


def latest_step(run_dir: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest whole one; None where there is none."""
    found = _pointed(run_dir / LATEST)
    if found is None and (steps := step_directories(run_dir)):
        found = steps[-1]
    return found.resolve() if found else None


def best_step(run_dir: Path) -> Path | None:
    """The checkpoint of the best evaluation; None where there is none yet, or where it is not known any more."""
    found = _pointed(run_dir / BEST)
    return found.resolve() if found else None


def _pointed(pointer: Path) -> Path | None:
    """The whole checkpoint that a link or a file names, or None."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (pointer / "config.json").is_file():
            return pointer
        name = _named_in(pointer)
        if name and (pointer.parent / name / "config.json").is_file():
            return pointer.parent / name
    return None


def _named_in(pointer: Path) -> str:
    """The step that a file names, or ""."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
        return name if STEP.fullmatch(name) else ""
    return ""


def step_directory(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:08d}"


def step_directories(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first. A copy under a name like step_00000500_best is none of them."""
    found = (d for d in run_dir.glob("step_*") if STEP.fullmatch(d.name) and (d / "config.json").is_file())
    return sorted(found, key=lambda d: int(d.name.removeprefix("step_")))


def prune(run_dir: Path, keep_last: int, keep: tuple[Path, ...] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints and those in `keep`; 0 keeps all.

    What does not say itself that it is the checkpoint of its step stays. One that cannot be deleted, since somebody
    reads it on a file system that minds, is tried again the next time.
    """
    for directory in step_directories(run_dir)[:-keep_last] if keep_last else []:
        if directory in keep or not _is_of_its_step(directory):
            continue
        doomed = directory.with_name(
            f".{directory.name}.tmp"
        )  # killed half-way, it is no checkpoint any more
        try:
            os.replace(directory, doomed)
        except OSError:
            doomed = directory
            with contextlib.suppress(OSError):
                (directory / "config.json").unlink()
        shutil.rmtree(doomed, ignore_errors=True)


def _is_of_its_step(directory: Path) -> bool:
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("step") == int(directory.name.removeprefix("step_"))


def clean(run_dir: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for leftover in run_dir.iterdir():
        if LEFTOVER.fullmatch(leftover.name):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def claim(run_dir: Path, is_main: bool = True) -> None:
    """Make `run_dir` where needed. Raises ValueError where it holds files of the user's under names that a training
    writes; a run of ours is known by its mark, its checkpoints or, of an earlier release, its options and metrics."""
    ensure_writable_directory(run_dir)
    if not (run_dir / MARK).is_file() and not step_directories(run_dir) and not _looks_like_a_run(run_dir):
        found = [name for name in (*WRITTEN, LATEST, BEST) if os.path.lexists(run_dir / name)]
        found += [d.name for d in run_dir.glob("step_*") if STEP.fullmatch(d.name)]
        if found:
            raise ValueError(
                f"{run_dir} holds {found[0]}, which no training of ours has put there: choose another --loop.run-dir"
            )
    if is_main and not (run_dir / MARK).is_file():
        with atomic_path(run_dir / MARK) as temporary:
            temporary.write_text("a training of this project writes here\n", encoding="utf-8")


def _looks_like_a_run(run_dir: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        options = read_json(run_dir / "options.json")
        if isinstance(options, dict) and "loop" in options:
            return True
    with contextlib.suppress(OSError, ValueError), (run_dir / "metrics.jsonl").open("rb") as file:
        first: Any = json.loads(file.readline())
        return isinstance(first, dict) and {"step", "kind"} <= set(first)
    return False


def newest_run(kind: str, runs: Path = Path("runs")) -> Path | None:
    """The latest checkpoint of that kind that was written last, over all runs."""
    found = []
    for run_dir in runs.glob("*/"):
        directory = latest_step(run_dir)
        if directory and read_json(directory / "config.json").get("kind") == kind:
            found.append(((directory / "config.json").stat().st_mtime, directory))
    return max(found)[1] if found else None
