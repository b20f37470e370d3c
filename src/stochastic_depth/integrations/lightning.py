"""Stochastic depth under Lightning: one callback."""

from typing import Any

import lightning as L
import torch

from .._torch import tree_map_only
from ..drop.ranks import is_distributed
from ..rates import RateSchedule, TimeSchedule
from ..state import load_state_dict, state_dict
from .common import ensure_applied, metrics, rate_schedule

__all__ = ["StochasticDepthCallback"]


class StochasticDepthCallback(L.Callback):
    """Apply stochastic depth, drive its rates, log them, and resume bit for bit.

    It logs ``stochastic_depth/factor``, ``expected_depth``, ``decided`` and ``dropped`` (see
    :meth:`stochastic_depth.RateSchedule.metrics`) every ``log_every_n_steps`` steps. A checkpoint
    holds the rates, the counts and, for each rank, the RNG state from which decisions are drawn,
    which Lightning itself does not save. Resumed from a checkpoint at the end of an epoch, training
    continues as if it had not been interrupted. Each further ``fit`` begins its own schedule.

    Args:
        rate_schedule: the course of the rates over training, as in
            :class:`stochastic_depth.RateSchedule`. None leaves them as they are.
        steps: how many optimizer steps it takes; None is all of the training.
        options: of :func:`stochastic_depth.apply`, which is called on the LightningModule before
            the strategy wraps it, unless it has stochastic depth already. (Modules that are made in
            ``configure_model`` are not there yet: apply to them there.)

    Raises:
        ValueError: options for a model that has stochastic depth already; training without an
            end and no ``steps``; a checkpoint of a run with another number of processes, or without
            this callback.

    Example:
        >>> import lightning as L
        >>> from stochastic_depth.integrations.lightning import StochasticDepthCallback
        >>> callback = StochasticDepthCallback("linear", steps=1000, p=0.2, mode="row")
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self, rate_schedule: TimeSchedule | None = None, steps: int | None = None, **options: Any
    ) -> None:
        self.rate_schedule = rate_schedule
        self.steps = steps
        self.options = options
        self._model: L.LightningModule | None = None
        self._rates: RateSchedule | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            if pl_module is not self._model:
                ensure_applied(pl_module, self.options)
            self._model, self._rates = pl_module, None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path is not None and not self._loaded:
            raise ValueError(
                "the checkpoint has no state of a StochasticDepthCallback: it was saved without "
                "this callback, so its rates are not known; load its weights instead of resuming"
            )
        # Before the loader is iterated for the first time, which draws what the next epoch did.
        if self._loaded:
            states = self._loaded["state"]
            if len(states) != trainer.world_size:
                raise ValueError(
                    f"the checkpoint is that of a run with {len(states)} processes, and there are "
                    f"{trainer.world_size} now: their RNG states cannot be restored"
                )
            mine = states[trainer.global_rank]
            load_state_dict(pl_module, tree_map_only(torch.Tensor, torch.Tensor.cpu, mine))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._rates is None:
            steps = trainer.estimated_stepping_batches
            all_steps = None if steps == float("inf") else int(steps)
            self._rates = rate_schedule(pl_module, self.rate_schedule, self.steps, all_steps)
        self._optimizer_steps = trainer.global_step
        if self._loaded:
            self._rates.load_state_dict(self._loaded["schedule"])
            self._loaded = {}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._rates is None or trainer.global_step == self._optimizer_steps:
            return  # gradients are accumulated
        self._optimizer_steps = trainer.global_step
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(metrics(self._rates), trainer.global_step)
        self._rates.step()

    def state_dict(self) -> dict[str, Any]:
        if self._model is None or self._rates is None:
            return self._loaded
        return {
            "schedule": self._rates.state_dict(),
            "state": _of_all_ranks(state_dict(self._model)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The ``state`` of each rank; Lightning saves checkpoints on all of them together."""
    if not is_distributed():
        return [state]
    states: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
