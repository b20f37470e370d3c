"""Modules that wait for the other ranks: a branch with such a one is dropped on all or on none."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import SyncBatchNorm

from .._torch import has_gradient_hooks, is_view_of_flat_parameter
from ..branch import Branch, block_of, label_of
from ..find import WHOLE
from ..find.ranks import is_sharded

__all__ = [
    "existing_of",
    "has_units",
    "is_fsdp_wrapper",
    "is_split",
    "is_whole",
    "modules_of",
    "needs_all_ranks",
    "own_parameters",
    "waiting_in",
]


def modules_of(branch: Branch, block: nn.Module) -> list[nn.Module]:
    """The modules that a branch calls, found by their names below its block."""
    if branch.kind == "block":
        return [block]
    return [_below(block, name) for name in _relative(branch, branch.modules)]


def is_whole(branch: Branch) -> bool:
    """Whether it is a block that is not called at all where it is dropped."""
    return label_of(branch) == WHOLE


def existing_of(branch: Branch, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The drop modules in a branch, and their names below its block."""
    return [(name, _below(block, name)) for name in _relative(branch, branch.existing)]


def _relative(branch: Branch, names: tuple[str, ...]) -> list[str]:
    prefix = block_of(branch)
    prefix = f"{prefix}." if prefix else ""
    return [name.removeprefix(prefix) for name in names]


def _below(block: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        block = getattr(block, part)  # wrappers of FSDP and of checkpointing pass this on
    return block


def needs_all_ranks(branch: Branch, block: nn.Module) -> tuple[str, bool]:
    """Whether ranks have to run a branch together.

    Returns:
        What in the branch waits for other ranks, "" if nothing does, and whether they had better:
        the parameters of ``block`` are sharded, or gradients are seen one by one by hooks, which
        may average them, and come in another order where the branch is dropped.
    """
    inside = [m for module in modules_of(branch, block) for m in module.modules()]
    if not is_whole(branch):  # a unit gathers its own parameters before its forward decides
        inside = [m for m in inside if m is not block]
    talking = waiting_in(inside, in_unit=is_sharded(block)) or "collective" * branch.talks
    better = has_units(block) or any(
        is_view_of_flat_parameter(t) for m in block.modules() for t in _tensors(m)
    )
    hooked = (has_gradient_hooks(p) for m in inside for p in m.parameters(recurse=False))
    return talking, better or any(hooked)


def waiting_in(modules: Iterable[nn.Module], in_unit: bool = False) -> str:
    """The type of the first of these that waits for other ranks, "" if none does.

    Args:
        modules: the modules.
        in_unit: whether FSDP2 has yet to gather their parameters, as it does before the block's
            forward. Those of the modules around it have been gathered when the block is called.
    """
    return next((type(m).__name__ for m in modules if _is_collective(m, in_unit)), "")


def _is_collective(module: nn.Module, in_unit: bool) -> bool:
    return isinstance(module, SyncBatchNorm) or _is_unit(module) or is_split(module, in_unit)


def is_split(module: nn.Module, in_unit: bool = False) -> bool:
    """Whether several ranks compute ``module`` together, on the same samples."""
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    split = [p for p in module.parameters(recurse=False) if isinstance(p, kind)]
    return not all(in_unit and _may_be_of_fsdp(p) for p in split)


def _may_be_of_fsdp(parameter: Any) -> bool:
    """Whether FSDP2 alone may have split it, and not tensor parallelism, too."""
    names = parameter.device_mesh.mesh_dim_names or ()
    *others, last = parameter.placements  # in a hybrid, FSDP shards in groups that are replicas
    fits = last.is_shard() and all(other.is_replicate() for other in others)
    return fits and not any("tp" in name for name in names)


def has_units(block: nn.Module) -> bool:
    """Whether FSDP gathers parameters when ``block`` is called."""
    return any(map(_is_unit, block.modules()))


def _is_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of ``module`` when it is called."""
    return is_fsdp_wrapper(module) or is_sharded(module)


def is_fsdp_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is a wrapper of FSDP1."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported where it is not used
    return isinstance(module, getattr(fsdp, "FullyShardedDataParallel", ()))


def _tensors(module: nn.Module) -> Iterable[Any]:
    return (*module.parameters(recurse=False), *vars(module).values())


def parameters_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters of ``module``, or what FSDP1 puts in their place."""
    if is_fsdp_wrapper(module):  # which gathers them when it is called, on all ranks or none
        return
    yield from module.parameters(recurse=False)  # plain tensors in functional_call
    for value in vars(module).values():
        if isinstance(value, nn.Parameter) or is_view_of_flat_parameter(value):
            yield value
    for child in module.children():
        yield from parameters_of(child)


def own_parameters(branch: Branch, owner: Any) -> list[Tensor]:
    """The parameters of a branch, each once: of its modules, and what its block reads for it."""
    inside = (p for module in owner.modules_of(branch) for p in parameters_of(module))
    return list(dict.fromkeys((*inside, *owner.parameters_of(branch))))
