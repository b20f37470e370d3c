"""What was removed from a model, kept with it as plain data."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..branch import Branch, is_below
from ..find import WHOLE
from .surgery import Cuts, Undo

__all__ = ["Pruned", "keep_record", "pruned"]

KEY = "_stochastic_depth_pruned"
CONFIG_KEY = "pruned_branches"


@dataclass(frozen=True)
class Pruned:
    """What :func:`stochastic_depth.prune` took out of a model.

    Attributes:
        removed: the original names of the blocks and branches.
            ``sd.prune(fresh, remove=pruned.removed)`` does the same to another such model, before
            the pruned weights are loaded.
        names: the name that each remaining parameter and buffer has now, by its original name.
    """

    removed: tuple[str, ...]
    names: dict[str, str]


def pruned(model: nn.Module) -> Pruned | None:
    """What was pruned from a model, or None.

    Copies and pickles of the model keep it. If you save a ``state_dict``, save ``removed``, a tuple
    of strings, beside it.

    Args:
        model: a model.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = sd.prune(torchvision.models.resnet18(), remove="layer1.0")
        >>> sd.pruned(model).removed
        ('layer1.0',)
        >>> sd.pruned(model).names["layer1.1.conv1.weight"]
        'layer1.0.conv1.weight'
    """
    data: Any = vars(model).get(KEY)
    return None if data is None else Pruned(tuple(data["removed"]), dict(data["names"]))


def keep_record(
    model: nn.Module, chosen: list[Branch], gone: list[str], cuts: Cuts, undo: Undo
) -> None:
    """Add what was taken out to what is known of the model: branches, and all the old names."""
    before = pruned(model)
    steps: list[Any] = list(vars(model).get(KEY, {}).get("steps", ()))
    removed = [b.name.removesuffix(f":{WHOLE}") for b in chosen]
    for step in reversed(steps):
        removed = [_old_name(name, Cuts(step)) for name in removed]
    names = {name: name for name in _all_names(model, cuts)} if before is None else before.names
    kept = {
        first: cuts.name(now)
        for first, now in names.items()
        if not any(is_below(now, name) for name in gone)
    }
    undo.keep(vars(model))[KEY] = {
        "removed": [*(before.removed if before else ()), *removed],
        "names": kept,
        "steps": [*steps, cuts.keys],
    }


def _old_name(name: str, cuts: Cuts) -> str:
    block, colon, label = name.partition(":")
    return cuts.old_name(block) + colon + label


def _all_names(model: nn.Module, cuts: Cuts) -> list[str]:
    """The old names of what is left."""
    named = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return [cuts.old_name(name) for values in named for name, _ in values]
