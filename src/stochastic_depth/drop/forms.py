"""What a call that is not made would return: asked for only where user code asks for a shape."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._torch import tree_map_only

__all__ = ["output_form"]


def output_form(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The result of a call, on the meta device.

    Layers of torch run on the meta device. Anything else may keep what it computes (a mask in a
    cache, say), so it runs for real, once for each size, without gradients; random numbers and
    buffers stay as they are.

    Args:
        module: what is called.
        args: what it is given; absent values are on the meta device.
        kwargs: the same.
    """
    with torch.no_grad():
        if type(module).__module__.startswith("torch.nn.modules") and not any(module.children()):
            tensors = dict([*module.named_parameters(), *module.named_buffers()])
            meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            return functional_call(module, meta, args, kwargs)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        args, kwargs = tree_map_only(
            Tensor,
            lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x,
            (args, kwargs),
        )
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            out = module.forward(*args, **kwargs)
        for buffer, before in buffers:
            buffer.copy_(before)
    return tree_map_only(Tensor, lambda x: x.to("meta"), out)
