"""Generating a system's images into its directory: what stands there is kept, so a killed run goes on where it was."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.console.progress import progress
from common.log import say
from common.outputs.image_list import LIST, whole_lines
from common.outputs.out_directory import OutDirectory, Request
from data_tools.prompts import read_prompts
from data_tools.shards.captions import pick_caption
from data_tools.shards.index import ShardIndex
from evaluation.compare.systems import System
from evaluation.sets import SampleSet

SYSTEMS = "systems"  # folder of an arena's directory: an out directory a system


@dataclass(frozen=True)
class Plan:
    """Which images a system has to have."""

    texts: tuple[str, ...]
    num_images: int

    @property
    def requests(self) -> list[Request]:
        return [Request(text, index) for text in self.texts for index in range(self.num_images)]

    def of(self, found: SampleSet) -> SampleSet:
        """The planned images of `found`. Raises ValueError when some are missing."""
        groups = found.by_prompt()
        for text in self.texts:
            count = len(groups.get(text, ()))
            if count < self.num_images:
                raise ValueError(
                    f"{found.name} has {count} images of {text!r}, {self.num_images} are needed: generate them, lower "
                    "--num-images, or leave the prompt out"
                )
        return found.only(self.texts).first(self.num_images)


def generate_into(directory: Path, name: str, system: System, plan: Plan) -> SampleSet:
    """The planned images of `system`, those that `directory` lacks generated now, in rounds of one progress bar.

    Raises ValueError when `directory` holds images of another checkpoint, seed or setting.
    """
    with OutDirectory(directory, _plain(system.origin)) as out:
        standing = _standing(directory, out.origin)
        out.continue_from(iter(standing))
        have = set(standing[: out.count])
        todo = [request for request in plan.requests if request not in have]
        total = len(plan.requests)
        out.require_ours(out.count + len(todo))
        if have and todo:
            say(f"{name}: {total - len(todo)} of {total} images stand in {directory}: going on behind them")
        bar = progress(system.generate(todo), desc=name, total=total, initial=total - len(todo), unit="image")
        for image in bar:
            out.add(image)
        out.forget_leftovers()  # a damaged tail
    return plan.of(SampleSet.from_out_dir(directory, name))


def common_texts(texts: Iterable[str], systems: Sequence[System]) -> tuple[list[str], list[str]]:
    """Texts that every system can read, and the complaints about the others."""
    usable, complaints = list(texts), []
    for system in systems:
        usable, found = readable_texts(usable, system)
        complaints += found
    return usable, complaints


def readable_texts(texts: Iterable[str], system: System) -> tuple[list[str], list[str]]:
    """Texts that a system can read, and its complaints about the others."""
    usable, complaints = [], []
    for text in texts:
        if found := system.complaint(text):
            complaints.append(found)
        else:
            usable.append(text)
    return usable, complaints


def prompt_texts(path: Path, count: int, seed: int) -> list[str]:
    """Distinct texts of a file of prompts, `count` of them chosen by the seed or all (0).

    Raises FileNotFoundError or ValueError naming the file.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in read_prompts(path) if prompt.text))
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return some_of(texts, count, seed)


def caption_texts(source: str, split: str, count: int, seed: int) -> list[str]:
    """Distinct captions of image shards, `count` of them chosen by the seed or all (0)."""
    index = ShardIndex.open(source, split)
    captions = (pick_caption(index.read(i, ("txt",)).get("txt", b""), None) for i in range(len(index)))
    texts = list(dict.fromkeys(text for text in captions if text))
    if not texts:
        raise ValueError(f"the images of {source} have no captions: name a file with --prompts")
    return some_of(texts, count, seed)


def some_of(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` of them chosen by the seed, in their order; 0, or fewer texts: all."""
    if not count or len(texts) <= count:
        return list(texts)
    chosen = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[i] for i in sorted(chosen)]


def _standing(directory: Path, origin: dict[str, Any]) -> list[Request]:
    """What whole lines of the directory record. Raises ValueError when they tell of another origin."""
    requests = []
    for number, (line, _) in enumerate(whole_lines(directory), 1):
        if not {"text", "index"} <= set(line):
            break  # as behind a damaged line, what follows is generated again
        other = [key for key, value in origin.items() if line.get(key) != value]
        if other:
            raise ValueError(
                f"{directory / LIST}:{number} was generated with {other[0]} {line.get(other[0])!r} and not "
                f"{origin[other[0]]!r}: choose another --out, or remove {directory}"
            )
        requests.append(Request(line["text"], line["index"]))
    return requests


def _plain(origin: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(origin))
