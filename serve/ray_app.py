"""The same application as a deployment of Ray Serve: replicas on several machines, more of them as requests queue up.

    pip install "ray[serve]>=2.50"
    serve run serve.ray_app:deploy checkpoint=/models/goods num_replicas=4
    serve run serve.ray_app:deploy checkpoint=/models/goods min_replicas=1 max_replicas=8 database=postgresql+psycopg://host/keys

A replica is the whole service: queue, worker process, continuous batching. All of them share the database of keys, so
limits count across replicas, and the folder of images that are answered as URLs, which must be one that all of them
see. Each has an audit log of its own, below `audit_dir`: a chain has one writer.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.config import from_mapping
from serve.keys import DEFAULT_DATABASE
from serve.options import ServeOptions

DEPLOYMENT = "product-painter"


@dataclass(frozen=True)
class RayOptions:
    """What `serve run` takes as NAME=VALUE."""

    checkpoint: str = ""
    """Checkpoint directory, run directory or hub id, on every machine; empty: the newest of runs/, else the one that
    ships."""
    ranker: str = ""
    """As that of `python -m serve`."""
    database: str = DEFAULT_DATABASE
    """SQLAlchemy URL of keys and usage; of PostgreSQL where replicas are on several machines."""
    audit_dir: Path = Path("audit")
    """Directory with one audit log a replica below it."""
    image_dir: Path = Path("served")
    """Directory of images that are answered as URLs, shared by all replicas."""
    num_replicas: int = 0
    """Replicas; 0: as many as requests need, from min_replicas to max_replicas."""
    min_replicas: int = 1
    """Fewest replicas where num_replicas is 0."""
    max_replicas: int = 4
    """Most replicas where num_replicas is 0."""
    requests_per_replica: int = 16
    """Requests on their way in a replica from which another one is started."""
    num_cpus: float = 2.0
    """CPUs that Ray counts for a replica."""
    num_gpus: float = 0.0
    """GPUs that Ray counts for a replica."""

    def __post_init__(self) -> None:
        if self.num_replicas < 0 or not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"num_replicas must be 0 or more and min_replicas lie in [1, max_replicas], not {self.num_replicas}, "
                f"{self.min_replicas} and {self.max_replicas}"
            )

    def of_service(self, replica: str) -> ServeOptions:
        """The options of one replica's service."""
        return ServeOptions(
            checkpoint=self.checkpoint,
            ranker=self.ranker,
            database=self.database,
            audit_dir=self.audit_dir / replica,
            image_dir=self.image_dir,
        )


def deploy(arguments: dict[str, Any]) -> Any:
    """The application that `serve run serve.ray_app:deploy NAME=VALUE ...` starts. Raises ValueError."""
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise ValueError('Ray Serve needs the package ray: pip install "ray[serve]>=2.50"') from error

    options = from_mapping(RayOptions, _typed(arguments), where="serve run")
    scale: dict[str, Any] = {"num_replicas": options.num_replicas}
    if not options.num_replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.requests_per_replica,
            }
        }

    def build() -> Any:
        """The application of one replica; called there."""
        from serve.__main__ import make_dispatcher
        from serve.app import create_app

        own = options.of_service(serve.get_replica_context().replica_tag)
        return create_app(own, make_dispatcher(own))

    deployment = serve.deployment(
        serve.ingress(build)(),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=512,
        **scale,
    )
    return deployment.bind()


def _typed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the command line, where they are text, as numbers."""
    import yaml

    numbers = [f.name for f in fields(RayOptions) if f.type in (int, float)]
    return {n: yaml.safe_load(v) if n in numbers and isinstance(v, str) else v for n, v in arguments.items()}
