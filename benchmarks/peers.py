"""What people use today, as it is published, put on the same branches as ours."""

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import stochastic_depth as sd


def mask_last_layers(model: nn.Module, rates: dict[str, float], mode: str) -> nn.Module:
    """torchvision's own layer, hooked behind the last layer of every branch.

    Args:
        model: a plain model.
        rates: the drop probability of each branch's last layer, by its name.
        mode: torchvision's ``"batch"`` or ``"row"``.
    """

    def hook(layer: StochasticDepth) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda _module, _inputs, output: layer(output)

    for name, p in rates.items():
        model.get_submodule(name).register_forward_hook(hook(StochasticDepth(p, mode)))
    return model


def last_layers(model: nn.Module) -> dict[str, float]:
    """The name of each branch's last layer and its rate, of an applied model."""
    return {branch.modules[-1]: branch.p for branch in sd.branches(model)}
