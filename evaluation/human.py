"""Which images do people like better? Two images of one text side by side, nobody knows whose.

    python -m evaluation.human out/arena                                                 # all systems of an arena
    python -m evaluation.human ours=out theirs=out_other --choices out/choices.jsonl     # open the address it prints
    python -m evaluation.human --results out/choices.jsonl                               # win rates with intervals

Sides and order are chosen by the seed for every rater. Every choice is one line of the file, written before the next
pair is shown: stop and start as often as you like, with any number of raters. A tenth of the pairs comes back with the
sides exchanged, which says how far a rater agrees with himself. `/?rater=NAME` is a link that asks for no name. Images
are sent as plain pixels of one size under the pair's number, so that neither name nor size tells whose they are.
"""

import hashlib
import io
import json
import os
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from common.config import command, parse_options
from common.console.tables import plain_console
from common.files import ensure_writable_directory
from common.lock import locked
from common.log import say
from common.outputs.image_list import LIST
from common.text.language import Language
from evaluation.compare.generating import SYSTEMS
from evaluation.compare.systems import SystemSpec
from evaluation.metrics.statistics import Interval, wilson
from evaluation.sets import Sample, SampleSet

CHOICES = ("left", "right", "equal", "both_bad")


@dataclass(frozen=True)
class Options:
    """Ask people which of two images is better."""

    sets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Two or more NAME=DIRECTORY of images: an out directory, or a folder of images with texts; or the directory of an
    arena, for all of its systems."""
    choices: Path = Path("out/choices.jsonl")
    """File that choices are appended to."""
    results: Path | None = None
    """Print the win rates of this file and end."""
    num_pairs: int = 100
    """Pairs of every two sets."""
    repeat_share: float = 0.1
    """Share of the pairs that come a second time with the sides exchanged."""
    seed: int = 0
    """Seed of which images, sides and order."""
    language: Language = "auto"
    """Of the page: zh, en, or auto, which follows the locale."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets raters in from other machines, without any password."""
    port: int = 8777
    """Port of the page; 0 takes a free one."""

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, not {self.num_pairs}")
        if not 0 <= self.repeat_share <= 1:
            raise ValueError(f"repeat_share must lie in [0, 1], not {self.repeat_share}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in 0 .. 65535, not {self.port}")


@dataclass(frozen=True)
class Pair:
    """One question."""

    text: str
    first: Sample
    second: Sample
    names: tuple[str, str]
    """Of the two sets, in the order they were given."""
    exchanged: bool = False
    """The second time, with the sides exchanged."""

    @property
    def id(self) -> str:
        """Stable as long as the images are; says nothing about whose they are."""
        digest = hashlib.sha256(repr((self.text, self.names, self.exchanged)).encode())
        for sample in (self.first, self.second):
            digest.update(sample.path.read_bytes())
        return digest.hexdigest()[:20]


def make_pairs(sets: Sequence[SampleSet], num_pairs: int, repeat_share: float, seed: int) -> list[Pair]:
    """For every two sets, pairs of one text and place. Raises ValueError where two sets share no text."""
    pairs = []
    for a, b in combinations(sets, 2):
        groups_a, groups_b = a.by_prompt(), b.by_prompt()
        found = [
            Pair(text, first, second, (a.name, b.name))
            for text, group in groups_a.items()
            for first, second in zip(group, groups_b.get(text, ()), strict=False)
        ]
        if not found:
            raise ValueError(f"{a.name} and {b.name} have no text in common: nothing to compare")
        rng = random.Random(f"{seed} {a.name} {b.name}")
        chosen = _spread(found, num_pairs, rng)
        again = rng.sample(chosen, round(repeat_share * len(chosen)))
        pairs += chosen + [Pair(p.text, p.first, p.second, p.names, True) for p in again]
    return pairs


def _spread(pairs: Sequence[Pair], count: int, rng: random.Random) -> list[Pair]:
    """`count` of them, as many texts as possible: the first of every text, then the second ..."""
    by_text: dict[str, list[Pair]] = defaultdict(list)
    for pair in rng.sample(list(pairs), len(pairs)):
        by_text[pair.text].append(pair)
    rounds = max(len(group) for group in by_text.values())
    ordered = [group[i] for i in range(rounds) for group in by_text.values() if i < len(group)]
    return ordered[:count]


class Study:
    """The pairs, what was chosen so far, and who is asked what next."""

    def __init__(self, pairs: Sequence[Pair], path: Path, seed: int) -> None:
        """Raises ValueError when `path` cannot be written, or holds something else than choices."""
        self.pairs = {pair.id: pair for pair in pairs}
        self.path, self.seed, self.lock = path, seed, threading.Lock()
        self.done: dict[str, set[str]] = defaultdict(set)
        if path.is_file():
            for line in read_choices(path):
                self.done[line["rater"]].add(line["pair"])
            _drop_half_line(path)

    def order(self, rater: str) -> list[str]:
        """Ids in this rater's order, the exchanged ones in the second half."""
        rng = random.Random(f"{self.seed} {rater}")
        ids = sorted(self.pairs)
        rng.shuffle(ids)
        late = [i for i in ids if self.pairs[i].exchanged]
        early = [i for i in ids if not self.pairs[i].exchanged]
        half = len(early) // 2
        rest = early[half:] + late
        rng.shuffle(rest)
        return early[:half] + rest

    def sides(self, rater: str, pair_id: str) -> tuple[Sample, Sample, bool]:
        """Left and right image, and whether the second set's is left."""
        pair = self.pairs[pair_id]
        heads = random.Random(repr((self.seed, rater, pair.text, pair.first.path.name))).random() < 0.5
        turned = heads != pair.exchanged
        return (pair.second, pair.first, True) if turned else (pair.first, pair.second, False)

    def next(self, rater: str) -> dict[str, Any]:
        """What the page shows next: ids, text and progress, no names."""
        left = [i for i in self.order(rater) if i not in self.done[rater]]
        progress = {"done": len(self.pairs) - len(left), "total": len(self.pairs)}
        return {"pair": left[0], "text": self.pairs[left[0]].text, **progress} if left else progress

    def record(self, rater: str, pair_id: str, choice: str, seconds: float) -> bool:
        """Append a choice; False when this rater has answered already. Raises ValueError for what cannot be."""
        if pair_id not in self.pairs:
            raise ValueError(f"no pair {pair_id!r}")
        if choice not in CHOICES:
            raise ValueError(f"a choice is one of {', '.join(CHOICES)}, not {choice!r}")
        pair = self.pairs[pair_id]
        left, right, turned = self.sides(rater, pair_id)
        winner = None
        if choice in ("left", "right"):
            winner = pair.names[int((choice == "right") != turned)]
        line = {
            "pair": pair_id,
            "rater": rater,
            "text": pair.text,
            "sets": list(pair.names),
            "left": str(left.path),
            "right": str(right.path),
            "choice": choice,
            "winner": winner,
            "exchanged": pair.exchanged,
            "seconds": round(seconds, 2),
            "time": round(time.time(), 1),
        }
        with self.lock:
            if pair_id in self.done[rater]:
                return False
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.done[rater].add(pair_id)
        return True

    def image(self, rater: str, pair_id: str, side: str) -> bytes:
        """PNG bytes without anything but pixels, both of a pair at the size of the larger. Raises ValueError for an
        unknown one."""
        if pair_id not in self.pairs or side not in ("left", "right"):
            raise ValueError(f"no image {side!r} of {pair_id!r}")
        left, right, _ = self.sides(rater, pair_id)
        images = [left.image, right.image]
        size = max((image.size for image in images), key=lambda s: s[0] * s[1])
        shown = images[side == "right"]
        if shown.size != size:
            shown = shown.resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        shown.save(buffer, "PNG")
        return buffer.getvalue()


# --- results -------------------------------------------------------------------------------------------------------


def read_choices(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a choices file. Raises ValueError naming a line that is none."""
    data = path.read_bytes()
    *whole, rest = data.split(b"\n")
    if rest and not (whole or rest.startswith(b"{")):
        whole = [rest]  # no killed server left that
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            names = {"pair", "rater", "sets", "choice", "winner", "exchanged"}
            if not isinstance(line, dict) or not names <= set(line) or line["choice"] not in CHOICES:
                raise ValueError("a field is missing or wrong")
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no choice of evaluation.human: {error}") from error
        yield line


def _drop_half_line(path: Path) -> None:
    """What a killed server left unfinished at the end."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


@dataclass(frozen=True)
class Result:
    """Two sets against each other."""

    first: str
    second: str
    wins: int
    """Choices for `first`, repeated pairs left out."""
    losses: int
    equal: int
    both_bad: int
    raters: int
    win_rate: Interval | None
    """Share of `first` among the decided, Wilson's 95 % interval; None where nothing was decided."""
    agreement: tuple[int, int]
    """Repeated pairs that got the same answer, of how many."""


def results(lines: Sequence[dict[str, Any]]) -> list[Result]:
    """One row for every two sets. Raises ValueError when there are no choices."""
    if not lines:
        raise ValueError("there are no choices yet")
    found = []
    for names in dict.fromkeys(tuple(line["sets"]) for line in lines):
        mine = [line for line in lines if tuple(line["sets"]) == names]
        once = [line for line in mine if not line["exchanged"]]
        wins, losses = (sum(line["winner"] == name for line in once) for name in names)
        rate = wilson(wins, wins + losses) if wins + losses else None
        equal, bad = (sum(line["choice"] == c for line in once) for c in ("equal", "both_bad"))
        raters = len({line["rater"] for line in mine})
        found.append(Result(*names, wins, losses, equal, bad, raters, rate, _agreement(mine)))
    return found


def _agreement(lines: Sequence[dict[str, Any]]) -> tuple[int, int]:
    def key(line: dict[str, Any]) -> tuple[str, ...]:
        return (line["rater"], line["text"], *sorted((line["left"], line["right"])))

    def answer(line: dict[str, Any]) -> str:
        return line["winner"] or line["choice"]

    first = {key(line): answer(line) for line in lines if not line["exchanged"]}
    pairs = [(first[key(line)], answer(line)) for line in lines if line["exchanged"] and key(line) in first]
    return sum(a == b for a, b in pairs), len(pairs)


@dataclass(frozen=True)
class Standing:
    """One set against all others."""

    name: str
    wins: int
    decided: int
    """Choices for it or for the other, repeated pairs left out."""
    win_rate: Interval | None


def standings(rows: Sequence[Result]) -> list[Standing]:
    """A row a set, the best first. Rates compare sets that met the same others equally often."""
    wins: dict[str, int] = defaultdict(int)
    decided: dict[str, int] = defaultdict(int)
    for row in rows:
        for name, own in ((row.first, row.wins), (row.second, row.losses)):
            wins[name] += own
            decided[name] += row.wins + row.losses
    found = [
        Standing(n, wins[n], decided[n], wilson(wins[n], decided[n]) if decided[n] else None) for n in decided
    ]
    return sorted(found, key=lambda s: -(s.win_rate.value if s.win_rate else -1.0))


def show(rows: Sequence[Result]) -> None:
    from rich.table import Table

    table = Table(title="choices of people")
    for name in ("first", "second", "first better", "second better", "equal", "both bad", "raters"):
        table.add_column(name, justify="left" if name in ("first", "second") else "right")
    table.add_column("first better among the decided, 95 %", justify="right")
    table.add_column("same answer when asked again", justify="right")
    for row in rows:
        counts = (row.wins, row.losses, row.equal, row.both_bad, row.raters)
        again = f"{row.agreement[0]} of {row.agreement[1]}" if row.agreement[1] else "-"
        table.add_row(row.first, row.second, *map(str, counts), _share(row.win_rate), again)
    plain_console().print(table)
    if len(rows) > 1:
        overall = Table(title="every set against the others")
        for name in ("set", "better", "of decided", "share, 95 %"):
            overall.add_column(name, justify="left" if name == "set" else "right")
        for one in standings(rows):
            overall.add_row(one.name, str(one.wins), str(one.decided), _share(one.win_rate))
        plain_console().print(overall)


def _share(rate: Interval | None) -> str:
    return "-" if rate is None else f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def load_sets(specs: Sequence[str]) -> list[SampleSet]:
    """Raises ValueError for fewer than two sets, for equal names, and for what is no generated set."""
    parsed = [SystemSpec.parse(text) for given in specs for text in _systems_in(given)]
    if len(parsed) < 2 or len({spec.name for spec in parsed}) < len(parsed):
        raise ValueError(
            "name two or more sets of generated images, each NAME=DIRECTORY with a name of its own"
        )
    return [SampleSet.from_out_dir(Path(spec.what), spec.name) for spec in parsed]


def _systems_in(given: str) -> list[str]:
    """NAME=DIRECTORY of every system of an arena's directory; anything else as it is."""
    folder = Path(given) / SYSTEMS
    if "=" in given or not folder.is_dir():
        return [given]
    return [f"{path.name}={path}" for path in sorted(folder.iterdir()) if (path / LIST).is_file()]


@command
def main(argv: Sequence[str] | None = None) -> list[Result] | None:
    """Serve the page until interrupted, or print results."""
    options = parse_options(Options, argv, description=__doc__)
    if options.results:
        if not options.results.is_file():
            raise FileNotFoundError(f"no file of choices {options.results}")
        rows = results(list(read_choices(options.results)))
        show(rows)
        return rows
    from evaluation.human_page import serve

    pairs = make_pairs(load_sets(options.sets), options.num_pairs, options.repeat_share, options.seed)
    ensure_writable_directory(options.choices.parent)
    alone = locked(options.choices.parent, f".{options.choices.name}.lock")
    with (
        alone,
        serve(
            study := Study(pairs, options.choices, options.seed), options.host, options.port, options.language
        ) as server,
    ):
        say(f"{len(study.pairs)} questions at http://{options.host}:{server.server_port}/ | ctrl-C ends it")
        say(f"choices go to {options.choices}; python -m evaluation.human --results {options.choices}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("ended; the same command goes on")
    return None


if __name__ == "__main__":
    main()
