"""What the parameters of a dropped branch get: no gradient, or zeros where somebody waits for one.

That is the optimizer, if asked for, and in a process group the other ranks, which may have kept
the branch: DistributedDataParallel waits for every parameter, and zeros from a rank that dropped
make the average the unbiased gradient. (An undefined gradient is enough for it, but not with
``static_graph=True``, where it leaves this rank without the average.)

What a dropped branch would have been given gets zeros, too: it may come from a module that only
branches read (a norm before two parallel ones, the encoder before cross-attention), which gets a
gradient from the ranks that kept one of them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..branch import Branch
from .ranks import is_distributed

__all__ = ["are_waited_for", "left_out"]


def are_waited_for(branch: Branch) -> bool:
    """Whether gradients of a branch have to come where it is dropped, too."""
    return branch.dropped_grad == "zero" or is_distributed()


def left_out(
    shortcut: Tensor, parameters: Iterable[Tensor], given: Iterable[Tensor], in_place: bool
) -> Tensor:
    """The sum of a branch that is dropped.

    Its ``parameters``, and what its calls would have been ``given``, get gradients of zero. It is
    ``shortcut`` itself where the branch would have been added into that. Otherwise it is a copy,
    since what comes next may work in place, which must not reach the shortcut.
    """
    if torch.is_grad_enabled():
        wanted = [p for p in parameters if p.requires_grad]
        # Of each nothing, so that it is not kept for the backward pass.
        others = [x for x in given if not (x is shortcut or x.is_nested)]
        wanted += [x.unsqueeze(0).narrow(0, 0, 0).clone() for x in others]
        kind = _Unused if torch.compiler.is_compiling() else _UnusedWithTangents
        if wanted and in_place:  # other views of the shortcut see what happens to it
            nothing: Tensor = kind.apply(shortcut.new_zeros(()), *wanted)  # type: ignore[no-untyped-call]
            return shortcut.sub_(nothing)  # a sum would turn a negative zero into a positive one
        if wanted:
            return kind.apply(shortcut, *wanted)  # type: ignore[no-untyped-call,no-any-return]
    return shortcut if in_place else shortcut.clone()


class _Unused(torch.autograd.Function):
    """Copy ``x``, with zero gradients for parameters that were not used."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.parameters = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(p) for p in ctx.parameters)


class _UnusedWithTangents(_Unused):
    """The same for forward-mode AD, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *unused: Tensor) -> Tensor:
        return tangent.clone()
