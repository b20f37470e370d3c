"""How much of a model's work each branch is: FLOPs, counted in one run."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..branch import Branch
from .flow import Flow, Node
from .meet import record
from .plan import Findings
from .record import Recorder

__all__ = ["FlopCounter", "counting", "flop_shares"]


class FlopCounter(FlopCounterMode):
    """Counts FLOPs for the whole and not by module, for which it would need hooks.

    These fail where a module is given a parameter, as CaiT's are given the class token.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.mod_tracker.__exit__()  # type: ignore[no-untyped-call]
        return self


@contextmanager
def counting() -> Iterator[FlopCounter]:
    """Count FLOPs, with attention done in steps: fused, on a CPU it is not counted at all."""
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


class _Counting(Recorder):
    """Notes how many FLOPs its run had taken when each value was made."""

    def __init__(
        self, counted: Callable[[], int], model: nn.Module, constants: list[Tensor]
    ) -> None:
        self.counted, self.earlier = counted, counted()  # of a run that came to nothing
        self.flops: list[int] = []
        super().__init__(model, constants)

    def total(self) -> int:
        return self.counted() - self.earlier

    def _add(self, node: Node, t: Any) -> int:
        number = super()._add(node, t)
        made = node.sources or not self.flops  # what is only read is named after it was read
        self.flops.append(self.total() if made else self.flops[-1])
        return number


def flop_shares(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    findings: Findings,
    modules: Mapping[Branch, Collection[nn.Module]],
) -> dict[Branch, float]:
    """The share of one forward's FLOPs that each branch has, in evaluation.

    FLOPs are what :mod:`torch.utils.flop_counter` counts: matrix products, convolutions and
    attention. The model is called as it was when ``findings`` were made; ``modules`` are what other
    branches call.
    """
    constants = findings.constants
    with counting() as counter:
        recorder = partial(_Counting, counter.get_total_flops)
        counted = record(model, args, kwargs, False, recorder, constants=constants)
    # A model may do more for attention in steps, so values are told by their keys.
    until = dict(zip([node.key for node in counted.nodes], counted.watch.flops, strict=True))
    made, before = [], 0
    flow = record(model, args, kwargs, False, constants=constants)
    for node in flow.nodes:
        now = max(until.get(node.key, before), before)
        made.append(now - before)
        before = now
    total = max(counted.watch.total(), 1)
    computed = {branch: _computed(flow, nodes) for branch, nodes in findings.nodes.items()}
    for branch, own in modules.items():
        calls = [range(call.start, call.end) for call in flow.calls if call.module in own]
        computed[branch] = set().union(*calls)
    return {branch: sum(made[i] for i in nodes) / total for branch, nodes in computed.items()}


def _computed(flow: Flow, nodes: frozenset[int]) -> set[int]:
    """``nodes``, and what the calls that make no others compute of constants: a position bias."""
    order = sorted(i for i in nodes if i < len(flow.nodes))
    computed = set(order)
    for call in {flow.nodes[i].call for i in order}:
        for outer in flow.around(call):
            start, end = flow.calls[outer].start, flow.calls[outer].end
            own = bisect_left(order, end) - bisect_left(order, start)
            if own != flow.count[end] - flow.count[start]:
                break
            computed.update(range(start, end))
    return computed
