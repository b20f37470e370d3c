"""Residual regions of a traced forward: a pure function on a graph.

For a sum ``m = add(s, b)`` let ``Anc(v)`` be a value and all it is computed from. The branch is
what ``b`` needs and ``s`` does not, ``Anc(b) - Anc(s)``; the shortcut's own work is
``Anc(s) - Anc(b)``. Where the shortcut has no work of its own, the region is an *identity*
shortcut; where it has little (at most one layer with a weight matrix, and less in a row than the
branch) and starts from the same value, or rearranges several (``cat``), a *projection*. Everything
else is not a residual sum.

Ancestor sets are bit masks in Python integers, which makes this fast.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..functional import Sum
from .examples import Detail
from .graphs import is_effect, is_shape, sum_of

__all__ = [
    "Kind",
    "Leaf",
    "NotResidual",
    "Refusal",
    "Region",
    "find_regions",
]

Kind = Literal["identity", "projection", "block"]


@dataclass(frozen=True)
class Leaf:
    """What the analysis has to know of a child module."""

    weights: tuple[int, int]  # the number of its weight matrices, and of its depthwise filters
    in_place: bool = False  # it overwrites its input with its result
    identity: bool = False  # it returns its input
    lookup: bool = False  # it looks rows of a table up, by number
    parameters: bool = True
    light: bool = False  # a dropout or the like, not worth dropping by itself


@dataclass(frozen=True)
class Region:
    """A residual sum: ``merge(shortcut, output)``, with the branch's nodes in order."""

    merge: fx.Node
    shortcut: fx.Node
    output: fx.Node
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    rows: tuple[int | None, ...] | None  # the dimension of each input's rows; None: not known
    kind: Kind
    sum: Sum
    # What else the branch returns (attention weights, say), as a node outside of it, and what it
    # is where nobody asks for it: None, or a structure of None.
    extras: tuple[tuple[fx.Node, Any], ...] = ()
    declared: tuple[tuple[fx.Node, Any], ...] = ()  # the same, as a handler has it

    @property
    def modules(self) -> tuple[str, ...]:
        """The child modules that the branch calls, in order."""
        return tuple(dict.fromkeys(str(n.target) for n in self.nodes if n.op == "call_module"))


@dataclass(frozen=True)
class Refusal:
    """A sum that looks residual but cannot be dropped."""

    modules: tuple[str, ...]
    reason: str


_PRESENT = object()  # in place of a value that may be something


class NotResidual(Exception):
    """A graph in which no branch can be dropped; the message is the reason.

    ``detail`` is what of the example values this depends on.
    """

    detail = Detail.NOTHING


_IN_PLACE = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.imatmul,
    operator.ipow,
    operator.ifloordiv,
    operator.imod,
}
_VIEWS = {
    "chunk",
    "expand",
    "flatten",
    "permute",
    "reshape",
    "split",
    "squeeze",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
}


def find_regions(
    graph: fx.Graph,
    leaf: Callable[[str], Leaf],
    example: Callable[[fx.Node], Any] = lambda node: None,
    objects: Mapping[fx.Node, str] = MappingProxyType({}),
    declared: Callable[[fx.Node], Any] = lambda node: dict[fx.Node, Any]()[node],
    rows: Callable[[fx.Node], int | None] = lambda node: dict[fx.Node, None]()[node],
    batch_dim: int = 0,
) -> tuple[list[Region], list[Refusal]]:
    """The residual regions of ``graph`` in the order of their sums, inner ones included.

    In-place operations are made explicit first: uses of a value that come after an operation
    has overwritten it become uses of that operation's result. This rewrites ``graph``, whose
    meaning stays the same.

    Args:
        graph: a traced forward.
        leaf: what is known of a child module, by its qualified name in the graph.
        example: the value of a node with no more than fake tensors. By default everything that a
            branch returns beside its output is taken for None.
        objects: placeholders that are no tensors, with the names of their types. A branch that is
            given one may change it (a key-value cache), so it cannot be dropped.
        declared: what a handler puts in place of a part of what a module returns; raises a
            LookupError where none does.
        rows: in which dimension a node has the rows of the batch, None where it has none; raises
            an Exception where that is not known.
        batch_dim: the same of the shortcuts.

    Raises:
        NotResidual: nothing in the graph can be dropped; the message is the reason.
    """
    overwritten = _thread_in_place(graph, leaf)
    return _Finder(graph, leaf, example, objects, declared, rows, batch_dim, overwritten).run()


def _thread_in_place(graph: fx.Graph, leaf: Callable[[str], Leaf]) -> dict[fx.Node, fx.Node]:
    """Point later uses of an overwritten value at the result; the map from one to the other.

    Raises:
        NotResidual: a view is overwritten, which changes its base in a way no node stands for.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    overwritten: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        target = _overwrites(node, leaf)
        if target is None:
            continue
        base = target
        while _is_view(base):
            base = base.all_input_nodes[0]
            if any(order[user] > order[node] for user in base.users):
                raise NotResidual("it overwrites a part of a value in place")
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
        overwritten[target] = node
    return overwritten


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _VIEWS
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and (node.target is operator.getitem or name in _VIEWS)


def _overwrites(node: fx.Node, leaf: Callable[[str], Leaf]) -> fx.Node | None:
    """The value that ``node`` overwrites with its result, if it works in place."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    first = node.args[0]
    if is_shape(first):
        return None
    if node.op == "call_module":
        return first if leaf(str(node.target)).in_place else None
    if node.op == "call_method":
        name = str(node.target)
        return first if name.endswith("_") and not name.endswith("__") else None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        private = name.startswith("_") or name.endswith("__")
        in_place = node.target in _IN_PLACE or (name.endswith("_") and not private)
        return first if in_place or node.kwargs.get("inplace") is True else None
    return None


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class _Finder:
    def __init__(
        self,
        graph: fx.Graph,
        leaf: Callable[[str], Leaf],
        example: Callable[[fx.Node], Any],
        objects: Mapping[fx.Node, str],
        declared: Callable[[fx.Node], Any],
        rows: Callable[[fx.Node], int | None],
        batch_dim: int,
        overwritten: dict[fx.Node, fx.Node],
    ) -> None:
        self.leaf = leaf
        self.example = example
        self.objects = objects
        self.declared = declared
        self.rows = rows
        self.batch_dim = batch_dim
        self.overwritten = overwritten
        self.nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.values = 0  # the nodes that are computed values: no shapes, no assertions
        self.ancestors: list[int] = []
        for i, node in enumerate(self.nodes):
            mask = 0
            if not is_shape(node) and not is_effect(node):
                mask = 1 << i
                self.values |= mask
            for source in node.all_input_nodes:
                if not is_shape(source):
                    mask |= self.ancestors[self.index[source]]
            self.ancestors.append(mask)
        self.given = self._mask(n for n in self.nodes if n.op == "placeholder")
        self.attributes = self._mask(n for n in self.nodes if n.op == "get_attr")
        self.found: dict[fx.Node, Region] = {}
        self.refused: list[Refusal] = []

    def run(self) -> tuple[list[Region], list[Refusal]]:
        for node in self.nodes:
            sides = sum_of(node)
            if sides is None or not all(self.values >> self.index[s] & 1 for s in sides[:2]):
                continue
            a, b, factor = sides
            region = self._region(node, a, b, Sum(_operation(node, swapped=False), factor))
            if region is None and factor == 1:
                region = self._region(node, b, a, Sum(_operation(node, swapped=True), 1))
            if region is not None:
                self.found[node] = region
        return list(self.found.values()), self.refused

    def _mask(self, nodes: Iterable[fx.Node]) -> int:
        mask = 0
        for node in nodes:
            mask |= 1 << self.index[node]
        return mask

    def _anc(self, node: fx.Node) -> int:
        return self.ancestors[self.index[node]]

    def _depth(self, mask: int) -> tuple[int, int]:
        """The weight matrices, and the depthwise filters, one after the other in ``mask``."""
        depths: dict[fx.Node, tuple[int, int]] = {}
        for i in _bits(mask):
            node = self.nodes[i]
            before = [depths[n] for n in node.all_input_nodes if n in depths]
            matrices, depthwise = max(before, default=(0, 0))
            if node.op == "call_module":
                weights = self.leaf(str(node.target)).weights
                matrices, depthwise = matrices + weights[0], depthwise + weights[1]
            depths[node] = matrices, depthwise
        return max(depths.values(), default=(0, 0))

    def _parameters(self, mask: int) -> bool:
        nodes = [self.nodes[i] for i in _bits(mask)]
        return any(self.leaf(str(n.target)).parameters for n in nodes if n.op == "call_module")

    def _looks_up(self, mask: int) -> bool:
        nodes = [self.nodes[i] for i in _bits(mask)]
        return any(self.leaf(str(n.target)).lookup for n in nodes if n.op == "call_module")

    def _region(
        self, merge: fx.Node, shortcut: fx.Node, output: fx.Node, as_sum: Sum
    ) -> Region | None:
        # What the block is given enters a branch, and is never computed by one.
        branch = self._anc(output) & ~self._anc(shortcut) & ~self.given
        own = self._anc(shortcut) & ~self._anc(output) & ~self.given
        if not self._anc(shortcut) & self.given or not branch >> self.index[output] & 1:
            return None
        # x + f(x) + g(x): the second branch reads the trunk x of the shortcut x + f(x).
        trunk = [shortcut]
        while own:
            inner = self.found.get(trunk[-1])
            if inner is not None and inner.kind == "identity":
                own &= ~self._mask(inner.nodes)
                before = inner.shortcut
            elif trunk[-1].op == "call_module" and self.leaf(str(trunk[-1].target)).identity:
                before = trunk[-1].all_input_nodes[0]
            else:
                break
            own &= ~self._mask([trunk[-1]])
            trunk.append(before)
        kind: Kind = "projection" if own & ~self.attributes else "identity"
        if kind == "identity" and not self._anc(output) >> self.index[trunk[-1]] & 1:
            return None
        if kind == "projection":
            if self._looks_up(own):
                return None  # x_1 and x_2 are embeddings of the same words: no shortcut
            depth = self._depth(own)
            if depth[0] > 1 or (any(depth) and self._depth(branch) <= depth):
                return None
            if not self._parameters(branch):
                return None  # two kinds of pooling, say
        if not self._substantial(branch):
            return None
        extras: dict[fx.Node, Any] = {}
        declared: dict[fx.Node, Any] = {}
        for node in self._others(branch):
            extras[node] = self._absent(node)
            if extras[node] is _PRESENT and (value := self._declared(node, branch)) is not _PRESENT:
                declared[node] = value
                del extras[node]
            elif extras[node] is _PRESENT:
                self._refuse(branch, "it also returns something else that is used")
                return None
        kept = self._without_leaks(branch, {merge, *extras, *declared})
        inputs = self._entries(kept)
        if not self._substantial(kept) or not kept >> self.index[output] & 1 or not inputs:
            self._refuse(branch, "what the branch computes is also used outside of it")
            return None
        if given := [self.objects[n] for n in inputs if n in self.objects]:
            reason = f"it is given a {given[0]}, which it may change"
            if "Cache" in given[0]:
                reason += ": call the model with use_cache=False"
            self._refuse(branch, reason)
            return None
        if any(
            v in self.overwritten
            and not kept >> self.index[self.overwritten[v]] & 1
            and self.index[self.overwritten[v]] < self.index[merge]
            for v in inputs
        ):
            self._refuse(branch, "an input of the branch is overwritten before the sum")
            return None
        if kind == "projection":
            start = self._entries(own)
            if not start or not set(start) <= set(inputs):
                if set(start) <= set(self._entries(branch)):
                    self._refuse(branch, "what the branch computes is also used outside of it")
                return None
            if len(start) > 1 and not all(_rearranges(self.nodes[i]) for i in _bits(own)):
                return None  # two values are mixed: a gate, say
            trunk = list(start)
        nodes = tuple(self.nodes[i] for i in _bits(kept))
        rows: tuple[int | None, ...] | None = (self.batch_dim,) * len(inputs)
        if not set(inputs) <= set(trunk):
            if not self._same_shape(shortcut, merge):
                return None  # attention scores and their mask, say
            rows = self._rows(inputs, trunk, merge)
        returned, replaced = (
            tuple((n, v) for n, v in parts.items() if n.all_input_nodes[0] in nodes)
            for parts in (extras, declared)
        )
        return Region(
            merge, shortcut, output, nodes, inputs, rows, kind, as_sum, returned, replaced
        )

    def _same_shape(self, shortcut: fx.Node, merge: fx.Node) -> bool:
        try:
            return bool(self.example(shortcut).shape == self.example(merge).shape)
        except Exception:  # of any kind: then it is not known
            return True

    def _rows(
        self, inputs: tuple[fx.Node, ...], trunk: list[fx.Node], merge: fx.Node
    ) -> tuple[int | None, ...] | None:
        """In which dimension each input has the rows; None where that is not certain."""
        try:
            # That of the sum too: where the trace holds for one number of rows, it is no other.
            if any(self.rows(node) != self.batch_dim for node in (*trunk, merge)):
                return None
            return tuple(map(self.rows, inputs))
        except Exception:  # of any kind: then it is not known
            return None

    def _others(self, branch: int) -> Iterator[fx.Node]:
        """Parts outside of the branch of what its modules return, where anything reads them."""
        nodes = [self.nodes[i] for i in _bits(branch)]
        for call in (n for n in nodes if n.op == "call_module"):
            for part in call.users:
                inside = branch >> self.index[part] & 1
                if part.target is operator.getitem and part.users and not inside:
                    yield part

    def _declared(self, node: fx.Node, branch: int) -> Any:
        """What a handler puts in place of ``node``, if that is there without the branch."""
        try:
            value = self.declared(node)
        except LookupError:
            return _PRESENT
        sources = [n for n in tree_leaves(value) if isinstance(n, fx.Node)]
        return _PRESENT if any(branch >> self.index[n] & 1 for n in sources) else value

    def _absent(self, node: fx.Node) -> Any:
        """The value of ``node`` where that is None or a structure of None."""
        try:
            value = self.example(node)
        except Exception:  # of any kind: then it is not known
            return _PRESENT
        return value if all(x is None for x in tree_leaves(value)) else _PRESENT

    def _refuse(self, branch: int, reason: str) -> None:
        nodes = (self.nodes[i] for i in _bits(branch))
        modules = tuple(str(n.target) for n in nodes if n.op == "call_module")
        self.refused.append(Refusal(modules, reason))

    def _without_leaks(self, branch: int, known: set[fx.Node]) -> int:
        """``branch`` without what nodes outside of it, others than the ``known``, need too."""
        for i in reversed(list(_bits(branch))):
            if branch >> i & 1 and any(
                user not in known and not branch >> self.index[user] & 1
                for user in self._readers(self.nodes[i])
            ):
                branch &= ~self.ancestors[i]
        return branch

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that need ``node``'s value, or its shape for something else."""
        for user in node.users:
            if is_shape(user):
                yield from self._readers(user)
            elif not is_effect(user):
                yield user

    def _entries(self, mask: int) -> tuple[fx.Node, ...]:
        """The values from outside that the nodes of ``mask`` read, parameters apart."""
        entries: dict[fx.Node, None] = {}

        def enter(node: fx.Node) -> None:
            for source in node.all_input_nodes:
                if is_shape(source):
                    enter(source)
                elif not mask >> self.index[source] & 1 and source.op != "get_attr":
                    entries[source] = None

        for i in _bits(mask):
            enter(self.nodes[i])
        return tuple(entries)

    def _substantial(self, mask: int) -> bool:
        """Whether there is more to the nodes of ``mask`` than a bit of arithmetic."""
        nodes = [self.nodes[i] for i in _bits(mask)]
        return any(
            n.op == "get_attr" or (n.op == "call_module" and not self.leaf(str(n.target)).light)
            for n in nodes
        )


def _rearranges(node: fx.Node) -> bool:
    return _is_view(node) or node.target in (torch.cat, torch.concat, torch.concatenate)


def _operation(node: fx.Node, swapped: bool) -> Callable[..., torch.Tensor]:
    """The sum as the model wrote it, called with (shortcut, output)."""
    op: Any = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    return (lambda shortcut, output: op(output, shortcut)) if swapped else op
