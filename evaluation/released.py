"""The comparison of `make arena`: the systems that ship and those in runs/, on the data that they were trained on.

Where the shards of real goods are there, these are the data; else the embedded default is. A kind of system is taken
from `pretrained/` first, then from the run that was written last among those that were trained on the data in question.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from common.config import read_mapping
from common.files import read_json, shipped
from common.log import say
from common.run_dir import latest_step
from dalle.model import KIND as GENERATOR
from data_tools.synthetic.shards import ensure_synthetic
from diffusion.base import KIND as DIFFUSION
from diffusion.train_lora import KIND as LORA
from evaluation.judges.goods import KIND as JUDGE
from gan.model import KIND as GAN
from rankers.model import KIND as RANKER

GOODS, EMBEDDED = "../shared/data/goods", "data/synthetic"
JUDGES = {GOODS: "configs/goods_128/judge.yaml", EMBEDDED: "configs/demo/judge.yaml"}
NUM_PROMPTS = (
    40  # with 8 images each: six systems within 20 minutes on two idle cores, by the cost of an image
)

AnyOptions = TypeVar("AnyOptions", bound=Any)


@dataclass(frozen=True)
class Found:
    """A checkpoint of a kind."""

    kind: str
    directory: Path
    name: str
    """How it is written on the command line: the run directory, or that of the release."""
    is_embedded: bool
    """Trained on the embedded default."""
    written: float


def complete(options: AnyOptions) -> AnyOptions:
    """The options of the arena as they are where systems are named; else with systems, data, judge and ranker.

    Makes the embedded default, and fits a judge, where they are missing. Raises FileNotFoundError where no system is,
    ValueError for other data, for which nobody knows what was trained on them.
    """
    if options.system:
        return options
    if options.reference not in ("", GOODS, EMBEDDED):
        raise ValueError(
            f"name the systems to compare on {options.reference}: --system early=runs/a late=runs/b"
        )
    reference = options.reference or (GOODS if Path(GOODS).is_dir() else EMBEDDED)
    found = checkpoints(on_embedded=reference == EMBEDDED)
    systems = systems_of(found)
    if not systems:
        raise FileNotFoundError(
            f"no system for {reference}: nothing ships for it, and no run was trained on it; run `make demo`, or name "
            "systems with --system"
        )
    if reference == EMBEDDED:
        ensure_synthetic(Path(EMBEDDED))
    ranker = next((f.name for f in found if f.kind == RANKER), "")
    judge = options.judge or next((f.name for f in found if f.kind == JUDGE), "") or fit_judge(reference)
    say(f"systems: {', '.join(systems)} | on {reference} | judge {judge}")
    return replace(
        options,
        system=tuple(systems),
        reference=reference,
        judge=judge,
        ranker=options.ranker or ranker,
        num_prompts=options.num_prompts or NUM_PROMPTS,
    )


def checkpoints(on_embedded: bool, runs: Path = Path("runs"), pretrained: Path | None = None) -> list[Found]:
    """Those that were trained on the data in question: released ones first, then runs, the newest first."""
    released = [] if on_embedded else _found_in(pretrained or shipped("pretrained"), "*/*/")
    own = [f for f in _found_in(runs, "*/") if f.is_embedded == on_embedded]
    return [*released, *sorted(own, key=lambda f: -f.written)]


def _found_in(folder: Path, pattern: str) -> list[Found]:
    found = []
    for path in sorted(folder.glob(pattern)):
        directory = path if (path / "config.json").is_file() else latest_step(path)
        if directory is None:
            continue
        config = read_json(directory / "config.json")
        kind = str(config.get("kind")) if isinstance(config, dict) else ""
        training = directory / "train_config.json"
        options = read_json(training) if training.is_file() else {}
        written = (directory / "config.json").stat().st_mtime
        found.append(Found(kind, directory, str(path).rstrip("/"), _is_embedded(path, options), written))
    return found


def _is_embedded(path: Path, options: dict[str, Any]) -> bool:
    """Whether a run was trained on the embedded default: its options name no data, or the folder made of it."""
    data = options.get("data", "")
    source = data.get("source", "") if isinstance(data, dict) else data
    return path.name.startswith("demo") if not options else not source or str(source).startswith(EMBEDDED)


def systems_of(found: list[Found]) -> list[str]:
    """NAME=PATH of the first of every kind that makes images; an adapter goes with the base it was trained on."""
    systems: dict[str, str] = {}
    base = next((f.name for f in found if f.kind == DIFFUSION), "")
    for one in found:
        if one.kind == GENERATOR:
            systems.setdefault("ar", one.name)
            if read_json(one.directory / "config.json")["model"].get("line_factor"):
                systems.setdefault("ar+lines", f"{one.name}?lines=canny")
        elif one.kind == DIFFUSION:
            systems.setdefault("sd", one.name)
            vae = next((p for p in (Path(one.name) / "vae", one.directory / "vae") if p.is_dir()), None)
            if vae:
                systems.setdefault("vae", str(vae))
        elif one.kind == LORA:
            own = str(read_json(one.directory / "config.json").get("base", ""))
            of = own if Path(own).is_dir() else base
            if of:
                systems.setdefault("lora", f"{of}?lora={one.name}")
        elif one.kind == GAN:
            systems.setdefault("gan", one.name)
    order = ("ar", "ar+lines", "sd", "lora", "gan", "vae")
    return [f"{name}={systems[name]}" for name in order if name in systems]


def fit_judge(reference: str) -> str:
    """Fits the judge of the data; returns its run directory. Raises FileNotFoundError without its network's weights."""
    from evaluation.train_judge import Options, main

    config = JUDGES.get(reference)
    if config is None:
        return ""
    config = str(shipped(config))
    say(f"no judge yet: python -m evaluation.train_judge --config {config}")
    fit = main.__wrapped__  # errors end this command, not that one
    fit(["--config", config])
    return str(read_mapping(Path(config)).get("run_dir", Options().run_dir))
