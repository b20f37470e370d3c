"""Every private name of torch that the library stands on, once, each with its reason.

``tests/test_private_names.py`` fails where one of them goes or changes its meaning.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.utils import hooks
from torch.utils._pytree import (  # torch has no public one
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "CALL",
    "COMPILED_CALL",
    "CONTENTS",
    "REPLICATE",
    "class_replicate",
    "default_store",
    "forward_hooks",
    "global_hooks",
    "graph_task",
    "has_gradient_hooks",
    "has_hooks",
    "is_any_autocast_on",
    "is_compiled_around",
    "is_compiler_loaded",
    "is_flat_parameter",
    "is_given_to_hook",
    "is_in_torch_func",
    "is_transformed",
    "is_view_of_flat_parameter",
    "outside_graphs",
    "saved_tensors_hooks",
    "start_no_graph",
    "starts_graphs",
    "tell_apart",
    "tensor_leaves",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "without_parametrize_cache",
]


def tensor_leaves(x: Any) -> list[Tensor]:
    """The tensors among the leaves of ``x``."""
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


F = TypeVar("F", bound=Callable[..., Any])

# ``nn.Module.__call__`` looks these up on the instance: what stands there meets every call.
CALL = "_call_impl"
COMPILED_CALL = "_compiled_call_impl"

# Where a module has its children and parameters.
CONTENTS = "_modules", "_parameters"
_OTHER: dict[type, Any] = {dict: OrderedDict, OrderedDict: dict}


def tell_apart(own: dict[str, Any]) -> None:
    """Change the type of the dicts with a module's contents, or back; ``own`` is its ``__dict__``.

    torch.compile takes a graph that it has made of one model for another of the same class, and
    does not look at what stands in the place of its call: a model compiled without stochastic depth
    would lend its graph to one that has it, and nothing would be dropped. It does look at the
    types of these dicts, which have been ordered ones and plain ones in torch's history.

    They are new ones: who shares the old ones keeps them, and they keep nothing that is replaced.
    """
    for name in CONTENTS:
        other = _OTHER.get(type(own.get(name)))
        if other is not None:
            own[name] = other(own[name])


# ``parametrize.cached()`` keeps weights, which are without gradients where we watch.
@contextmanager
def without_parametrize_cache() -> Iterator[None]:
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


# How ``nn.parallel.replicate`` copies a module, ``__dict__`` and all.
REPLICATE = "_replicate_for_data_parallel"


def class_replicate(module: nn.Module) -> nn.Module:
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
    return replica


# Whether a module has hooks around its forward: the public ways only add them.
def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that see what a call of the module returns."""
    return list(module._forward_hooks.values())


def global_hooks() -> list[Any]:
    """The hooks around the forwards of all modules."""
    return [*modules._global_forward_pre_hooks.values(), *modules._global_forward_hooks.values()]


def is_compiler_loaded() -> bool:
    """Whether anything can have been compiled: torch imports its compiler when it is asked to."""
    return "torch._dynamo" in sys.modules


# The number of the backward pass that runs on this thread, -1 where none does. Gradient
# checkpointing repeats a forward within one.
graph_task = torch._C._current_graph_task_id


# What packs the tensors that autograd saves, None where nothing does. Non-reentrant checkpointing
# works through such hooks, and nothing public tells that they are there. Each time it is a new
# tuple of the same two functions.
saved_tensors_hooks = partial(torch._C._autograd._top_saved_tensors_default_hooks, False)


# Whether the code of a frame looks for the tensors whose gradients a full backward hook is to see.
def is_given_to_hook(frame: FrameType) -> bool:
    return frame.f_globals is vars(hooks)


def is_in_torch_func() -> bool:
    """Whether a transform of torch.func runs this."""
    return torch._C._are_functorch_transforms_active()


def is_transformed() -> bool:
    """Whether something other than ordinary autograd looks on and has to see plain operations."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_func()
        or torch.autograd.forward_ad._current_level >= 0
    )


# Whether autocast is on for any device: to ask for that of a tensor takes three times as long.
is_any_autocast_on = torch._C._is_any_autocast_enabled


# ``torch.compiler.disable``, which imports the compiler only when the function is called.
outside_graphs = _disable_dynamo


# Where a graph of torch.compile's breaks inside of a block, the compiler goes on with one graph for
# each function that is called from there, ours among them: of one call of ours, a part would be
# traced and a part would run. So marked, a function runs as it is written; where it is called by
# one that is traced, it is traced, too. Forwards are not marked: a module may be compiled.
_STARTS_GRAPHS = "_starts_graphs"
_frames = torch._C._dynamo.eval_frame
_AS_WRITTEN = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)


def starts_graphs(function: F) -> F:
    """Leave this function out of :func:`start_no_graph`."""
    setattr(function, _STARTS_GRAPHS, True)
    return function


def start_no_graph(package: str) -> None:
    """Have no function of the modules of ``package`` be the first of a graph."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for code in _codes(vars(module), name):
                _frames.set_code_exec_strategy(code, _AS_WRITTEN)


def _codes(own: Mapping[str, Any], module: str) -> Iterator[CodeType]:
    """What is in these attributes of a module, or of a class in it."""
    for x in own.values():
        if isinstance(x, type) and x.__module__ == module:
            own_forward = {"forward"} if issubclass(x, nn.Module) else set()
            yield from _codes({k: v for k, v in vars(x).items() if k not in own_forward}, module)
        found = x.fget if isinstance(x, property) else getattr(x, "__func__", x)
        found = getattr(found, "__wrapped__", found)
        if not isinstance(found, FunctionType) or hasattr(found, _STARTS_GRAPHS):
            continue
        if found.__module__ == module:
            yield from _with_inner(found.__code__)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


# Whether the functions that are called now are compiled, though none is being traced.
def is_compiled_around() -> bool:
    return not torch.compiler.is_compiling() and callable(_frames.get_eval_frame_callback())


# Whether something is called with the gradient of a parameter: the public ways only add it.
def has_gradient_hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


# FSDP1 puts the parameters of a unit into one flat one, and views of that in their place.
def is_flat_parameter(parameter: Tensor) -> bool:
    return any(getattr(parameter, name, False) for name in ("_is_flat_param", "_fsdp_flattened"))


def is_view_of_flat_parameter(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value._base, "_is_flat_param", False)


# The store by which the ranks of the process group found each other. A store of our own would need
# an address.
def default_store() -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
