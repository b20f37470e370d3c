"""Find the residual branches of a model.

capture (trace a block) → regions (graph → residual regions) → program (regions → functions);
this file asks every block of a model and settles which of nested regions are the branches.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .batches import Rows, batch_dim
from .capture import Call, CaptureError, Trace, static_call
from .existing import existing_rate, is_drop_call, is_drop_module, layerdrop
from .graphs import may_hold_sums
from .handlers import further_output
from .inline import capture_inlined
from .program import Program, build_program
from .regions import Kind, Leaf, NotResidual, Refusal, Region, find_regions
from .whole import WHOLE, whole_program, whole_rows

__all__ = [
    "CaptureError",
    "Findings",
    "Found",
    "NotResidual",
    "Refused",
    "find_branches",
    "make_program",
    "prefixes",
    "whole_blocks",
]


@dataclass(frozen=True)
class Found:
    """A residual branch: its block (qualified name), its label there, and what it runs."""

    block: str
    label: str
    kind: Kind
    modules: tuple[str, ...]  # relative to the block
    existing: tuple[str, ...]  # the drop modules among and inside them, which our coin replaces
    rows_known: bool  # whether every tensor that enters it certainly has the batch's rows
    batch_dim: int  # of the shortcut
    replaces: bool = False  # whether it dropped before, by such a module or by a function


@dataclass(frozen=True)
class Refused:
    """Something that may be a residual branch and is not dropped, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """The branches of a model in the order of its modules, and what was refused.

    By block, ``labels`` are those of all its residual sums, also of those that are part of a
    branch, and ``calls`` is how it was taken to be called.
    """

    branches: list[Found]
    refused: list[Refused]
    labels: dict[str, set[str]]
    calls: dict[str, Call]


def find_branches(model: nn.Module, calls: Mapping[str, Call] | None = None) -> Findings:
    """The residual branches of ``model``.

    Args:
        model: the model; nothing on it changes.
        calls: how each block is called, by name, where it is known. Other blocks are traced
            with a value for each argument without a default.
    """
    from ..layer import StochasticDepth  # the layer is above us; only its type is asked for

    candidates: list[_Candidate] = []
    called: dict[str, Call] = {}
    refused: list[Refused] = []
    wrapped: list[str] = []
    for name, block in model.named_modules():
        if isinstance(block, StochasticDepth):
            wrapped.append(f"{name}." if name else "")
        if name.startswith(tuple(wrapped)) or not may_hold_sums(block):
            continue
        try:
            call = called[name] = (calls or {}).get(name) or static_call(block)
            trace = capture_inlined(block, call, training=True)
            labelled, refusals = _analyse(block, call, trace)
        except (CaptureError, NotResidual) as error:
            refused.append(Refused(name, str(error)))
            continue
        candidates += [_Candidate(name, block, label, region) for label, region in labelled]
        refused += [Refused(_join(name, next(iter(r.modules), "")), r.reason) for r in refusals]
    kept = _settle_nesting(candidates, refused)
    branches = [c.found() for c in candidates if c in kept]
    inside = _Inside(branches)
    refused = [r for r in refused if r.name not in inside]
    refused += _left_alone(model, branches, wrapped)
    labels: dict[str, set[str]] = defaultdict(set)
    for c in candidates:
        labels[c.name].add(c.label)
    return Findings(branches, refused, dict(labels), called)


class _Inside:
    """The names of what lies inside of branches: what is refused there is dropped with them."""

    def __init__(self, branches: list[Found]) -> None:
        self.paths = tuple(_join(f.block, m) + "." for f in branches for m in f.modules)

    def __contains__(self, name: str) -> bool:
        return f"{name}.".startswith(self.paths)


def _left_alone(model: nn.Module, branches: list[Found], wrapped: list[str]) -> Iterator[Refused]:
    """What drops in the model by itself, and is not taken over."""
    taken = {_join(found.block, drop) for found in branches for drop in found.existing}
    for name, module in model.named_modules():
        drops = is_drop_module(module) and existing_rate(module)
        if drops and name not in taken and not name.startswith(tuple(wrapped)):
            yield Refused(name, "it masks what is no residual branch, and goes on doing so")
        if rate := layerdrop(module):
            reason = f"its layerdrop of {rate:g} leaves out layers by itself, beside what we drop"
            yield Refused(name, f"{reason}; set it to 0 in the model's configuration")


def whole_blocks(
    model: nn.Module, names: Iterable[str], calls: Mapping[str, Call] | None = None
) -> Findings:
    """Blocks as branches that are dropped as a whole.

    Args:
        model: the model.
        names: the qualified names of the blocks.
        calls: how each block is called, by name, where it is known.
    """
    found: list[Found] = []
    called: dict[str, Call] = {}
    for name in names:
        block = model.get_submodule(name)
        call = called[name] = (calls or {}).get(name) or static_call(block)
        children = tuple(child for child, _ in block.named_children())
        known = whole_rows(block, call) is not None
        found.append(Found(name, WHOLE, "block", children, (), known, batch_dim(block)))
    return Findings(found, [], {name: {WHOLE} for name in called}, called)


@dataclass(frozen=True)
class Made:
    """A program, the labels of all residual sums in its block, and reasons for those refused."""

    program: Program
    labels: set[str]
    refused: dict[str, str]


def make_program(block: nn.Module, call: Call, training: bool, labels: set[str]) -> Made:
    """The program of ``block`` for one form of call.

    Args:
        block: the block.
        call: how it is called.
        training: whether it is in training mode.
        labels: the branches to take out; others stay where they are.

    Raises:
        CaptureError, NotResidual: it cannot be traced when called like this.
    """
    if WHOLE in labels:
        return Made(whole_program(block, call), {WHOLE}, {})
    trace = capture_inlined(block, call, training)
    labelled, refusals = _analyse(block, call, trace)
    chosen = [(label, region) for label, region in labelled if label in labels]
    program = build_program(trace, chosen, lambda node: is_drop_call(node, block))
    refused = {_largest(block, r.modules): r.reason for r in refusals}
    return Made(program, {label for label, _ in labelled}, refused)


def _analyse(
    block: nn.Module, call: Call, trace: Trace
) -> tuple[list[tuple[str, Region]], list[Refusal]]:
    known: dict[str, Any] = {"batch_dim": batch_dim(block)}
    if trace.examples is not None:
        known["example"] = trace.examples.of
        if call.row_dims is not None:
            known["rows"] = Rows(block, call, trace.examples).of
    try:
        regions, refusals = find_regions(
            trace.graph,
            lambda path: _leaf(block.get_submodule(path)),
            objects=trace.objects,
            declared=lambda part: _declared(block, trace, part),
            **known,
        )
    except NotResidual as error:
        error.detail = trace.detail
        raise
    return list(_label(block, regions)), refusals


def _declared(block: nn.Module, trace: Trace, part: fx.Node) -> Any:
    call = part.all_input_nodes[0]

    def length() -> int:
        if trace.examples is None:
            raise LookupError("the number of outputs is not known")
        return len(trace.examples.of(call))

    return further_output(block.get_submodule(str(call.target)), part, length)


_LIGHT = {f"torch.nn.modules.{kind}" for kind in ("activation", "dropout")}


def _leaf(module: nn.Module) -> Leaf:
    # A gain for each channel may have four dimensions, but is no matrix; nor is what a depthwise
    # convolution does to each.
    matrices = [p for p in module.parameters() if p.dim() > 1 and p.numel() > max(p.shape)]
    depthwise = sum(p.dim() > 2 and p.shape[1] == 1 for p in matrices)
    in_place = getattr(module, "inplace", False) is True and next(module.children(), None) is None
    lookup = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    parameters = next(module.parameters(), None) is not None
    light = is_drop_module(module) or (type(module).__module__ in _LIGHT and not parameters)
    weights = len(matrices) - depthwise, depthwise
    return Leaf(weights, in_place, isinstance(module, nn.Identity), lookup, parameters, light)


def _label(block: nn.Module, regions: list[Region]) -> Iterator[tuple[str, Region]]:
    """Name each region after the child that holds most of its parameters."""
    seen: dict[str, int] = defaultdict(int)
    for region in regions:
        label = _largest(block, region.modules)
        seen[label] += 1
        yield label if seen[label] == 1 else f"{label}#{seen[label]}", region


def _largest(block: nn.Module, modules: tuple[str, ...]) -> str:
    def size(path: str) -> int:
        return sum(p.numel() for p in block.get_submodule(path).parameters())

    return max(modules, key=size, default="branch")


@dataclass(frozen=True, eq=False)
class _Candidate:
    name: str
    block: nn.Module
    label: str
    region: Region

    def found(self) -> Found:
        modules = self.region.modules
        existing = tuple(
            f"{m}.{name}" if name else m
            for m in modules
            for name, child in self.block.get_submodule(m).named_modules()
            if is_drop_module(child)
        )
        return Found(
            self.name,
            self.label,
            self.region.kind,
            modules,
            existing,
            self.region.rows is not None,
            batch_dim(self.block),
            bool(existing) or any(is_drop_call(node, self.block) for node in self.region.nodes),
        )


def _settle_nesting(candidates: list[_Candidate], refused: list[Refused]) -> set[_Candidate]:
    """Keep the outermost of nested regions, unless it spans several residual sums itself.

    x + f(x) inside a branch is a part of that branch; but a sum around a stack of residual
    blocks is a long skip, and the blocks are the branches. Where the model drops the outer one by
    itself, its author has decided: that is the branch.
    """
    below: dict[str, set[_Candidate]] = defaultdict(set)  # by the name of every enclosing module
    kept: set[_Candidate] = set()
    deepest_first = sorted(candidates, key=lambda c: -len(_path(c.name)))
    for outer in deepest_first:
        inner = {c for c in below[outer.name] if c.region.merge in outer.region.nodes}
        for path in outer.region.modules:
            inner |= below[_join(outer.name, path)]
        several = sum(c.region.kind == "identity" for c in inner) >= 2
        if several and not _is_dropped_by_model(outer, inner):
            reason = f"a long skip around {len(inner)} residual branches, which are dropped instead"
            refused.append(Refused(f"{outer.name}:{outer.label}", reason))
            continue
        for c in inner:
            kept.remove(c)
            for prefix in prefixes(c.name):
                below[prefix].discard(c)
        kept.add(outer)
        for prefix in prefixes(outer.name):
            below[prefix].add(outer)
    return kept


def _is_dropped_by_model(outer: _Candidate, inner: set[_Candidate]) -> bool:
    """Whether there is a drop module or function in ``outer`` that is none of the ``inner``'s.

    Where its rate is 0, timm puts an Identity there, by the same name.
    """
    nodes = set(outer.region.nodes).difference(*(c.region.nodes for c in inner))
    named = (n for n in nodes if n.op == "call_module" and "drop_path" in str(n.target))
    return any(named) or any(is_drop_call(n, outer.block) for n in nodes)


def _path(name: str) -> list[str]:
    return name.split(".") if name else []


def prefixes(name: str) -> Iterator[str]:
    """The names of the modules around the one of this name, and its own."""
    path = _path(name)
    return (".".join(path[:i]) for i in range(len(path) + 1))


def _join(block: str, child: str) -> str:
    return f"{block}.{child}" if block and child else block or child
