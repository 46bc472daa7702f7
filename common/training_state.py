"""What every task keeps alike of the weights that it trains: engine, optimizer and moving average; saved and resumed.

The science of a step stays in the task: it calls forward, `engine.backward`, `engine.step` and `update_average` itself.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.distributed import BatchPlan, World
from common.engine import EngineName, make_engine
from common.engines.deepspeed import DeepSpeedConfig
from common.optim import Ema, OptimConfig, make_optimizer


class TrainingState:
    """`engine` steps the weights of `model`; `ema` is their moving average, None where `ema_decay` is 0."""

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        world: World,
        plan: BatchPlan,
        ema_decay: float = 0.0,
        engine: EngineName = "plain",
        deepspeed: DeepSpeedConfig | None = None,
    ) -> None:
        self.ema = Ema(model, ema_decay) if ema_decay else None  # before ZeRO 3 shards the weights
        optimizer = make_optimizer(model, optim)
        self.engine = make_engine(model, optimizer, world, plan, optim.grad_clip, engine, deepspeed)

    def update_average(self) -> None:
        """After each step. All processes must call it: under ZeRO the weights are gathered."""
        if self.ema:
            with self.engine.full_weights() as model:
                self.ema.update(model)

    def load_saved_weights_(self, finished: nn.Module) -> None:
        """Give `finished` what a checkpoint would hold: the average where there is one, else the engine's weights.

        All processes must call it: under ZeRO the weights are gathered.
        """
        if self.ema:
            finished.load_state_dict(self.ema.shadow)
            return
        with self.engine.full_weights() as model:
            finished.load_state_dict(model.state_dict())

    def saved_weights(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """What a checkpoint holds, of a state that `state()` gave a moment ago."""
        return self.ema.shadow if self.ema else state["weights"]

    def state(self) -> dict[str, Any]:
        """`weights`, `engine` and, where there is an average, `ema`. All processes must call it."""
        state = {"weights": self.engine.weights(), "engine": self.engine.state()}
        return state | ({"ema": self.ema.state()} if self.ema else {})

    def load_state(self, state: dict[str, Any], run_dir: Path) -> None:
        """What `state()` gave, on any number of processes under any engine.

        Raises ValueError where the run began with a moving average and goes on without, or the other way round.
        """
        require_same_average(run_dir, self.ema, state)
        self.engine.load_state(state["weights"], state["engine"])
        if self.ema:
            self.ema.load_state(state["ema"])


def require_same_config(
    run_dir: Path, before: dict[str, Any], now: dict[str, Any], what: str = "a model"
) -> None:
    """Raises ValueError naming the first option of the model that is another than the run was started with."""
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{run_dir} holds {what} with {name} {before.get(name)}, not {value}: choose another "
                "--loop.run-dir, or the options that it was started with"
            )


def require_same_average(run_dir: Path, ema: Ema | None, state: dict[str, Any]) -> None:
    """Raises ValueError where a run goes on with a moving average and was started without, or the other way round."""
    if (ema is not None) != ("ema" in state):
        began, goes_on = ("without", "with") if ema else ("with", "without")
        raise ValueError(
            f"{run_dir} was trained {began} a moving average and cannot go on {goes_on} one: keep its --ema-decay"
        )
