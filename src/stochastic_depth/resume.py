"""The random state of a training run, to be kept beside its checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .coins import Coins
from .executor import installed
from .layer import StochasticDepth
from .surgery import branches

__all__ = ["coins_of", "random_state", "set_random_state"]


def random_state(model: nn.Module) -> dict[str, Any]:
    """All that decides which coins ``model`` tosses next, and what its branches have counted.

    Save it beside the model's and the optimizer's state, in a process group one on each rank, and
    a run that is resumed goes on bit for bit. It holds the state of torch's default CPU generator
    and, where CUDA is in use, of the current device's, the states of the generators of the model's
    own (``seed``, ``coins``), and the rate and the counts of every branch. Generators of Python
    and NumPy are not in it.

    Args:
        model: a module, with or without stochastic depth.

    Returns:
        A dict of tensors, numbers and strings, which ``torch.load(..., weights_only=True)`` reads.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> model = sd.apply(torch.nn.TransformerEncoder(layer, 2), p=0.5, seed=0)
        >>> x = torch.randn(2, 3, 16)
        >>> state = sd.random_state(model)
        >>> out = model(x)
        >>> sd.set_random_state(model, state)
        >>> torch.equal(model(x), out)
        True
    """
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "coins": [coins.state() for coins in coins_of(model)],
        "branches": [
            {"name": name, "p": branch.p, "decided": branch.decided, "dropped": branch.dropped}
            for name, branch in _named_branches(model)
        ],
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Go on from what :func:`random_state` returned, for the same or an equal model.

    Args:
        model: a module to which stochastic depth is applied as it was then.
        state: the state; nothing is changed where it does not fit.

    Raises:
        ValueError: the state is that of a model with other branches.

    Example:
        >>> import io, torch, torchvision, stochastic_depth as sd
        >>> file = io.BytesIO()
        >>> torch.save(sd.random_state(sd.apply(torchvision.models.resnet18(), p=0.5)), file)
        >>> resumed = sd.apply(torchvision.models.resnet18(), p=0.5)
        >>> sd.set_random_state(resumed, torch.load(io.BytesIO(file.getvalue())))
    """
    coins, named = coins_of(model), _named_branches(model)
    saved = [branch["name"] for branch in state["branches"]]
    if saved != [name for name, _ in named] or len(state["coins"]) != len(coins):
        raise ValueError(
            f"the random state is of a model with the branches {saved}, and this one has "
            f"{[name for name, _ in named]}: apply stochastic depth as it was when the state was "
            "saved"
        )
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    for source, generators in zip(coins, state["coins"], strict=True):
        source.set_state(generators)
    for (_, branch), values in zip(named, state["branches"], strict=True):
        branch.p = values["p"]
        branch._state.decided, branch._state.dropped = values["decided"], values["dropped"]


def coins_of(model: nn.Module) -> list[Coins]:
    """Where the coins of ``model`` come from, each once."""
    found: dict[int, Coins] = {}
    for module in model.modules():
        forward = installed(module)
        if forward is not None:
            found.setdefault(id(forward.coins), forward.coins)
        if isinstance(module, StochasticDepth):
            found.setdefault(id(module._coins), module._coins)
    return list(found.values())


def _named_branches(model: nn.Module) -> list[tuple[str, Any]]:
    """The branches, by the names that they had when applied, which no wrapper has changed."""
    return [(f"{b._state.found.block}:{b._state.found.label}", b) for b in branches(model)]
