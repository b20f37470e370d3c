"""Everything that a run may change, put back afterwards: state, random numbers, arguments."""

import contextvars
import copy
import operator
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm as layers

from .._torch import global_hooks
from .ranks import is_sharded
from .spot import NOT_THE_USERS
from .tensors import tensors_within

__all__ = ["NORMS", "Kept", "attributes", "copied", "in_mode", "untouched"]

NORMS = (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d, layers.SyncBatchNorm)
_DEPTH = 4  # of containers and plain objects within what a module keeps


@contextmanager
def untouched(model: nn.Module, kept: "Kept | None" = None) -> Iterator[None]:
    """Put everything back that a forward may change, and let no warning of its own out.

    ``kept`` is the model's state, where that is known already.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model will say it again
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count()) if on_gpu else ()
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None and hasattr(numpy, "random"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.callback((kept or Kept(model)).put_back)
        for module in model.modules():
            if is_sharded(module):
                reshard: Any = module.reshard
                stack.callback(reshard)  # FSDP2 keeps what it is doing to itself
        yield


class Kept:
    """What modules keep: containers, plain objects and generators in place, tensors by value."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[int] = set()
        self.contained: set[int] = set()  # seen by the containers alone
        self.dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # and what is in them
        self.undo: list[Callable[[], object]] = []
        self.alive: list[Any] = []  # so that no id is used again
        for hook in global_hooks():
            self._keep_hook(hook)
        # Forwards may do the same; that of a module may be its own, and a script's may have none.
        forwards = [(type(m), getattr(m, "forward", nn.Module.forward)) for m in model.modules()]
        for hook in {(kind, id(getattr(f, "__func__", f))): f for kind, f in forwards}.values():
            self._keep_hook(hook)
        for module in model.modules():
            self._keep_module(vars(module))
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                self._keep_hook(hook)
        known = contextvars.copy_context()
        self.undo += [partial(var.set, value) for var, value in known.items()]
        self._keep_containers(tuple(x for x in known.values() if type(x) in _CONTAINERS), _DEPTH)

    def _keep_module(self, state: dict[str, Any]) -> None:
        before = dict(state)
        self.dicts.append((state, before))
        for name, x in before.items():
            kind = type(x)
            if kind in _PLAIN or x is None:
                continue
            if name in _OF_ALL:
                if not isinstance(x, dict):
                    continue  # a script's
                self.dicts.append((x, dict(x) if x else _EMPTY))
                if x and name == "_buffers":
                    self._keep_all(x.values(), 1)
            else:
                self.keep(x, _DEPTH)

    def keep(self, x: Any, depth: int) -> None:
        """Keep a value, and what is in it."""
        if x is None or type(x) in _PLAIN or id(x) in self.seen or type(x) is nn.Parameter:
            return
        if isinstance(x, nn.Module | type | types.ModuleType):
            return
        if type(x).__module__.startswith("torch.distributed"):
            return  # engines keep their own state, of which a part is worse than none
        self.seen.add(id(x))
        self.alive.append(x)
        if isinstance(x, Tensor):
            self._keep_tensor(x)
        elif isinstance(x, dict | list | deque | set | tuple):
            self._keep_all(self._contents(x), depth)
        elif self._keep_generator(x):
            pass
        elif depth and not callable(x) and isinstance(getattr(x, "__dict__", None), dict):
            self._keep_all(self._contents(vars(x)), depth)

    def _keep_generator(self, x: Any) -> bool:
        """Keep the state of what draws random numbers, if ``x`` is that."""
        kind = type(x)
        if issubclass(kind, random.Random):
            self.undo.append(partial(x.setstate, x.getstate()))
        elif kind is torch.Generator or kind.__name__ == "RandomState":
            self.undo.append(partial(x.set_state, x.get_state()))
        elif hasattr(kind, "bit_generator"):  # numpy's
            self.undo.append(partial(setattr, x.bit_generator, "state", x.bit_generator.state))
        else:
            return False
        return True

    def _contents(self, x: Any) -> list[Any]:
        """What is in a container, which is to be in it again."""
        if isinstance(x, dict):
            self.dicts.append((x, before := dict(x)))
            return list(before.values())
        items = list(x)
        if not isinstance(x, tuple):
            self.undo.append(partial(_refill, x, items))
        return items

    def _keep_containers(self, x: Any, depth: int) -> None:
        """Keep what is in lists and dicts that hooks fill, and no values of tensors."""
        if id(x) in self.contained:
            return
        self.contained.add(id(x))
        self.alive.append(x)
        items = self._contents(x)
        if depth and len(items) <= _MANY:
            for item in items:
                if type(item) in _CONTAINERS:
                    self._keep_containers(item, depth - 1)

    def _keep_hook(self, hook: Any) -> None:
        """Keep what a user's hook can fill: of its object, what it closes over, and globals."""
        while isinstance(hook, partial):
            self._keep_containers((*hook.args, *hook.keywords.values()), _DEPTH)
            hook = hook.func
        if (getattr(hook, "__module__", None) or "").startswith(NOT_THE_USERS):
            return  # engines keep their own state, and ours are asked what they have seen
        own, function = getattr(hook, "__self__", None), getattr(hook, "__func__", hook)
        if not isinstance(function, types.FunctionType):
            own, function = hook, type(hook).__call__
        names = _named_in(function, own)
        cells = getattr(function, "__closure__", None) or ()
        enclosed = [(cell, "cell_contents", _cell(cell)) for cell in cells]
        self.undo += [partial(setattr, *x) for x in enclosed if type(x[2]) in _COUNTS]
        known = getattr(function, "__globals__", {})
        named = {n: x for n, x in known.items() if n in names}
        self.undo.append(partial(_set_again, known, named, known.__setitem__))
        found = [x for _, _, x in enclosed] + list(named.values())
        self._keep_counts(found)
        for x in [own, *found]:
            with suppress(Exception):  # of any kind: some objects do not like to be looked at
                if isinstance(x, types.ModuleType):
                    continue
                if isinstance(x, nn.Module):
                    x = type(x)
                for part in x.__mro__ if isinstance(x, type) else [x]:
                    state: Any = vars(part)
                    of_it = {n: value for n, value in state.items() if n in names}
                    put = partial(setattr, part) if isinstance(x, type) else state.__setitem__
                    self.undo.append(partial(_set_again, state, of_it, put))
                    self._keep_counts(list(of_it.values()))

    def _keep_counts(self, values: list[Any]) -> None:
        """Keep what can be counted or collected in."""
        self._keep_containers(tuple(x for x in values if type(x) in _CONTAINERS), _DEPTH)
        for x in values:
            if type(x) is Tensor:
                self._keep_tensor(x)
            elif type(x).__name__ == "ndarray" and x.flags.writeable:
                self.undo.append(partial(x.__setitem__, ..., x.copy()))
            else:
                self._keep_generator(x)

    def _keep_all(self, items: Any, depth: int) -> None:
        if depth:
            for item in items:
                if item is not None and type(item) not in _PLAIN:
                    self.keep(item, depth - 1)

    def _keep_tensor(self, t: Tensor) -> None:
        if t.is_inference() or t.is_meta or t.is_nested or t.layout != torch.strided:
            return  # in some of which nothing can be written
        version, value = t._version, t.detach().clone()

        def put_back() -> None:
            # Kernels write running statistics without a new version.
            if t._version != version or not torch.equal(t, value):
                with torch.no_grad():
                    if t.shape != value.shape:
                        t.resize_(value.shape)
                    t.copy_(value)

        self.undo.append(put_back)

    def put_back(self) -> None:
        """Put it all back."""
        same = operator.is_
        for x, before in self.dicts:
            if len(x) == len(before):
                if not before:  # as most are
                    continue
                if all(map(same, x, before)) and all(map(same, x.values(), before.values())):
                    continue
            x.clear()
            x.update(before)
        for undo in self.undo:
            undo()


_EMPTY: dict[Any, Any] = {}
_OF_ALL = frozenset(name for name, x in vars(nn.Module()).items() if isinstance(x, dict))
_PLAIN = {bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, types.FunctionType}
_COUNTS = {bool, int, float, str, Tensor}
_MANY = 1000  # in a list that is looked into
_CONTAINERS = {dict, list, set, tuple, OrderedDict, defaultdict}


def _named_in(function: Any, own: Any) -> set[str]:
    """The names in the code of a hook, and in that of the methods of its object that it calls."""
    names: set[str] = set()
    codes = [getattr(function, "__code__", None)]
    for code in codes:  # which grows
        if code is not None:
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            for name in set(code.co_names) - names:
                names.add(name)
                codes.append(getattr(getattr(type(own), name, None), "__code__", None))
    return names


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _set_again(state: Any, before: dict[str, Any], put: Callable[[str, Any], object]) -> None:
    for name, value in before.items():
        if state.get(name) is not value:
            put(name, value)


def _refill(x: Any, before: list[Any]) -> None:
    if len(before) != len(x) or not all(map(operator.is_, before, x)):
        x.clear()
        x.update(before) if isinstance(x, set) else x.extend(before)


def attributes(module: nn.Module) -> list[Any]:
    """What a module keeps beside its children, parameters, buffers and hooks."""
    return [
        x
        for name, x in vars(module).items()
        if x is not None and type(x) not in _PLAIN and name not in _OF_ALL
    ]


@contextmanager
def in_mode(
    model: nn.Module, training: bool, frozen: Container[type] = frozenset()
) -> Iterator[None]:
    """Set all modules to training or evaluation, without what a class may do in ``train``.

    Modules of the types in ``frozen`` are set to evaluation in any case.
    """
    changed = [m for m in model.modules() if m.training != (training and type(m) not in frozen)]
    try:
        for module in changed:
            module.training = not module.training
        yield
    finally:
        for module in changed:
            module.training = not module.training


def copied(x: Any, memo: dict[int, Any] | None = None) -> Any:
    """Arguments that may be written to: tensors, containers and caches of their own."""
    memo = {} if memo is None else memo
    if id(x) in memo:
        return memo[id(x)]
    if isinstance(x, Tensor):
        memo[id(x)] = t = x.detach().clone() if type(x) in (Tensor, nn.Parameter) else x
        return t
    if type(x) in (list, tuple):
        return type(x)([copied(item, memo) for item in x])
    if type(x) is dict:
        return {key: copied(item, memo) for key, item in x.items()}
    if x is None or type(x) in _PLAIN or callable(x):
        return x
    for t in tensors_within(x, _DEPTH):  # those with a graph have no deep copy
        memo[id(t)] = t.detach().clone()
    try:
        return copy.deepcopy(x, memo)
    except Exception:  # of any kind: it cannot be copied
        return x
