"""Progress bars: in a terminal a bar, elsewhere a plain line every half minute, with --quiet nothing.

`--quiet` is read by `common.config.parse_options` for every command. It goes into the environment, so that the
processes which a command starts are quiet too.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

QUIET = "PRODUCT_PAINTER_QUIET"
LINE_EVERY = 30.0  # seconds between lines where nobody looks at a bar


def is_quiet() -> bool:
    """Whether the command was started with --quiet."""
    return os.environ.get(QUIET) == "1"


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """tqdm, with its options, on stderr. A run shorter than half a minute leaves no line in a file."""
    options = {"file": sys.stderr, **options}
    if is_quiet():
        return tqdm(iterable, **{**options, "disable": True})
    if options["file"].isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    return LineProgress(iterable, **options)


class LineProgress(tqdm):
    """The same numbers, a line each time."""

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        often = {"mininterval": LINE_EVERY, "maxinterval": LINE_EVERY, "delay": LINE_EVERY}
        super().__init__(iterable, ncols=0, **often, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        def print_line(text: str) -> None:
            file.write(f"{text}\n")
            file.flush()

        return print_line

    def close(self) -> None:
        if self.disable:
            return
        if self.last_print_t >= self.start_t + self.delay:
            self.display()
        self.disable = True
        self._decr_instances(self)
