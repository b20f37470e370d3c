"""``residual``: the function, for people who write their own forward."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..branch import Branch, Mode, Place, Scale, check_p
from ..find.plan import Gate, Leaf
from .collectives import waiting_in
from .decide import is_left_out, kept_weight
from .draws import Draws
from .part import Part
from .ranks import is_distributed
from .run import Run

__all__ = ["residual"]


class _Owner:
    """What a run asks about a function: the module that it is, if it is one."""

    def __init__(self, f: Any) -> None:
        self.f = f

    def modules_of(self, branch: Branch) -> list[nn.Module]:
        return [self.f] if isinstance(self.f, nn.Module) else []

    def parameters_of(self, branch: Branch) -> list[Tensor]:
        return []


_default = Draws()
_of_generators: WeakKeyDictionary[torch.Generator, Draws] = WeakKeyDictionary()


def residual(
    shortcut: Tensor,
    branch: Callable[..., Tensor],
    *inputs: Tensor,
    p: float,
    training: bool = True,
    mode: Mode = "batch",
    scale: Scale = "train",
    generator: torch.Generator | None = None,
    batch_dim: int = 0,
) -> Tensor:
    """``shortcut + branch(*inputs)``, dropping the branch with probability ``p`` in training.

    A dropped branch is not called; in the modes that choose samples, ``"row"`` and ``"subset"``,
    it is called with the kept samples only. (If only one is kept, a second runs with it through a
    branch that is a module with BatchNorm in it, whose statistics need more than one.)

    Args:
        shortcut: the tensor that is always kept; it has the shape of the sum.
        branch: called with ``inputs``, or with the shortcut where there are none.
        inputs: the branch's inputs. In the modes that choose samples, each has them in
            ``batch_dim``, as many as the shortcut; let the branch close over whatever all samples
            share.
        p: probability to drop, in [0, 1].
        training: False computes the whole sum (a module passes ``self.training``).
        mode: ``"batch"`` makes one decision for the call, ``"row"`` one for each sample, and
            ``"subset"`` keeps a fixed number k of the B samples, the nearest to B (1-p).
        scale: ``"train"`` divides a kept branch by 1-p, so that evaluation needs no change;
            ``"eval"`` multiplies the branch by 1-p in evaluation instead, as the paper does;
            ``"none"`` does neither.
        generator: where decisions are drawn from; None is torch's default CPU generator.
        batch_dim: the dimension of the samples, not negative.

    Returns:
        A new tensor of the shortcut's shape.

    Raises:
        RuntimeError: the shortcut is a value of a branch of :func:`stochastic_depth.apply`; a
            module that waits for the other ranks is dropped by each of them for itself.
        TypeError: ``p`` is not a number.
        ValueError: ``p`` is outside [0, 1]; unknown ``mode`` or ``scale``; the branch's output
            does not have the shortcut's shape; where samples are chosen, a shortcut without a
            dimension for them or an input with another number of them.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> mlp, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        >>> sd.residual(x, mlp, p=0.1).shape
        torch.Size([4, 8])
        >>> torch.equal(sd.residual(x, mlp, p=1.0), x)
        True

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382), eq. 2
        and 5; the division by 1-p in training is Srivastava et al.'s inverted dropout.
    """
    rate, place = check_p(p), Place(batch_dim)
    about = Branch("residual()", "identity", (), place=place, mode=mode, scale=scale, target=rate)
    given: Any = shortcut
    if type(given) is Part:
        raise given._run.error("goes on into residual(): call that in a module of the branch's")
    inputs = inputs or (shortcut,)
    if mode != "batch":
        _check_samples(shortcut, inputs, mode, batch_dim)
    if not training or rate == 0.0:
        decision: Any = is_left_out(about)
    elif rate == 1.0:
        decision = True
    elif torch.compiler.is_compiling():
        _draws(generator).check_graph(about, _Owner(branch).modules_of(about))
        decision = None
    else:
        if generator is None and is_distributed():
            _check_ranks(branch)
        decision = _draws(generator).decide([about], _NO_BLOCK)[0]
    weight = 1.0 if decision is None else kept_weight(about, training)
    run = Run(about, decision, weight, shortcut.device, _Owner(branch))
    leaf = (Leaf("branch", 0, place),)
    gate = Gate(0, last=True, given=(place,) * len(inputs), returned=leaf)
    output = run.beside(shortcut, lambda: run.call(gate, branch, inputs, {}, False, lambda: None))
    if type(output) is Part:
        return run.merge(shortcut, output)
    run.check_shape(shortcut, output)
    total: Tensor = shortcut + output
    return total


_NO_BLOCK = nn.Module()


def _draws(generator: torch.Generator | None) -> Draws:
    if generator is None:
        return _default
    if generator not in _of_generators:
        _of_generators[generator] = Draws.from_generator(generator)
    return _of_generators[generator]


def _check_ranks(branch: Callable[..., Tensor]) -> None:
    """Raise where some ranks would run a module that waits for the others, and some would not."""
    waiting = waiting_in(branch.modules()) if isinstance(branch, nn.Module) else ""
    if waiting:
        raise RuntimeError(
            f"residual() runs a {waiting}, which waits for the other ranks, and by torch's default "
            "generator some would run it and others not, or on other samples; give all ranks a "
            "generator= of the same seed"
        )


def _check_samples(shortcut: Tensor, inputs: tuple[Tensor, ...], mode: str, dim: int) -> None:
    if not 0 <= dim < shortcut.dim():
        raise ValueError(
            f"mode={mode!r} needs samples in dimension {dim} (batch_dim), got a shortcut of shape "
            f"{tuple(shortcut.shape)}; use mode='batch'"
        )
    for i, x in enumerate(inputs):
        if x.dim() <= dim or x.shape[dim] != shortcut.shape[dim]:
            raise ValueError(
                f"inputs[{i}] has shape {tuple(x.shape)}, but mode={mode!r} needs "
                f"{shortcut.shape[dim]} samples in dimension {dim} as in the shortcut; let the "
                "branch close over what all samples share"
            )
