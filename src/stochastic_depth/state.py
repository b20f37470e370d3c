"""The state of stochastic depth, to be kept beside a model's and an optimizer's."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .applied import awaited, branches, draws_of, owners
from .branch import CHOICES, COUNTS, check_choice, check_p, choices
from .drop.ranks import rank

__all__ = ["load_own_state", "load_state_dict", "own_state", "state_dict"]


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Everything that determines what ``model`` drops next, and the counts of its branches.

    Save it beside the model's and the optimizer's state (in a process group, one per rank), and a
    resumed run continues bit for bit. It holds the RNG state of torch's default CPU generator
    and, where CUDA is in use, of the current device's, the states of the model's own generators
    (``seed``, ``ranks``), and of every branch its rates, its counts, and what may be set of it. RNG
    states of Python and NumPy are not in it.

    Args:
        model: a module, with or without stochastic depth.

    Returns:
        A dict of tensors, numbers and strings, which ``torch.load(..., weights_only=True)`` reads.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> x = torch.randn(2, 3, 16)
        >>> model = torch.nn.TransformerEncoder(layer, 2)
        >>> model = sd.apply(model, p=0.5, seed=0, example_inputs=x)
        >>> state = sd.state_dict(model)
        >>> out = model(x)
        >>> sd.load_state_dict(model, state)
        >>> torch.equal(model(x), out)
        True
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), **own_state(model)}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what :func:`state_dict` returned, into the same model or an equal one.

    Args:
        model: a module to which stochastic depth has been applied in the same way.
        state: the state; if it doesn't fit, nothing is changed. Where no branches are found before
            the first batch, that restores them all, or raises. A RateSchedule's state may be loaded
            before or after it.

    Raises:
        ValueError: the state is that of a model with other branches, or with another ``draw`` or
            ``ranks``, or of one with a ``seed`` where this one has none; or it is no such state.

    Example:
        >>> import io, torch, torchvision, stochastic_depth as sd
        >>> file = io.BytesIO()
        >>> torch.save(sd.state_dict(sd.apply(torchvision.models.resnet18(), p=0.5)), file)
        >>> resumed = sd.apply(torchvision.models.resnet18(), p=0.5)
        >>> sd.load_state_dict(resumed, torch.load(io.BytesIO(file.getvalue())))
    """
    missing = sorted({"torch", "draws", "branches"} - state.keys())
    if missing:
        raise ValueError(
            f"state has no {', '.join(map(repr, missing))}: give what sd.state_dict(model) returned"
        )
    load_own_state(model, state)
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def own_state(model: nn.Module) -> dict[str, Any]:
    """The states of the model's own generators, and the settings and counts of its branches.

    Each branch tells which generators are its own: those of what waits for its first batch are
    listed in another order afterwards.
    """
    for first_call in awaited(model):
        if first_call.saved is not None:  # which has restored nothing so far
            _, state = first_call.saved
            return {name: state[name] for name in ("draws", "branches")}
    own = branches(model)
    settings = [
        {"name": b.name, "draws": source, "p": b.p, **choices(b)}
        for b, source in zip(own, _sources_of(model), strict=True)
    ]
    counts = [{name: getattr(b, name) for name in COUNTS} for b in own]
    return {
        "draws": [draws.state() for draws in draws_of(model)],
        "branches": [a | b for a, b in zip(settings, counts, strict=True)],
    }


def load_own_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore an :func:`own_state`, if need be when the first batch has shown the branches.

    Raises:
        ValueError: it is that of a model with other branches or draws; nothing is changed.
    """
    sources, own, waiting = draws_of(model), branches(model), list(awaited(model))
    names, saved = [b.name for b in own], [values["name"] for values in state["branches"]]
    if names != saved and waiting and not own:
        for first_call in waiting:
            first_call.saved = model, state
        return
    order = None if names != saved else _order(model, state)
    if order is None:
        raise ValueError(
            f"the state is that of a model with the branches {saved}, and this one has {names}: "
            "apply stochastic depth as it was when the state was saved"
            + (_WAITING if waiting else "")
        )
    states = [state["draws"][order[i]] for i in range(len(sources))]
    for draws, values in zip(sources, states, strict=True):
        draws.check_state(values)
    for branch, values in zip(own, state["branches"], strict=True):
        for name, allowed in CHOICES.items():
            check_choice(values[name], allowed, name)
        branch.check_mode(values["mode"])
        check_p(values["target"])
        check_p(values["p"])
    for draws, values in zip(sources, states, strict=True):
        draws.set_state(values)
    for branch, values in zip(own, state["branches"], strict=True):
        branch.p = values["target"]
        branch.set_rate(values["p"])
        for name in (*CHOICES, *COUNTS):
            setattr(branch, name, values[name])
    for first_call in waiting:
        first_call.saved = None
    _tell_rank(state)


def _tell_rank(state: Mapping[str, Any]) -> None:
    """Warn where another rank's numbers are restored: they would be those of several."""
    saved = next((values["rank"] for values in state["draws"] if "rank" in values), rank())
    if saved != rank() and ("torch" in state or any("separate" in x for x in state["draws"])):
        warnings.warn(
            f"stochastic depth: the state is that of rank {saved}, and this is rank {rank()}: if "
            "torch's own numbers are in it, they are the same on both now, and what a rank decides "
            "for itself is not what it would in an uninterrupted run; save and load one state for "
            "each rank",
            stacklevel=4,
        )


def _sources_of(model: nn.Module) -> list[int]:
    """By branch, which of the model's draws are its own."""
    sources, own = draws_of(model), owners(model)
    return [sources.index(own[branch].draws) for branch in branches(model)]


def _order(model: nn.Module, state: Mapping[str, Any]) -> dict[int, int] | None:
    """By the number of each of the model's draws, which of those in the state they are, if any."""
    count = len(draws_of(model))
    order: dict[int, int] = {}
    for source, values in zip(_sources_of(model), state["branches"], strict=True):
        saved = values.get("draws", source)  # not in states of before
        if order.setdefault(source, saved) != saved:
            return None
    others = [i for i in range(len(state["draws"])) if i not in order.values()]
    idle = [i for i in range(count) if i not in order]  # they have no branches, or none yet
    order |= dict(zip(idle, others, strict=False))
    fits = len(state["draws"]) == count == len(set(order.values()))
    return order if fits else None


_WAITING = (
    ", with example_inputs, as the first batch may change these; where parts of the model are "
    "called by themselves, load it when each has had a call in training"
)
