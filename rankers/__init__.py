"""Rankers: `score(text, images)` says which images show what the text names; higher is better.

ranker = load_ranker("runs/ranker")                                       # ours, trained by rankers.train
ranker = load_ranker("clip:xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k")  # a published open_clip tag
ranker = load_ranker("OFA-Sys/chinese-clip-vit-base-patch16")             # a published Chinese-CLIP
ranker = load_ranker("brivl:weights.pth?preset=nmi-grid")                 # BriVL, weights from a file
ranker = load_ranker("likelihood:out")                                    # the generator's own scores
ranker = load_ranker("runs/ranker,likelihood:out")                        # mean rank over several
"""

from pathlib import Path
from typing import Any

import common  # noqa: F401 (before torch: Ctrl-C meanwhile leaves no traceback)

DEFAULT_RANKER = "pretrained/goods-128/ranker"
ITS_GENERATORS = ("pretrained/goods-128/generator", "pretrained/goods-256/generator")
"""Whose images it was trained to order."""


def load_ranker(name: str | Path, device: str = "auto", precision: str = "auto") -> Any:
    """The ranker of that name: an object with `name`, `calibration` (or None) and `score(text, images)`.

    Raises FileNotFoundError or ValueError in one sentence that names what was looked for.
    """
    name = str(name).strip()
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1:
        from rankers.ensemble import EnsembleRanker

        return EnsembleRanker([load_ranker(part, device, precision) for part in parts])
    kind, _, rest = name.partition(":")
    if not name or (kind in _SCHEMES and not rest):
        raise ValueError(f"no ranker is named {name!r}: give a checkpoint directory, or {_schemes()}")
    if kind in _SCHEMES and rest:
        return _SCHEMES[kind](rest, device, precision)
    if _is_chinese_clip(name):
        return _chinese_clip(name, device, precision)
    return _own(name, device, precision)


def default_ranker(generator: str = "") -> Path:
    """The newest ranker trained here, else the one that ships; always the latter for images of a generator that
    ships (`generator`: the sha256 of what made them). Raises FileNotFoundError saying how to get one."""
    from common.files import shipped
    from common.run_dir import newest_run

    if generator and generator in _shipped_generators():
        return shipped(DEFAULT_RANKER)
    found = newest_run("ranker")
    if found is None and (shipped(DEFAULT_RANKER) / "config.json").is_file():
        found = shipped(DEFAULT_RANKER)
    if found is None:
        raise FileNotFoundError(
            f"no ranker was trained under runs/ and none lies in {DEFAULT_RANKER}: train one with "
            "`python -m rankers.train`, or name one with --ranker"
        )
    return found


def _shipped_generators() -> set[str]:
    """The sha256 of the generators that ship with the ranker; empty where it is missing."""
    from common.files import read_json, shipped

    if not (shipped(DEFAULT_RANKER) / "config.json").is_file():
        return set()
    configs = (shipped(name) / "config.json" for name in ITS_GENERATORS)
    return {read_json(config).get("sha256", "") for config in configs if config.is_file()}


def _own(name: str, device: str, precision: str) -> Any:
    from rankers.clip import own_ranker

    return own_ranker(name, device, precision)


def _published(name: str, device: str, precision: str) -> Any:
    from rankers.clip import published_ranker

    return published_ranker(name, device, precision)


def _chinese_clip(name: str, device: str, precision: str) -> Any:
    from rankers.chinese_clip import chinese_clip_ranker

    return chinese_clip_ranker(name, device, precision)


def _brivl(name: str, device: str, precision: str) -> Any:
    from rankers.brivl.ranker import brivl_ranker

    return brivl_ranker(name, device, precision)


def _likelihood(name: str, device: str, precision: str) -> Any:
    from rankers.likelihood import LikelihoodRanker

    return LikelihoodRanker.from_directory(Path(name))


_SCHEMES = {
    "clip": _published,
    "chinese_clip": _chinese_clip,
    "brivl": _brivl,
    "likelihood": _likelihood,
}


def _schemes() -> str:
    return ", ".join(f"{kind}:..." for kind in _SCHEMES)


def _is_chinese_clip(name: str) -> bool:
    """A folder in the hub's layout, or a hub id of that family."""
    from common.files import read_json

    config = Path(name) / "config.json"
    if config.is_file():
        values = read_json(config)
        return isinstance(values, dict) and values.get("model_type") == "chinese_clip"
    return not Path(name).exists() and name.count("/") == 1 and "chinese-clip" in name.lower()
