"""Stochastic depth under Lightning: one callback."""

from typing import Any

import lightning as L
import torch
from torch.utils._pytree import tree_map_only

from ..coins import is_distributed
from ..rate_schedule import RateSchedule
from ..resume import random_state, set_random_state
from ..schedules import Course
from .common import ensure_applied, metrics, schedule

__all__ = ["StochasticDepthCallback"]


class StochasticDepthCallback(L.Callback):
    """Apply stochastic depth, drive its rates, log them, and resume to the bit.

    It logs ``stochastic_depth/factor``, ``expected_depth``, ``decided`` and ``dropped`` (see
    :meth:`stochastic_depth.RateSchedule.metrics`) every ``log_every_n_steps`` steps. A checkpoint
    holds the rates, the counts, and on each rank the random state that the coins come from, which
    training goes on with; Lightning itself saves none. From a checkpoint at the end of an epoch,
    training goes on as if it had not been interrupted.

    Args:
        course: of the rates over training; see :class:`stochastic_depth.RateSchedule`. None
            leaves them as they are.
        steps: how many optimizer steps it takes; None is all of the training.
        options: of :func:`stochastic_depth.apply`, which is called on the LightningModule before
            the strategy wraps it, unless it has stochastic depth already. (Modules that are made in
            ``configure_model`` are not there yet: apply to them there.)

    Raises:
        ValueError: options for a model that has stochastic depth already; a checkpoint of a run
            with another number of processes.

    Example:
        >>> import lightning as L
        >>> from stochastic_depth.integrations.lightning import StochasticDepthCallback
        >>> callback = StochasticDepthCallback("linear", steps=1000, p=0.2, mode="row")
        >>> trainer = L.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self, course: Course | None = None, steps: int | None = None, **options: Any
    ) -> None:
        self.course = course
        self.steps = steps
        self.options = options
        self._model: L.LightningModule | None = None
        self._schedule: RateSchedule | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and pl_module is not self._model:
            ensure_applied(pl_module, self.options)
            self._model, self._schedule = pl_module, None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before the loader is iterated for the first time, which draws what the next epoch did.
        if self._loaded:
            random = self._loaded["random"]
            if len(random) != trainer.world_size:
                raise ValueError(
                    f"the checkpoint is that of a run with {len(random)} processes, and there are "
                    f"{trainer.world_size} now: their random states cannot be restored"
                )
            mine = random[trainer.global_rank]
            set_random_state(pl_module, tree_map_only(torch.Tensor, torch.Tensor.cpu, mine))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._schedule is None:
            all_steps = int(trainer.estimated_stepping_batches)
            self._schedule = schedule(pl_module, self.course, self.steps, all_steps)
        self._optimizer_steps = trainer.global_step
        if self._loaded:
            self._schedule.load_state_dict(self._loaded["schedule"])
            self._loaded = {}

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._schedule is None or trainer.global_step == self._optimizer_steps:
            return  # gradients are accumulated
        self._optimizer_steps = trainer.global_step
        if trainer.loggers and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(metrics(self._schedule), trainer.global_step)
        self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        if self._model is None or self._schedule is None:
            return self._loaded
        random = _of_all_ranks(random_state(self._model))
        return {"schedule": self._schedule.state_dict(), "random": random}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _of_all_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The ``state`` of each rank; Lightning saves checkpoints on all of them together."""
    if not is_distributed():
        return [state]
    states: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states
