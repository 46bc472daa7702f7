"""What a command says never ends it: texts that the terminal cannot show, a pipe whose reader left, a closed stream.

Unknown characters are written as \\uXXXX. Where nobody reads any more, the stream leads to nowhere and the work goes
on: a training is not lost by `| head`.
"""

import contextlib
import io
import os
import sys
from typing import Any, TextIO


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error says, to stand inside a sentence: its first line, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most].rstrip(".")


class Unbreakable:
    """A text stream whose reader may leave: writing never raises."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_nowhere(self) -> Any:
        try:
            yield
        except (OSError, ValueError):  # ValueError: closed
            with contextlib.suppress(OSError, ValueError):
                lead_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lead_nowhere(descriptor: int) -> None:
    """What is still buffered for it, and what others write, is swallowed too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def make_streams_safe() -> None:
    """Of this process; streams that a test or a notebook has put there stay as they are."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if (
            stream is None
        ):  # closed by the shell: the next file would get its descriptor, and what C code prints
            with contextlib.suppress(OSError):
                lead_nowhere(descriptor)
            stream = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)
        elif type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Unbreakable(stream))
