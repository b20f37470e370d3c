"""The callback of the experiments with transformers' Trainer."""

from stochastic_depth.integrations.transformers import StochasticDepthCallback


def callback(schedule: str | None, steps: int) -> StochasticDepthCallback:
    """The rates stay, or follow ``schedule`` over all of training."""
    return StochasticDepthCallback(schedule, steps) if schedule else StochasticDepthCallback()
