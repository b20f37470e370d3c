"""What stochastic depth itself adds to a checkpoint: its draws and its branches."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .applied import awaited, branches, draws_of
from .branch import CHOICES, COUNTS, choices

__all__ = ["load_own_state", "own_state"]


def own_state(model: nn.Module) -> dict[str, Any]:
    """The states of the model's own generators, and the settings and counts of its branches."""
    return {
        "draws": [draws.state() for draws in draws_of(model)],
        "branches": [
            {"name": b.name, "p": b.p, **choices(b), **{name: getattr(b, name) for name in COUNTS}}
            for b in branches(model)
        ],
    }


def load_own_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore an :func:`own_state`, if need be when the first batch has shown the branches.

    Raises:
        ValueError: it is that of a model with other branches or draws; nothing is changed.
    """
    sources, own, waiting = draws_of(model), branches(model), list(awaited(model))
    names, saved = [b.name for b in own], [values["name"] for values in state["branches"]]
    if names != saved and waiting and not any(first_call.given for first_call in waiting):
        for first_call in waiting:
            first_call.saved = model, state
        return
    if names != saved or len(sources) != len(state["draws"]):
        raise ValueError(
            f"the state is that of a model with the branches {saved}, and this one has {names}: "
            "apply stochastic depth as it was when the state was saved"
            + (", with example_inputs, as the first batch may change these" if waiting else "")
        )
    for draws, values in zip(sources, state["draws"], strict=True):
        draws.check_state(values)
    for branch, values in zip(own, state["branches"], strict=True):
        branch.check_mode(values["mode"])
    for draws, values in zip(sources, state["draws"], strict=True):
        draws.set_state(values)
    for branch, values in zip(own, state["branches"], strict=True):
        branch.p = values["target"]
        branch.set_rate(values["p"])
        for name in (*CHOICES, *COUNTS):
            setattr(branch, name, values[name])
