"""What a step of training comes to, and in words how two of them differ."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Outcome", "compare", "differ"]


@dataclass(frozen=True)
class Outcome:
    """Outputs, gradients and buffers by name.

    Attributes:
        outputs: the tensors that the model returned.
        gradients: of parameters and inputs, where there are any.
        buffers: after the step.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def has_nan(self) -> bool:
        return any(bool(x.isnan().any()) for x in (*self.outputs, *self.gradients.values()))


def compare(expected: Outcome, got: Outcome, exact: bool, eps: float = 0.0) -> str | None:
    """In words, where two steps differ by more than rounding, or in ``exact`` outputs at all."""
    failure = differ("the output", expected.outputs, got.outputs, exact, eps=eps)
    scale = _largest(expected.gradients)
    for name, gradient in (expected.gradients | got.gradients).items():
        zeros = torch.zeros_like(gradient)
        a, b = expected.gradients.get(name, zeros), got.gradients.get(name, zeros)
        failure = failure or differ(f"the gradient of {name}", [a], [b], False, scale, eps)
    for name, buffer in expected.buffers.items():
        if name in got.buffers:
            what = f"the buffer {name}"
            failure = failure or differ(what, [buffer], [got.buffers[name]], exact, eps=eps)
    return failure


def _largest(gradients: Mapping[str, Tensor]) -> float:
    return max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)


def differ(
    what: str,
    expected: list[Tensor],
    got: list[Tensor],
    exact: bool,
    scale: float = 0.0,
    eps: float = 0.0,
) -> str | None:
    """In words, where two lists of tensors differ by more than rounding.

    Args:
        what: what they are.
        expected: the reference.
        got: what is compared with it.
        exact: bit for bit.
        scale: a size that rounding may be relative to besides that of the tensors.
        eps: the rounding of the dtype that they are computed in, where it is not their own.
    """
    if len(expected) != len(got):
        return f"{what} has {len(got)} tensors instead of {len(expected)}"
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            return f"{what} has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a64, b64 = (
            x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64)
            for x in (a, b)
        )
        same = (a64 == b64) | (a64.isnan() & b64.isnan())
        apart = torch.where(same, 0.0, (a64 - b64).abs()).nan_to_num(nan=float("inf"))
        size = max(1.0, scale, float(a64.abs().nan_to_num(0.0, 0.0, 0.0).max()))
        own = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        if float(apart.max()) > (0.0 if exact else 1e3 * size * max(own, eps)):
            return f"{what} differs by {float(apart.max()):.2g}"
    return None
