"""Projections: what maps a block's input to the shape of its output when the block is dropped."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..find.state import untouched
from .force import plain

__all__ = ["Recipe", "check_recipe", "check_shapes", "guess_input_shape", "make_projection"]

Recipe = Literal["tied", "copy", "new"]
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PROBE_SIZE = 64  # a spatial size that most strides divide


def check_recipe(recipe: str) -> Recipe:
    """``recipe``, if it is one of the recipes."""
    if recipe not in get_args(Recipe):
        raise ValueError(
            f"projection must be one of {get_args(Recipe)}, a module or None, got {recipe!r}"
        )
    return recipe  # type: ignore[return-value]


def guess_input_shape(module: nn.Module) -> torch.Size | None:
    """An input shape that ``module`` accepts, going by its first layer; None if there is none."""
    layer = next((m for m in module.modules() if isinstance(m, _LAYERS)), None)
    if layer is None:
        return None
    if isinstance(layer, nn.Linear):
        shape = torch.Size((2, layer.in_features))
    else:
        shape = torch.Size((2, layer.in_channels, *[_PROBE_SIZE] * len(layer.kernel_size)))
    try:
        _run_on_meta(module, shape)
    except Exception:  # any failure of a guess means the same: wait for a real batch
        return None
    return shape


def check_shapes(module: nn.Module) -> None:
    """Raise where a dropped ``module``, without a projection, would leave another shape.

    Said when the layer is built, where shapes can be inferred, and not by whichever call is
    dropped first.

    Raises:
        ValueError: the module changes the shape of its input.
    """
    shape = guess_input_shape(module)
    if shape is None:
        return
    output, _ = _run_on_meta(module, shape)
    if output != shape:
        raise ValueError(
            f"the module maps an input of shape {tuple(shape)} to {tuple(output)}, so a dropped "
            "call would leave another shape than a kept one; give projection='new', 'copy' or "
            "'tied', or a module that maps the input to the output's shape"
        )


def make_projection(module: nn.Module, recipe: Recipe, shape: torch.Size) -> nn.Module:
    """The projection of ``recipe`` for ``module`` on inputs of ``shape``.

    Raises:
        ValueError: no projection of this kind maps the input to the output's shape.
    """
    try:
        output, layers = _run_on_meta(module, shape)
    except Exception as error:
        raise ValueError(
            f"projection={recipe!r} needs the module's output shape, but a dry run on an input "
            f"of shape {tuple(shape)} failed ({error}); give a projection module"
        ) from error
    if recipe == "new":
        return _new_projection(module, [layer for layer, _, _ in layers], shape, output)
    for layer, layer_input, layer_output in layers:
        if layer_input == shape and layer_output == output:
            return layer if recipe == "tied" else copy.deepcopy(layer)
    raise ValueError(
        f"projection={recipe!r}: no linear or convolution layer inside the module maps "
        f"{tuple(shape)} to {tuple(output)}; use projection='new' or give a module"
    )


def _new_projection(
    module: nn.Module, layers: list[nn.Module], shape: torch.Size, output: torch.Size
) -> nn.Module:
    if not layers:
        raise ValueError(
            f"projection='new': {type(module).__name__} runs no linear or convolution layer to "
            "take the kind from; give a projection module"
        )
    like = next(module.parameters())
    factory: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    layer = layers[0]
    if isinstance(layer, nn.Linear):
        if shape[:-1] == output[:-1]:
            return nn.Linear(shape[-1], output[-1], **factory)
    elif len(shape) == len(output) and shape[0] == output[0]:
        strides = tuple(-(-a // b) for a, b in zip(shape[2:], output[2:], strict=True) if b)
        sizes = tuple(-(-a // s) for a, s in zip(shape[2:], strides, strict=False))
        if sizes == tuple(output[2:]):
            make: Callable[..., nn.Module] = next(c for c in _LAYERS[1:] if isinstance(layer, c))
            return make(shape[1], output[1], kernel_size=1, stride=strides, **factory)
    raise ValueError(
        f"projection='new': no {type(layer).__name__} with strides maps {tuple(shape)} to "
        f"{tuple(output)}; give a projection module"
    )


def _run_on_meta(
    module: nn.Module, shape: torch.Size
) -> tuple[torch.Size, list[tuple[nn.Module, torch.Size, torch.Size]]]:
    """The output's shape, and each layer with its input's and output's in order of execution.

    Runs on meta copies of parameters and buffers: nothing is computed and no state changes.
    """
    layers: list[tuple[nn.Module, torch.Size, torch.Size]] = []

    def record(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layers.append((layer, args[0].shape, output.shape))

    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    dtype = next((p.dtype for p in module.parameters()), None)
    with ExitStack() as hooks, torch.no_grad(), untouched(module), plain():
        for m in module.modules():
            if isinstance(m, _LAYERS):
                hooks.enter_context(m.register_forward_hook(record))
        meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
        output = functional_call(module, meta, torch.empty(shape, dtype=dtype, device="meta"))
    return output.shape, layers
