"""What stands in the slots of modules that are no blocks with branches."""

from typing import Any

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from .._torch import outside_graphs
from .slot import Slot, here, outer_slot

__all__ = ["PassOn", "Unfused", "may_be_fused"]


class PassOn:
    """Stands in the slot of a DropPath whose branch we decide on: it hands on what it is given."""

    is_root = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def is_active(self) -> bool:
        return self.module.training and here.forced != {}

    def run(self, slot: Slot, args: Any, kwargs: Any) -> Any:
        return next(iter((*args, *kwargs.values())))

    def of_replica(self, replica: nn.Module) -> "PassOn":
        return PassOn(replica)


def may_be_fused(module: nn.Module) -> bool:
    """Whether torch may compute an encoder or its layer in a kernel, which calls no child."""
    if module.training:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))


class Unfused:
    """Stands in the slot of an ``nn.TransformerEncoder`` whose layers weigh their branches.

    Given a padding mask in evaluation, it would give them nested tensors, for torch's fused kernel.
    """

    is_root = False

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder

    def is_active(self) -> bool:
        if not may_be_fused(self.encoder):
            return False
        slots = [outer_slot(layer) for layer in self.encoder.layers]
        return any([s is not None and s.site is not None and s.site.is_active() for s in slots])

    @outside_graphs  # in which no mode keeps that kernel out
    def run(self, slot: Slot, args: Any, kwargs: Any) -> Any:
        with BaseTorchFunctionMode():
            return slot.through(*args, **kwargs)

    def of_replica(self, replica: nn.TransformerEncoder) -> "Unfused":
        return Unfused(replica)
