"""`images.jsonl`, one line an image with all that it depends on, and the `ranking.json` beside it: names and readers.

`common/outputs/out_directory.py` writes the list, `rankers/ranking.py` the ranking.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import read_json, read_lines

LIST, GRID = "images.jsonl", "grid.png"
RANKING, RANKED = "ranking.json", "ranked.png"
MAX_GRID = 64  # images that grid.png shows
# of a line: what its image depends on beside text and index, the same for all images of a run of generate.py
SETTINGS = ("seed", "sampling", "negative", "source", "weights", "checkpoint")
ORIGIN = (*SETTINGS, "engine", "kernels", "label", "whiten")


def image_name(number: int) -> str:
    return f"{number:04d}.png"


def read_list(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """Every line and where it stands, PATH:NUMBER. Raises ValueError naming a line that is no JSON object."""
    path, found = directory / LIST, []
    for number, text in enumerate(read_lines(path), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not valid JSON: {error}") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number} is no JSON object")
        found.append((f"{path}:{number}", line))
    return found


def whole_lines(directory: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Lines from byte `start` on, each with the byte it ends at, up to one that a kill cut short or that is damaged:
    what follows it is made again. None where there is no list."""
    if not (directory / LIST).is_file():
        return
    with (directory / LIST).open("rb") as file:
        file.seek(start)
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                return
            if not isinstance(line, dict) or not text.endswith(b"\n"):
                return
            yield line, file.tell()


def read_ranking(directory: Path) -> dict[str, Any]:
    """What rerank.py wrote, {} where it did not run: `ranker`, and in `texts` the `pictures` of each with their `file`,
    `rank` and `score`. Raises ValueError for anything else."""
    path = directory / RANKING
    if not path.is_file():
        return {}
    ranking = read_json(path)
    try:
        rows = [row for text in ranking["texts"] for row in text["pictures"]]
        _ = [(str(row["file"]), int(row["rank"]), float(row["score"])) for row in rows], ranking["ranker"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no ranking of rerank.py: rank again, or delete it") from error
    return ranking
