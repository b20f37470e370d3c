"""Which sums of a run are residual, by data flow alone and without the library.

Every torch function of one run makes values, each with the set of the values that it depends on,
as the bits of a number. A sum ``a + b`` is residual where ``b`` depends on ``a`` and the way from
``a`` to ``b`` reads a parameter; or where ``a`` is no more than one projection (and a norm) of a
value that ``b`` depends on in a deeper way. Sums inside of a branch, which nobody else reads, are a
part of it, and a sum around two or more residual sums is a long skip, whose inner sums are the
branches.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["residual_sums"]

_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "lerp", "addcmul"}
_NOT_DEPENDING = ("_like", "new_", "rand", "zeros", "ones", "full", "empty")


@dataclass
class _Sum:
    key: tuple[int, int]  # the module whose forward makes it, and which of its sums it is
    node: int
    branch: int  # the bits of what only the branch needs
    identity: bool


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {id(p) for p in (*model.parameters(), *model.buffers())}
        self.keep: list[Tensor] = []  # so that no id is used twice
        self.node: dict[int, int] = {}
        self.needs: list[int] = []
        self.varies = 0  # bits of values that depend on the model's input
        self.read = 0  # of those that parameters were read for
        self.weighted = 0  # of those that matrices were
        self.products = 0  # of those that are made from two others
        self.shapes: list[torch.Size] = []
        self.sources: list[list[int]] = []
        self.stack: list[list[int]] = []
        self.sums: list[_Sum] = []
        self.readers: list[list[int]] = []

    def name(self, t: Tensor, sources: list[int], varies: bool) -> int:
        n = len(self.needs)
        needs = 1 << n
        for x in sources:
            needs |= self.needs[x]
        self.needs.append(needs)
        self.varies |= varies << n
        self.shapes.append(t.shape)
        self.sources.append(sources)
        self.node[id(t)] = n
        self.keep.append(t)
        return n

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if name == "__setitem__":
            made = given[:1]
        if name.startswith(_NOT_DEPENDING) or name.endswith("_like"):
            given = []
        elif name.endswith("_as") or name == "to":
            given = given[:1]
        for t in given:
            if id(t) not in self.node and id(t) not in self.own and t.is_floating_point():
                self.unseen(t)
        known = [self.node[id(t)] for t in given if id(t) in self.node]
        own = [t for t in given if id(t) in self.own]
        varies = any(self.varies >> n & 1 for n in known)
        if not varies:  # a learned token, say
            known += [self.name(t, [], False) for t in own if id(t) not in self.node]
        for t in made if known else ():
            if id(t) in self.node and not _writes(name) and self.node[id(t)] in known:
                continue
            n = self.name(t, known, varies)
            weights = own or any(not self.varies >> x & 1 for x in known)
            self.read |= bool(weights) << n
            self.weighted |= any(p.dim() > 1 for p in own) << n
            self.products |= (sum(self.varies >> x & 1 for x in known) > 1) << n
            if name in _SUMS and len(known) > 1 and t.is_floating_point():
                self.sum(n, known[0], known[1])
        return result

    def unseen(self, t: Tensor) -> None:
        """What a script has made is taken to depend on the last value of its shape."""
        for n in range(len(self.needs) - 1, -1, -1):
            if self.shapes[n] == t.shape and self.varies >> n & 1:
                self.name(t, [n], True)
                return

    def sum(self, n: int, a: int, b: int) -> None:
        if not self.stack:
            return
        frame = self.stack[-1]
        frame[1] += 1
        ways = [(x, y) for x, y in ((a, b), (b, a)) if self.shapes[x] == self.shapes[n]]
        for shortcut, branch in ways:
            own = self.needs[branch] & ~self.needs[shortcut]
            if self.needs[branch] >> shortcut & self.varies >> branch & 1 and own & self.read:
                self.sums.append(_Sum((frame[0], frame[1]), n, own, True))
                return
        for shortcut, branch in ways:
            own = self.needs[branch] & ~self.needs[shortcut]
            rest = self.needs[shortcut] & ~self.needs[branch]
            entries = {x for i in _bits(rest) for x in self.sources[i] if not rest >> x & 1}
            depth, little = ((x & self.weighted).bit_count() for x in (own, rest))
            if len(entries) == 1 and little <= 1 and depth > little and not rest & self.products:
                self.sums.append(_Sum((frame[0], frame[1]), n, own, False))
                return

    def alone(self, s: _Sum) -> int:
        """The bits of a branch less what somebody else reads."""
        for i in sorted(_bits(s.branch), reverse=True):
            if any(r != s.node and not s.branch >> r & 1 for r in self.readers[i]):
                s.branch &= ~self.needs[i]
        return s.branch

    def __enter__(self) -> Any:
        self.hooks = ExitStack()
        hooks = torch.nn.modules.module
        enter = hooks.register_module_forward_pre_hook(
            lambda module, _: self.stack.append([id(module), 0])
        )
        leave = hooks.register_module_forward_hook(
            lambda module, _, result: void(self.stack.pop()), always_call=True
        )
        self.hooks.callback(enter.remove)
        self.hooks.callback(leave.remove)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.hooks.close()


def void(_: Any) -> None:
    """Nothing."""


def _writes(name: str) -> bool:
    return name == "__setitem__" or name.startswith("__i") or name.endswith("_")


def _bits(x: int) -> Iterator[int]:
    while x:
        low = x & -x
        yield low.bit_length() - 1
        x ^= low


def residual_sums(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many residual branches a run of ``model`` in evaluation has."""
    watch = _Watch(model)
    model.eval()
    for t in tree_leaves((args, kwargs)):
        if isinstance(t, Tensor):
            watch.name(t, [], True)
    with torch.no_grad(), watch:
        model(*args, **kwargs)
    watch.readers = [[] for _ in watch.needs]
    for n, sources in enumerate(watch.sources):
        for x in sources:
            watch.readers[x].append(n)
    chosen: dict[int, _Sum] = {}
    for outer in sorted(watch.sums, key=lambda s: watch.alone(s).bit_count()):
        inner = [s for n, s in chosen.items() if outer.branch >> n & 1]
        if sum(s.identity for s in inner) >= 2:
            continue
        for s in inner:
            del chosen[s.node]
        chosen[outer.node] = outer
    return len({s.key for s in chosen.values()})
