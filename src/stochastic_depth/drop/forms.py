"""What a call that is not made would return: asked for only where user code asks for a shape."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._torch import tree_map_only
from ..find.meet import without_gradients
from ..find.state import untouched

__all__ = ["output_form"]


def output_form(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The result of a call, on the meta device, where nothing is computed.

    Absent values that it is given are there, too. What the module keeps (masks in a cache, say) is
    put back afterwards. A module that does not run there runs for real, once for each size.
    """
    with untouched(module), without_gradients():
        try:
            return _on_meta(module, args, kwargs)
        except Exception:  # of any kind: it looks at values, or holds some that are elsewhere
            return _for_real(module, args, kwargs)


def _on_meta(module: nn.Module, args: Any, kwargs: Any) -> Any:
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    return functional_call(module, meta, args, kwargs)


def _for_real(module: nn.Module, args: Any, kwargs: Any) -> Any:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    args, kwargs = tree_map_only(
        Tensor,
        lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x,
        (args, kwargs),
    )
    return tree_map_only(Tensor, lambda x: x.to("meta"), module.forward(*args, **kwargs))
