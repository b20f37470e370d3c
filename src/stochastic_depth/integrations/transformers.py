"""Stochastic depth under transformers' Trainer: one callback."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .._torch import tree_map_only
from ..applied import branches
from ..rates import RateSchedule, TimeSchedule
from ..state import draws_of
from .common import ensure_applied, metrics, rate_schedule

__all__ = ["StochasticDepthCallback"]

_NAME = "StochasticDepthCallback"


class StochasticDepthCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Apply stochastic depth, drive its rates, log them, and resume bit for bit.

    It adds ``stochastic_depth/factor``, ``expected_depth``, ``decided`` and ``dropped`` (see
    :meth:`stochastic_depth.RateSchedule.metrics`) to the Trainer's log history, and to what the
    callbacks after it in the Trainer's list are given to log. ``trainer_state.json`` in each
    checkpoint holds the rates and the counts, and with ``seed`` the state of the model's own
    generator; the Trainer itself saves torch's default one, for each process.

    Args:
        rate_schedule: the course of the rates over training, as in
            :class:`stochastic_depth.RateSchedule`. None leaves them as they are.
        steps: how many optimizer steps it takes; None is all of the training.
        options: of :func:`stochastic_depth.apply`, which is called when the Trainer is made (with
            ``model_init`` when training begins), unless the model has stochastic depth already.

    Raises:
        ValueError: options for a model that has stochastic depth already; a checkpoint without a
            state of this callback; ``restore_callback_states_from_checkpoint``, which makes new
            callbacks, while this one restores itself.

    Example:
        >>> from stochastic_depth.integrations.transformers import StochasticDepthCallback
        >>> callback = StochasticDepthCallback("linear", steps=1000, p=0.2)
        >>> # trainer = Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def __init__(
        self, rate_schedule: TimeSchedule | None = None, steps: int | None = None, **options: Any
    ) -> None:
        self.rate_schedule = rate_schedule
        self.steps = steps
        self.options = options
        self._model: Any = None
        self._rates: RateSchedule | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs.get("model") is not None:
            self._apply(kwargs["model"])

    def _apply(self, model: Any) -> None:
        if model is not self._model:
            ensure_applied(model, self.options)
            self._model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "restore_callback_states_from_checkpoint=True makes new callbacks without their "
                "arguments; set it to False: StochasticDepthCallback restores itself"
            )
        self._apply(kwargs["model"])
        self._rates = rate_schedule(self._model, self.rate_schedule, self.steps, state.max_steps)
        if state.global_step > 0:
            self._restore(state.stateful_callbacks.get(_NAME))

    def _restore(self, saved: Any) -> None:
        if not isinstance(saved, dict) or not saved["attributes"] or self._rates is None:
            raise ValueError(
                "the checkpoint has no state of (one) StochasticDepthCallback in its "
                "trainer_state.json: it was saved without this callback; load its weights instead "
                "of resuming"
            )
        state = saved["attributes"]
        own = branches(self._model)
        if len(own) != len(state["branches"]):
            raise ValueError(
                f"the checkpoint is of a model with {len(state['branches'])} branches, and this "
                f"one has {len(own)}: apply stochastic depth as it was"
            )
        for branch, (target, decided, dropped) in zip(own, state["branches"], strict=True):
            branch.p, branch.decided, branch.dropped = target, decided, dropped
        self._rates.load_state_dict(state["schedule"])
        # The Trainer restores torch's generators itself.
        for draws, generators in zip(draws_of(self._model), state["draws"], strict=True):
            draws.set_state(generators)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._rates is not None:
            self._rates.step()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs and self._rates is not None:
            found = metrics(self._rates)
            logs.update(found)
            state.log_history[-1].update(found)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``."""
        attributes = {}
        if self._rates is not None:
            attributes = {
                "schedule": self._rates.state_dict(),
                "branches": [(b.target, b.decided, b.dropped) for b in branches(self._model)],
                "draws": tree_map_only(
                    Tensor, Tensor.tolist, [draws.state() for draws in draws_of(self._model)]
                ),
            }
        return {"args": {}, "attributes": attributes}
