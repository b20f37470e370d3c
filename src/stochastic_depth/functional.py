r"""The residual sum with a droppable branch.

For a shortcut :math:`s`, a branch :math:`f` and a drop probability :math:`p`, with a coin
:math:`b \sim \mathrm{Bernoulli}(1 - p)` for the call (``mode="batch"``) or for each row
(``mode="row"``; in ``"subset"`` k of the B rows are kept, and k/B takes the place of 1-p):

=========== ============================ ==================
scale       training                     evaluation
=========== ============================ ==================
``"train"`` :math:`s + b\,f / (1 - p)`   :math:`s + f`
``"eval"``  :math:`s + b\,f`             :math:`s + (1-p) f`
``"none"``  :math:`s + b\,f`             :math:`s + f`
=========== ============================ ==================

Where :math:`b = 0` the branch is not executed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from .coins import is_distributed, is_view_of_flat, is_wrapper
from .rows import add_rows, split_rows, take_rows
from .sampling import Keep, check_mode, check_p, check_scale, decide

__all__ = [
    "Droppable",
    "DroppedGrad",
    "Merge",
    "Sum",
    "check_dropped_grad",
    "combine",
    "residual",
]


class Merge(Protocol):
    """How a branch's output joins its shortcut."""

    def __call__(self, shortcut: Any, output: Any, weight: float) -> Any:
        """The merged value, the branch weighing ``weight``."""

    def rows(self, shortcut: Any, output: Any, weight: float, rows: Tensor, dim: int) -> Any:
        """The same where ``output`` holds only the rows ``rows`` of the batch."""


@dataclass(frozen=True, slots=True)
class Sum:
    """``op(shortcut, output)``, which must be ``shortcut + factor * output``.

    At weight 1 the operation runs exactly as the model wrote it. At other weights the weight
    goes into the addition, which saves a pass over the branch's output.
    """

    op: Callable[[Tensor, Tensor], Tensor] = torch.add
    factor: float = 1

    def __call__(self, shortcut: Tensor, output: Tensor, weight: float) -> Tensor:
        if weight == 1.0:
            merged = self.op(shortcut, output)
        elif shortcut.stride() == output.stride():
            merged = torch.add(shortcut, output, alpha=self.factor * weight)
        else:  # the operand order decides the layout of the result: keep it
            merged = self.op(shortcut, output * weight)
        if merged.shape != shortcut.shape:
            raise ValueError(
                f"the branch's output has shape {tuple(output.shape)} and the shortcut "
                f"{tuple(shortcut.shape)}: a dropped branch would leave another shape than a "
                "kept one; project the shortcut to the output's shape"
            )
        return merged

    def rows(
        self, shortcut: Tensor, output: Tensor, weight: float, rows: Tensor, dim: int
    ) -> Tensor:
        shape = list(shortcut.shape)
        shape[dim] = len(rows)
        dtype = torch.promote_types(shortcut.dtype, output.dtype)
        values = output.to(dtype).expand(shape)
        return add_rows(shortcut.to(dtype), rows, values, self.factor * weight, dim)


DroppedGrad = Literal["none", "zero"]


def check_dropped_grad(dropped_grad: str) -> DroppedGrad:
    """``dropped_grad``, if it is one of the choices."""
    if dropped_grad not in get_args(DroppedGrad):
        raise ValueError(
            f"dropped_grad must be one of {get_args(DroppedGrad)}, got {dropped_grad!r}"
        )
    return dropped_grad  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Droppable:
    """A branch, and what has to be known of it to leave out some of its rows.

    Attributes:
        run: the branch, a function of its inputs.
        merge: how its output joins the shortcut.
        modules: asked for the modules that it runs.
        batch_dim: the dimension of the rows.
        input_dims: the same of each input, None where it has none; empty: as the shortcut's.
        parameters: asked for the parameters that it reads beside those of its modules.
        select: False where the rows of the inputs cannot be told apart: the branch then runs on
            all of them and the dropped rows of its output are left out.
        dropped_grad: what the parameters get where nothing is kept.
        name: what to call it in an error.
    """

    run: Callable[..., Any]
    merge: Merge
    modules: Callable[[], Iterable[nn.Module]] = tuple
    parameters: Callable[[], Iterable[Tensor]] = tuple
    batch_dim: int = 0
    input_dims: tuple[int | None, ...] = ()
    select: bool = True
    dropped_grad: DroppedGrad = "none"
    name: str = "the branch"


def combine(shortcut: Any, inputs: tuple[Any, ...], keep: Keep, branch: Droppable) -> Any:
    """Carry out a decision: the shortcut where dropped, merged with the branch where kept."""
    if keep.weight == 0.0:
        return _leave_out(shortcut, branch)
    if keep.coins is not None:
        return _choose_in_graph(shortcut, inputs, keep.coins, keep.weight, branch)
    if keep.rows is None:
        return branch.merge(shortcut, _run_on_all(shortcut, inputs, branch), keep.weight)
    rows, dim = keep.rows, branch.batch_dim
    if not branch.select:
        output = _take(_run_on_all(shortcut, inputs, branch), rows, dim)
    elif len(rows) == 1 and any(map(_pools_rows, branch.modules())):
        # Batch statistics of one row are poor or undefined. A second row goes along, and only
        # for them: which rows are kept, and so the expectation, stays as it was drawn.
        batch = _first_tensor(shortcut).shape[dim]
        pair = torch.cat([rows, (rows + 1) % batch])[: min(batch, 2)]
        output = branch.run(*_take_inputs(inputs, pair, branch))
        output = _take(output, torch.zeros_like(rows), dim)
    else:
        shortcut, taken = _split(shortcut, inputs, rows, branch)
        output = branch.run(*taken)
    return branch.merge.rows(shortcut, output, keep.weight, rows, dim)


def _run_on_all(shortcut: Any, inputs: tuple[Any, ...], branch: Droppable) -> Any:
    """The branch's output on all rows.

    Raises:
        RuntimeError: the branch overwrote the shortcut.
    """
    if torch.compiler.is_compiling():
        return branch.run(*inputs)
    tensors = [t for t in tree_leaves(shortcut) if isinstance(t, Tensor) and not t.is_inference()]
    versions = [t._version for t in tensors]
    output = branch.run(*inputs)
    if versions != [t._version for t in tensors]:
        raise RuntimeError(
            f"{branch.name} overwrites its shortcut in place, so a dropped branch would leave "
            "another shortcut than a kept one; make the first operation of the branch out of "
            "place, or leave it out of stochastic depth"
        )
    return output


def _choose_in_graph(
    shortcut: Any, inputs: tuple[Any, ...], coins: Tensor, weight: float, branch: Droppable
) -> Any:
    """The same in a compiled graph, which has to hold for every outcome of the coins.

    One coin for the call becomes torch.cond, which runs the branch only where it is kept. It
    cannot hold a branch with BatchNorm, whose statistics it would overwrite, nor with convolutions,
    whose weights' gradients may come in another layout than the zeros where it is dropped, nor
    rows: there all is computed and the dropped left out, statistics too.
    """
    modules = list(branch.modules())
    tensors = all(isinstance(x, Tensor) for x in (shortcut, *inputs))
    if len(coins) == 1 and tensors and not any(map(_is_beyond_cond, modules)):

        def kept(shortcut: Tensor, *inputs: Tensor) -> Tensor:
            merged: Tensor = branch.merge(shortcut, branch.run(*inputs), weight)
            if merged.stride() != shortcut.stride():
                merged = torch.empty_like(shortcut, dtype=merged.dtype).copy_(merged)
            return merged

        def dropped(shortcut: Tensor, *inputs: Tensor) -> Tensor:
            return shortcut.clone()

        return torch.cond(coins[0], kept, dropped, (shortcut, *inputs))
    # Statistics are collected in copies, since what a graph has read it must not overwrite.
    statistics = [
        (child, name, buffer)
        for module in modules
        for child in module.modules()
        if isinstance(child, _BatchNorm)
        for name, buffer in child.named_buffers(recurse=False)
    ]
    for child, name, buffer in statistics:
        setattr(child, name, buffer.clone())
    merged = branch.merge(shortcut, branch.run(*inputs), weight)
    for child, name, buffer in statistics:
        updated = getattr(child, name)
        setattr(child, name, buffer)
        with torch.no_grad():
            buffer.copy_(torch.where(coins.any(), updated, buffer))

    def choose(s: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        shape = [1] * out.dim()
        shape[branch.batch_dim] = len(coins)
        return torch.where(coins.view(shape), out, s)

    return tree_map(choose, shortcut, merged)


def _leave_out(shortcut: Any, branch: Droppable) -> Any:
    """A copy of the shortcut: what comes next may work in place, which must not reach it.

    Where somebody counts on a gradient for every parameter of the branch, the copy gives zeros.
    That is the optimizer, if asked for, and in a process group the other ranks, which may have
    kept the branch: DistributedDataParallel waits for every parameter, and zeros from a rank that
    dropped make the average the unbiased gradient. (An undefined gradient is enough for it, but
    not with static_graph=True, where it leaves this rank without the average.)
    """
    counted_on = branch.dropped_grad == "zero" or is_distributed()
    if not (counted_on and torch.is_grad_enabled()):
        return tree_map_only(Tensor, Tensor.clone, shortcut)
    owned = [p for module in branch.modules() for p in _parameters(module)]
    parameters = [p for p in dict.fromkeys((*owned, *branch.parameters())) if p.requires_grad]
    leaves, structure = tree_flatten(shortcut)
    first = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor))
    leaves = [
        x.clone() if isinstance(x, Tensor) and i != first else x for i, x in enumerate(leaves)
    ]
    leaves[first] = _Unused.apply(leaves[first], *parameters)  # type: ignore[no-untyped-call]
    return tree_unflatten(leaves, structure)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of ``module``, or what FSDP1 puts in their place."""
    if is_wrapper(module):  # which gathers them when it is called, on all ranks or none
        return
    for value in (*module._parameters.values(), *module.__dict__.values()):
        if isinstance(value, nn.Parameter) or is_view_of_flat(value):
            yield value
    for child in module.children():
        yield from _parameters(child)


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


def _split(
    shortcut: Any, inputs: tuple[Any, ...], rows: Tensor, branch: Droppable
) -> tuple[Any, tuple[Any, ...]]:
    """The shortcut, and the rows of the inputs, of which it may be one."""
    is_input = isinstance(shortcut, Tensor) and any(x is shortcut for x in inputs)
    if not is_input or torch.compiler.is_compiling():  # which saves by itself
        return shortcut, _take_inputs(inputs, rows, branch)
    taken, whole = split_rows(shortcut, rows, branch.batch_dim)
    others = _take_inputs(tuple(None if x is shortcut else x for x in inputs), rows, branch)
    return whole, tuple(taken if x is shortcut else y for x, y in zip(inputs, others, strict=True))


def _take_inputs(inputs: tuple[Any, ...], rows: Tensor, branch: Droppable) -> tuple[Any, ...]:
    dims = branch.input_dims or (branch.batch_dim,) * len(inputs)
    return tuple(
        x if dim is None else _take(x, rows, dim) for x, dim in zip(inputs, dims, strict=True)
    )


def _take(values: Any, rows: Tensor, dim: int) -> Any:
    return tree_map_only(Tensor, lambda x: take_rows(x, rows, dim), values)


def _first_tensor(values: Any) -> Tensor:
    return next(v for v in tree_leaves(values) if isinstance(v, Tensor))


def _pools_rows(module: nn.Module) -> bool:
    """Whether a module computes statistics over the rows of its batch."""
    return any(isinstance(m, _BatchNorm) and m.training for m in module.modules())


def _is_beyond_cond(module: nn.Module) -> bool:
    return any(isinstance(m, _ConvNd) or _pools_rows(m) for m in module.modules())


def residual(
    shortcut: Tensor,
    branch: Callable[..., Tensor],
    *inputs: Tensor,
    p: float = 0.5,
    training: bool = True,
    mode: str = "batch",
    scale: str = "train",
    generator: torch.Generator | None = None,
    batch_dim: int = 0,
) -> Tensor:
    """``shortcut + branch(*inputs)``, the branch dropped with probability ``p`` in training.

    A dropped branch is not called; in the modes that choose rows, ``"row"`` and ``"subset"``, it
    is called with the kept rows only. (A single kept row takes a second one along through a branch
    that is a module with BatchNorm in it, whose statistics need more than one.)

    Args:
        shortcut: the tensor that is always kept, of the shape of the sum.
        branch: called with ``inputs``, or with the shortcut where there are none.
        inputs: the branch's inputs. Where rows are chosen each has its rows in ``batch_dim``, as
            many as the shortcut; let the branch close over what all rows share.
        p: probability to drop, in [0, 1].
        training: False computes the whole sum (a module passes ``self.training``).
        mode: ``"batch"`` tosses one coin for the call, ``"row"`` one for each row, and
            ``"subset"`` keeps a fixed number k of the B rows, the nearest to B (1-p).
        scale: ``"train"`` divides a kept branch by 1-p, so that evaluation needs no change;
            ``"eval"`` multiplies the branch by 1-p in evaluation instead, as the paper does;
            ``"none"`` does neither.
        generator: where the coins come from; None is torch's default CPU generator.
        batch_dim: the dimension of the rows, not negative.

    Returns:
        A new tensor of the shortcut's shape.

    Raises:
        TypeError: ``p`` is not a number.
        ValueError: ``p`` is outside [0, 1]; unknown ``mode`` or ``scale``; the branch's output
            does not have the shortcut's shape; where rows are chosen, a shortcut without rows or
            an input with another number of them.

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
    p, mode, scale = check_p(p), check_mode(mode), check_scale(scale)
    inputs = inputs or (shortcut,)
    batch = 0
    if mode != "batch":
        batch = _count_rows(shortcut, batch_dim)
        for i, x in enumerate(inputs):
            if x.dim() == 0 or x.shape[batch_dim] != batch:
                raise ValueError(
                    f"inputs[{i}] has shape {tuple(x.shape)}, but mode={mode!r} needs {batch} rows "
                    f"in dimension {batch_dim} as in the shortcut; let the branch close over what "
                    "all rows share"
                )
    keep = decide(
        p,
        training=training,
        mode=mode,
        scale=scale,
        batch=batch,
        device=shortcut.device,
        generator=generator,
    )
    modules = (branch,) if isinstance(branch, nn.Module) else ()
    droppable = Droppable(branch, Sum(), lambda: modules, batch_dim=batch_dim)
    merged: Tensor = combine(shortcut, inputs, keep, droppable)
    return merged


def _count_rows(x: Tensor, batch_dim: int) -> int:
    if not 0 <= batch_dim < x.dim() or x.shape[batch_dim] == 0:
        raise ValueError(
            f"choosing rows needs at least one in dimension {batch_dim}, got a tensor of shape "
            f"{tuple(x.shape)}; use mode='batch'"
        )
    return x.shape[batch_dim]
