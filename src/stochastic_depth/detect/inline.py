"""Children whose work has to be seen: those that add what they are handed by their parent.

``self.output(self.dense(x), x)``, where ``output`` adds its second argument to what it computes
from the first, is a residual sum that neither forward shows alone (BERT, BLOOM, DLA).
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import fx, nn

from .capture import Call, CaptureError, Trace, capture, read_call
from .graphs import is_shape, may_hold_sums, sum_of

__all__ = ["capture_inlined"]


def capture_inlined(module: nn.Module, call: Call, training: bool) -> Trace:
    """Capture ``module`` with such descendants traced too.

    Raises:
        CaptureError: the forward cannot be traced faithfully.
    """
    inlined: frozenset[str] = frozenset()
    while True:
        trace = capture(module, call, training, inlined)
        more = {str(n.target) for n in _handed_sums(module, trace)}
        if not more:
            return trace
        inlined |= more


def _handed_sums(module: nn.Module, trace: Trace) -> Iterator[fx.Node]:
    """The calls of children that add one of their arguments to something made of another.

    The two must have something in common: a mask that is added to attention scores is no shortcut.
    """
    origins = _origins(trace.graph)
    for node in trace.graph.nodes:
        if node.op != "call_module" or len(_values(node)) < 2:
            continue
        child = module.get_submodule(str(node.target))
        if may_hold_sums(child) and _adds_a_given(child, node, trace, origins):
            yield node


def _values(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not is_shape(n) and n.op != "get_attr"]


def _adds_a_given(
    child: nn.Module, node: fx.Node, trace: Trace, origins: dict[fx.Node, frozenset[fx.Node]]
) -> bool:
    call, values = read_call(tuple(node.args), dict(node.kwargs))
    call = replace(call, types=tuple(object for _ in values))
    try:
        inner = _capture_child(child, call, values, trace)
    except CaptureError:
        return False
    inner_origins = _origins(inner.graph)
    argument = dict(
        zip((n for n in inner.graph.nodes if n.op == "placeholder"), values, strict=True)
    )
    for candidate in inner.graph.nodes:
        sides = sum_of(candidate)
        if sides is None:
            continue
        for given, computed in (sides[:2], sides[1::-1]):
            if given.op != "placeholder" or given in inner_origins[computed]:
                continue
            shared = origins[argument[given]]
            if any(origins[argument[n]] & shared for n in inner_origins[computed]):
                return True
    return False


def _capture_child(child: nn.Module, call: Call, values: list[fx.Node], trace: Trace) -> Trace:
    """Capture ``child``, with examples of its arguments only where it takes them."""
    try:
        return capture(child, call, child.training)
    except CaptureError:
        if trace.examples is None:
            raise
    try:
        call = call.like([trace.examples.of(value) for value in values])
    except Exception as error:
        raise CaptureError("an argument is not known") from error
    return capture(child, call, child.training)


def _origins(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """The placeholders that each node is computed from."""
    origins: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        sources = [origins[n] for n in node.all_input_nodes if not is_shape(n)]
        own = frozenset([node]) if node.op == "placeholder" else frozenset[fx.Node]()
        origins[node] = own.union(*sources)
    return origins
