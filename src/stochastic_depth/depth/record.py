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
        removed: the names of the blocks and branches, as they were in the model at first.
            ``sd.prune(fresh, remove=pruned.removed)`` does the same to another such model, before
            the pruned weights are loaded.
        names: of each parameter and buffer that is left, by its name at first its name now.
    """

    removed: tuple[str, ...]
    names: dict[str, str]


def pruned(model: nn.Module) -> Pruned | None:
    """What was pruned from a model, or None.

    It stays with the model in copies and pickles; beside a ``state_dict`` save ``removed``, which
    is a tuple of strings.

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
