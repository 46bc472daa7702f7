"""What the model worker is told when it starts; apart from the worker, whose imports the service does without."""

from dataclasses import dataclass, field

from dalle.options import FastOptions


@dataclass(frozen=True)
class WorkerOptions:
    """What to serve, and how."""

    checkpoint: str
    ranker: str
    """Empty: no ranker, nothing is ranked."""
    device: str = "auto"
    fast: FastOptions = field(default_factory=FastOptions)
    max_images: int = 16
    """Images that share a decode step."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's choice."""
