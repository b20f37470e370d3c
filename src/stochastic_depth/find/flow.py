"""What one run of a model did: a flat list of values, and the calls of modules as its intervals."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..branch import Spot
from .plan import Form, Precision

__all__ = ["Call", "Flow", "Function", "Key", "Node"]

Function = Literal["", "checkpoint", "custom"]  # that of reentrant checkpointing, or another
Key = tuple[int, str, int]  # of the call; a function; how many of its values were made before


@dataclass(slots=True)
class Node:
    """A value: an input, a parameter, or what a torch function made or wrote.

    Attributes:
        op: the name of the function; ``"input"``, ``"parameter"``, ``"buffer"``, ``"constant"``;
            ``"opaque"`` where it comes from work that was not seen.
        call: the innermost call that it was made in, -1 for what was there before.
        sources: the values that it was made from.
        parts: its positional tensors, in order.
        varies: it depends on an input.
        weights: it is a parameter, or made of parameters alone.
        random: it is made of random numbers alone.
        factor: ``alpha=`` of a sum.
        function: the custom autograd.Function that it was made in, if any.
        name: of a parameter or buffer.
        key: by what it is found again in another run, which may do a little more or less elsewhere:
            the call that it is made in, and how many of its kind were made there before.
    """

    op: str
    call: int
    sources: tuple[int, ...]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    parts: tuple[int, ...] = ()
    varies: bool = False
    weights: bool = False
    random: bool = False
    factor: float = 1.0
    function: Function = ""
    spot: Spot | None = None
    name: str = ""
    key: Key | None = None

    @property
    def is_continuous(self) -> bool:
        """Whether it is of real or complex numbers."""
        return self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)


@dataclass(slots=True)
class Call:
    """One call of a module: the nodes from ``start`` to before ``end``.

    Attributes:
        name: the module's qualified name; of several, one below the call that it is part of.
        form: of the call.
        given: by leaf of (args, kwargs), the node of a tensor, or None.
        made: by leaf of the result, the node of a tensor, or None.
        kinds: by leaf of the result, whether it is a tensor, None, a plain value or something else.
        structure: the result with the numbers of its leaves in their places; None for a tensor.
        key: by what it is found again in another run.
        writes: the type of what it is given and changes: a cache.
        owner: the outermost call that was given this, or whose module keeps it, else the call.
        put: the nodes of tensors that it has put there.
        function: the custom autograd.Function that makes it, if one does.
        precision: of the call.
    """

    name: str
    module: nn.Module
    parent: int
    start: int
    form: Form
    given: list[int | None]
    end: int = -1
    made: list[int | None] = field(default_factory=list)
    kinds: list[Literal["tensor", "none", "value", "object"]] = field(default_factory=list)
    structure: Any = None
    key: int = 0
    writes: str = ""
    owner: int = -1
    put: set[int | None] = field(default_factory=set)
    function: Function = ""
    precision: Precision = None


@dataclass
class Flow:
    """A recorded run.

    Attributes:
        nodes: the values, in the order of execution.
        calls: of modules; the first is the model's own.
        kept: the nodes of tensors that outlived the run (outputs, caches).
        held: the nodes of tensors that modules keep as attributes, and the names of these modules.
        looks: values that Python looked at, and the call in which it did.
        talks: the innermost calls in which ranks talked to each other.
        unknown: tensors that were read and not seen being made.
        constants: of these, the ones that were there before.
        writes: whether it wrote to parameters.
        result: what the model returned.
        watch: what recorded it.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    held: dict[int, str] = field(default_factory=dict)
    looks: list[tuple[int, int]] = field(default_factory=list)
    talks: set[int] = field(default_factory=set)
    unknown: list[Tensor] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    writes: bool = False
    result: Any = None
    watch: Any = None

    def around(self, call: int) -> Iterator[int]:
        """The call and those around it, from the inside."""
        while call >= 0:
            yield call
            call = self.calls[call].parent

    def talks_within(self, calls: Iterable[int], alone: Iterable[int] = ()) -> bool:
        """Whether ranks talk in one of these calls, or in ``alone``, in no call that it makes."""
        around = {c for call in self.talks for c in self.around(call)}
        return not around.isdisjoint(calls) or not self.talks.isdisjoint(alone)

    def is_read_after(self, n: int, call: int) -> bool:
        """Whether anybody needs a value once a call is over."""
        return n in self.kept or any(r >= self.calls[call].end for r in self.readers[n])

    def index(self) -> None:
        """Work out who reads what, once the run is over."""
        nodes = self.nodes
        live = bytearray(len(nodes))
        for i in self.kept:
            live[i] = 1
        for i in range(len(nodes) - 1, -1, -1):
            if live[i]:
                for source in nodes[i].sources:
                    if nodes[source].varies:
                        live[source] = 1
        self.live = live
        self.readers: list[list[int]] = [[] for _ in nodes]
        self.last_read = [-1] * len(nodes)  # by anybody, also where nothing comes of it
        for i, node in enumerate(nodes):
            for source in node.sources:
                self.last_read[source] = i
                if live[i]:
                    self.readers[source].append(i)
        self.count = [0]  # of live nodes before each
        for flag in live:
            self.count.append(self.count[-1] + flag)
        self._find_exports()

    def _find_exports(self) -> None:
        """What a call computes of constants alone and somebody uses after it: a position bias."""
        self.exports: dict[int, set[int]] = {}  # the users, by call
        nodes, used = self.nodes, bytearray(self.live)
        self.used_until = [-1] * len(nodes)
        for i in range(len(nodes) - 1, -1, -1):
            if not used[i]:
                continue
            for source in nodes[i].sources:
                node = nodes[source]
                if node.varies or node.call < 0:
                    continue
                used[source] = 1
                self.used_until[source] = max(self.used_until[source], i)
                for call in self.around(node.call):
                    if i < self.calls[call].end:
                        break
                    self.exports.setdefault(call, set()).add(i)
