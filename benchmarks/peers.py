"""What people use today, as it is published, put on the same branches at the same rates as ours.

Each peer takes a plain model and the rate of every branch (of our naming), and changes the model.
"""

from collections.abc import Callable, Sequence

import timm.layers
import torch
import torchvision.ops
from torch import Tensor, nn

import stochastic_depth as sd

Rates = dict[str, float]


def rates_of(model: nn.Module) -> Rates:
    """The last layer of each branch of an applied model, and the branch's rate."""
    return {branch.modules[-1]: branch.p for branch in sd.branches(model)}


def _hook_layers(model: nn.Module, rates: Rates, make: Callable[[float], nn.Module]) -> None:
    for name, p in rates.items():
        model.get_submodule(name).register_forward_hook(_masked_by(make(p)))


def _masked_by(mask: nn.Module) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda _module, _inputs, output: mask(output)


def torchvision_batch(model: nn.Module, rates: Rates) -> None:
    """torchvision.ops.StochasticDepth(p, "batch") behind every branch: computed, then masked."""
    _hook_layers(model, rates, lambda p: torchvision.ops.StochasticDepth(p, "batch"))


def timm_rows(model: nn.Module, rates: Rates) -> None:
    """timm's DropPath behind every branch: computed, then masked row by row."""
    _hook_layers(model, rates, timm.layers.DropPath)


def dinov2_rows(model: nn.Module, rates: Rates) -> None:
    """DINOv2's drop_add_residual_stochastic_depth in every block with two branches of tokens."""
    for block, p in _token_blocks(model, rates):

        def forward(
            x: Tensor, branches: Sequence = block.residual_branches(), p: float = p
        ) -> Tensor:
            for branch in branches:
                x = _dinov2_add(x, branch, p)
            return x

        block.forward = forward


def _dinov2_add(x: Tensor, branch: Callable[[Tensor], Tensor], p: float) -> Tensor:
    rows = max(int(len(x) * (1 - p)), 1)
    chosen = torch.randperm(len(x), device=x.device)[:rows]
    output = branch(x[chosen])
    added = torch.index_add(
        x.flatten(1), 0, chosen, output.flatten(1).to(dtype=x.dtype), alpha=len(x) / rows
    )
    return added.view_as(x)


def torchtune_rows(model: nn.Module, rates: Rates) -> None:
    """torchtune's LayerDropout around every block with two branches of tokens."""
    for block, p in _token_blocks(model, rates):

        def forward(x: Tensor, whole: Callable = block.forward, p: float = p) -> Tensor:
            keep = (torch.rand(len(x)) >= p).nonzero().squeeze(1).to(x.device)
            out = x.clone()
            if keep.numel() > 0:
                out[keep] = whole(torch.index_select(x, 0, keep))
            return out

        block.forward = forward


def _token_blocks(model: nn.Module, rates: Rates) -> list[tuple[nn.Module, float]]:
    """The blocks that can list their residual branches, with their rate."""
    blocks = [(n, m) for n, m in model.named_modules() if hasattr(m, "residual_branches")]
    return [
        (block, next(p for layer, p in rates.items() if layer.startswith(f"{name}.")))
        for name, block in blocks
    ]


PEERS: dict[str, Callable[[nn.Module, Rates], None]] = {
    "torchvision": torchvision_batch,
    "timm": timm_rows,
    "torchtune": torchtune_rows,
    "DINOv2": dinov2_rows,
}
ON_TOKENS = {"torchtune", "DINOv2"}
