"""What modules keep of the samples from call to call: a memory, a neuron's potential."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .flow import Flow
from .meet import plainly
from .regions import Region
from .state import attributes, copied, in_mode, untouched
from .tensors import memory_of, tensors_in, tensors_within
from .unwritten import unwritten

__all__ = ["held_in", "remembering"]


def held_in(flow: Flow, region: Region) -> set[int]:
    """What modules of a branch keep from call to call."""
    spans = [(flow.calls[c].start, flow.calls[c].end) for c in region.calls]
    return {n for n in flow.held if any(start <= n < end for start, end in spans)}


class _Asking(TorchFunctionMode):
    """Sees which tensors are read, of some that modules keep."""

    def __init__(self, kept: dict[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self.kept, self.read = kept, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tensors_in((args, kwargs or {}), []):
            if (known := self.kept.get(memory_of(t))) is not None:
                self.read.add(known[0])
        return func(*args, **(kwargs or {}))


def remembering(
    model: nn.Module, args: Any, kwargs: Any, flow: Flow, regions: list[Region]
) -> set[str]:
    """The modules of branches that read in a call what they keep of the one before."""
    names = {flow.held[n] for region in regions for n in held_in(flow, region)}
    if not names:
        return set()
    with untouched(model), in_mode(model, False), unwritten(model), plainly():
        given, named = copied((args, kwargs))
        model(*given, **named)
        kept = {
            memory_of(t): (name, t)
            for name in names
            for t in tensors_within(attributes(model.get_submodule(name)), 2)
        }
        given, named = copied((args, kwargs))
        asking = _Asking(kept)
        with asking:
            model(*given, **named)
    return asking.read
