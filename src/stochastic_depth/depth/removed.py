"""What stands where a branch was removed from a block that stays."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import tensor_leaves, tree_map
from ..branch import Branch
from ..drop.forms import output_form
from ..drop.part import first_part, form
from ..drop.run import Run
from ..find.plan import Gate

__all__ = ["Removed"]


class Removed(nn.Module):
    """A module of a branch that is gone: what is computed of its result is nothing, up to the sum.

    It has no parameters and computes nothing. The sum of the block hands on its shortcut, to the
    bit and of the dtype that the whole block would give. Where the block asks for the shape of
    what is not there, a copy of the module without values answers.

    Args:
        module: what stood here.
        branch: the branch.
        gate: what the module returned.
        last: the sum follows.
        dtype: of the sum, where that is not its shortcut's.
    """

    takes_parts = True

    def __init__(
        self, module: nn.Module, branch: Branch, gate: Gate, last: bool, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.branch, self.dtype = branch, dtype
        self.gate = Gate(0, last, returned=gate.returned, structure=gate.structure)
        self.training = module.training
        self._like = [_without_values(module)]  # in a list it is no child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        part = first_part((*args, *kwargs.values()))
        if part is not None:
            device = part._run.device
        else:
            tensors = tensor_leaves((args, kwargs))
            device = tensors[0].device if tensors else torch.device("cpu")
        # Its sums are counted, not looked for in the source, which another version may move.
        run = Run(self.branch, True, 1.0, device, self, self.dtype, compiling=True)

        def make() -> Any:
            return output_form(self._like[0], *tree_map(form, (args, kwargs)))

        return run.call(self.gate, _no_call, args, kwargs, part is not None, make)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_like":
                raise
            return getattr(self._like[0], name)  # what a block asks of its modules: a dtype, a key

    def modules_of(self, branch: Branch) -> list[nn.Module]:
        return []

    def parameters_of(self, branch: Branch) -> list[Tensor]:
        return []

    def extra_repr(self) -> str:
        return self.branch.name


def _without_values(module: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    values: dict[int, Any] = {}
    for m in module.modules():
        for parameter in m._parameters.values():
            if parameter is not None:
                values[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for buffer in m._buffers.values():
            if buffer is not None:
                values[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, values)


def _no_call(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a removed branch is never called")
