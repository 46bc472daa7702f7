"""What kernels took of a model, for the log, train_config.json and images.jsonl."""

from dataclasses import dataclass
from typing import Literal

Kernels = Literal["auto", "off"]
COMPILED, WRITTEN = "compiled code", "hand-written passes"


@dataclass(frozen=True)
class Taken:
    """Modules of one class."""

    name: str
    made_by: str
    count: int
    """That a kernel computes."""
    total: int
    reasons: tuple[str, ...] = ()
    """Why not the rest."""

    def __str__(self) -> str:
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"{self.count} of {self.total} {self.name} by {self.made_by}{why}"


@dataclass(frozen=True)
class Report:
    """What `accelerate` took."""

    taken: tuple[Taken, ...] = ()
    note: str = ""
    """Why nothing was looked at."""
    level: str = ""
    """Instruction set that the code is compiled for; empty without a compiler."""

    def __str__(self) -> str:
        return f"kernels: {self.note or ', '.join(map(str, self.taken)) or 'no module is known'}"

    def record(self) -> dict[str, str]:
        """JSON-ready: what ran."""
        if self.note:
            return {"off": self.note}
        return {"level": self.level} | {t.name: str(t) for t in self.taken}


OFF = Report(note="off: PyTorch computes everything")
