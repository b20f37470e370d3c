"""Stochastic depth under transformers' Trainer: one callback."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .._torch import tree_map_only
from ..rates import RateSchedule, TimeSchedule
from ..state import load_own_state, own_state
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
        if not any(module is self._model for module in model.modules()):  # FSDP1 wraps it
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
        load_own_state(self._model, state)  # the Trainer restores torch's generators itself
        self._rates.load_state_dict(state["schedule"])

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
                **tree_map_only(Tensor, Tensor.tolist, own_state(self._model)),
            }
        return {"args": {}, "attributes": attributes}
