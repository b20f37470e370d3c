"""What was removed from a model, kept with it as plain data."""

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Pruned", "pruned"]

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
