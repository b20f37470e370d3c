"""The state of stochastic depth, to be kept beside a model's and an optimizer's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .resume import load_own_state, own_state

__all__ = ["load_state_dict", "state_dict"]


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
