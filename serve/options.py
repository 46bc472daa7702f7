"""Options of the service."""

from dataclasses import dataclass, field
from pathlib import Path

from common.outputs.label import LabelOptions
from dalle.options import FastOptions
from serve.keys import DEFAULT_DATABASE

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class ServeOptions:
    """Serve images of a text over HTTP."""

    checkpoint: str = ""
    """Checkpoint directory, run directory or hub id; empty: the newest of runs/, else the one that ships."""
    ranker: str = ""
    """Ranker that orders the images; empty: the newest one trained here, else the one that ships; none: no ranking."""
    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at."""
    open: bool = False
    """Ask for no API key; on loopback addresses only."""
    database: str = DEFAULT_DATABASE
    """SQLAlchemy URL of keys and usage."""
    audit_dir: Path = Path("audit")
    """Directory of the audit log."""
    audit_days: float = 180.0
    """Days that whole audit files are kept; 0 keeps all."""
    log_prompts: bool = False
    """Write prompts, with personal data masked, to the audit log; otherwise only their hashes."""
    deny_list: Path | None = None
    """File of words that no prompt may hold, one a line; read again when it changes."""
    image_dir: Path = Path("served")
    """Directory of the images that are answered as URLs."""
    image_minutes: float = 60.0
    """Minutes that those are kept."""
    max_images: int = 16
    """Images that share a decode step."""
    max_queued_images: int = 128
    """Images that wait or are being sampled, of all requests; beyond it 429."""
    deadline: float = 120.0
    """Seconds after which a request ends with 504."""
    max_body_mb: float = 20.0
    """Largest request body, in MiB."""
    body_seconds: float = 30.0
    """Seconds in which a request's body must arrive."""
    max_connections: int = 512
    """Open connections; beyond it 503."""
    drain_seconds: float = 60.0
    """Seconds that running requests get after SIGTERM."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages elsewhere that may call the API; none by default."""
    label: LabelOptions = field(default_factory=lambda: LabelOptions(label="implicit"))
    """Labels of AI-generated images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads of the model worker; 0: PyTorch's choice."""
    fast: FastOptions = field(default_factory=FastOptions)
    """How the generator is run."""

    def __post_init__(self) -> None:
        if self.open and self.host not in LOOPBACK:
            raise ValueError(
                f"--open asks for no key and is for loopback addresses ({', '.join(LOOPBACK)}), not {self.host}"
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie in [0, 65535], not {self.port}")
        for name in ("max_images", "max_queued_images", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("deadline", "max_body_mb", "body_seconds", "image_minutes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
