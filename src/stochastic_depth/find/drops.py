"""Stochastic depth that a model has already, recognised by what it does in a run of training.

Whole samples are multiplied by numbers drawn at random, one a sample; or a coin, tossed by
whomever, decides whether something runs. At a rate of 0 there is nothing to be seen: then modules
go by the names that all code bases give them.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..branch import Spot
from .batch import first_samples
from .flow import Flow
from .functions import DIVIDE, MULTIPLY, SUMS
from .meet import record
from .nesting import find_regions
from .plan import Findings, Refused
from .record import Recorder
from .spot import NOT_THE_USERS, RESIDUAL, is_ours, spot
from .state import NORMS

__all__ = ["Drops", "find_drops", "rate_of", "settle_drops", "tell_drops"]

_NAMES = ("DropPath", "StochasticDepth")
_RATES = ("p", "drop_prob", "drop_path_prob", "prob", "drop_rate", "drop_path")
_DRAWN = ("rand", "rand_like", "uniform_", "bernoulli", "bernoulli_")
# What coins give: the number that torch draws, and a seed whose first number is as good as that.
_HEADS, _TAILS = (0.0, 15106), (0.9999, 119706)


@dataclass
class Drops:
    """What was seen.

    Attributes:
        modules: the names of modules that do nothing else.
        products: by the node of ``flow``, the expression in a forward that multiplies samples at
            random.
        coins: where a forward tosses a coin: the module's name and the expression.
        flow: the run of training, where there was one.
    """

    modules: set[str] = field(default_factory=set)
    products: dict[int, Spot] = field(default_factory=dict)
    coins: dict[str, Spot] = field(default_factory=dict)
    flow: Flow | None = None


class _Drawing(Recorder):
    """Also sees what is drawn at random, and by whom."""

    def __init__(self, model: nn.Module, constants: list[Tensor]) -> None:
        super().__init__(model, constants)
        self.products: dict[int, Spot] = {}
        self.coins: dict[int, Spot] = {}
        self.state = _state()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> int:
        self._tossed()
        return super().enter(module, args, kwargs)

    def leave(self, number: int, result: Any) -> None:
        self._tossed()
        super().leave(number, result)

    def _tossed(self) -> None:
        """Whether Python's or NumPy's numbers were drawn since, in the call that goes on."""
        now = _state()
        if now != self.state and self.stack:
            self.coins.setdefault(self.now, spot(2))
        self.state = now

    def _look(self, given: list[Tensor]) -> None:
        super()._look(given)
        for t in given:
            node = self.node(t)
            if node is not None and self.flow.nodes[node].random and self.stack:
                self.coins.setdefault(self.now, spot(3))

    def after(self, name: str, given: list[Tensor], made: list[Tensor], number: int) -> None:
        if (name in MULTIPLY or name in DIVIDE) and len(given) == 2 and self.stack:
            for x, mask in (given, given[::-1]):
                if _is_one_each(x, mask) and self._is_random(self.source(mask), mask.numel()):
                    self.products[number] = spot(3)

    def _is_random(self, node: int, numbers: int) -> bool:
        """Whether it is drawn, or made outside of torch anew, where one number may be constant."""
        seen = self.flow.nodes[node]
        while not seen.random and len(seen.sources) == 1 and not seen.varies:
            seen = self.flow.nodes[seen.sources[0]]
        made = seen.op in ("tensor", "from_numpy", "as_tensor", "asarray")
        if seen.op == "opaque" and self._has_drawn(seen.call):
            return True
        if made and numbers == 1 and not self._has_drawn(seen.call):
            return False
        anew = made or seen.op == "dropout"
        return seen.random or (anew and not seen.varies and not seen.weights)

    def _has_drawn(self, call: int) -> bool:
        """Whether Python's or NumPy's numbers were drawn just now, or in that call."""
        return _state() != self.state or call in self.coins


class _Tossing(Recorder):
    """Has all coins fall on one side, or at least the first of Python and of NumPy."""

    def __init__(self, model: nn.Module, constants: list[Tensor], side: tuple[float, int]) -> None:
        super().__init__(model, constants)
        self.number, self.seed = side

    def inputs(self, args: Any, kwargs: Any) -> None:
        random.seed(self.seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(self.seed)
        super().inputs(args, kwargs)

    def after(self, name: str, given: list[Tensor], made: list[Tensor], number: int) -> None:
        if name in _DRAWN and made[0].numel() == 1:
            made[0].fill_(self.number)


def _is_one_each(x: Tensor, mask: Tensor) -> bool:
    if not x.dim() or mask.dim() > x.dim() or not x.is_floating_point():
        return False
    sizes = [n for n in mask.shape if n != 1]
    return len(sizes) <= 1 and mask.numel() in (1, *x.shape[:2]) and mask.numel() < x.numel()


def _state() -> Any:
    numpy = sys.modules.get("numpy")
    drawn = None
    if numpy is not None and hasattr(numpy, "random"):
        state = numpy.random.get_state()
        drawn = state[2], state[1][0], state[3]
    return random.getstate()[1][-2:], drawn


def find_drops(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], constants: list[Tensor]
) -> Drops:
    """What drops samples or layers of ``model`` in training."""
    drops = Drops({name for name, m in model.named_modules() if _is_named_so(name, m)})
    kinds: set[Any] = {type(m) for name, m in model.named_modules() if name not in drops.modules}
    if not any(map(_may_drop, kinds)):
        return drops

    def run(recorder: Any, inputs: Any) -> Flow:
        args, kwargs = inputs
        return record(model, args, kwargs, True, recorder, constants, frozen=NORMS)

    # Batch normalisation tosses nothing, and takes several times as long in training.
    few = first_samples((args, kwargs), 2)  # which tell as much as more
    for inputs in [(args, kwargs)] if few is None else [few, (args, kwargs)]:
        try:
            flow = drops.flow = run(_Drawing, inputs)
            break
        except Exception:  # of any kind: it does not train on these
            continue
    else:
        return drops
    for node, where in flow.watch.products.items():
        call = flow.calls[flow.nodes[node].call]
        if _only_drops(call.module):
            drops.modules.add(call.name)
        else:
            drops.products[node] = where
    for c, where in flow.watch.coins.items():
        if is_ours(flow.calls[c].module):
            continue
        if _only_drops(flow.calls[c].module):
            drops.modules.add(flow.calls[c].name)
        else:
            drops.coins[flow.calls[c].name] = where
    if drops.coins:
        try:
            sides = [run(lambda m, c, s=s: _Tossing(m, c, s), inputs) for s in (_HEADS, _TAILS)]
        except Exception:  # of any kind: it does not stand such numbers
            return drops
        for name in list(drops.coins):
            if _does(sides[0], name) == _does(sides[1], name):
                del drops.coins[name]
    return drops


def _does(flow: Flow, name: str) -> Counter[str]:
    """What the forward of a module calls, and how often it adds."""
    own = {c for c, call in enumerate(flow.calls) if call.name == name}
    done = Counter(call.name for call in flow.calls if call.parent in own)
    done["+"] = sum(n.call in own and n.op in SUMS for n in flow.nodes)
    return done


def _only_drops(module: nn.Module) -> bool:
    bare = next(module.children(), None) is None and next(module.parameters(), None) is None
    return bare and not isinstance(module, nn.modules.dropout._DropoutNd)


def rate_of(module: nn.Module) -> float | None:
    """The rate that a drop module has, where it says so."""
    for name in _RATES:
        rate: Any = getattr(module, name, None)
        if isinstance(rate, int | float) and not isinstance(rate, bool):
            return float(rate)
    return None


def _is_named_so(name: str, module: nn.Module) -> bool:
    """Whether it goes by the name of a DropPath; timm has an Identity where the rate is 0."""
    if name.rpartition(".")[2].startswith("drop_path"):
        return _only_drops(module)
    named = type(module).__name__.endswith(_NAMES) and next(module.children(), None) is None
    return named and rate_of(module) is not None


@cache
def _may_drop(kind: type) -> bool:
    """Whether the code of a class asks if it is in training, or draws numbers."""
    asked = {"training", "rand", "random", "bernoulli", "bernoulli_", "rand_like"}
    codes = (
        getattr(method, "__code__", None)
        for base in kind.__mro__
        if not base.__module__.startswith(NOT_THE_USERS)
        for method in vars(base).values()
    )
    return any(code is not None and not asked.isdisjoint(code.co_names) for code in codes)


def settle_drops(model: nn.Module, findings: Findings, drops: Drops, flow: Flow) -> None:
    """Leave branches alone that their forward drops by itself, and tell what goes on dropping."""
    own = _dropped_in_frames(drops)
    left = {}
    for branch in findings.branches:
        found = next((own[s] for s in (*branch.sums, *branch.joins) if s in own), None)
        if any(s.file == RESIDUAL for s in branch.sums):
            left[branch] = "residual() drops it by itself, at the p that it is given there"
        elif found is not None:
            left[branch] = (
                f"the model drops it by itself, {_told(found)}, and it would be dropped twice: set "
                "that rate to 0"
            )
    findings.refuse(left)
    tell_drops(model, findings, drops, flow)


def tell_drops(
    model: nn.Module, findings: Findings, drops: Drops, flow: Flow, products: bool = False
) -> None:
    """Tell which modules go on dropping, who tosses coins, and who multiplies samples if asked."""
    called = {call.name for call in flow.calls}
    taken = {name for branch in findings.branches for name in branch.existing}
    for name in sorted((drops.modules & called) - taken):
        module = model.get_submodule(name)
        if not isinstance(module, nn.Identity) and rate_of(module) != 0.0:
            reason = "it is not on a branch that was found, and goes on dropping"
            findings.unused.append(Refused(name, reason))
    own = [
        (n, where, "tosses a coin of its own (layerdrop, say)") for n, where in drops.coins.items()
    ]
    if products and drops.flow is not None:
        names = {n: drops.flow.calls[drops.flow.nodes[n].call].name for n in drops.products}
        own += [(names[n], where, "drops by itself") for n, where in drops.products.items()]
    for name, where, what in dict.fromkeys(own):
        reason = f"it {what}, {_told(where)}, and goes on dropping: set that rate to 0"
        findings.unused.append(Refused(name, reason))


def _told(where: Spot) -> str:
    return f"in {where.function} (line {where.line} of {where.file})"


def _dropped_in_frames(drops: Drops) -> dict[Spot, Spot]:
    """By the expression of the sum, the one that drops the branch before it."""
    flow = drops.flow
    if flow is None or not drops.products:
        return {}
    found: dict[Spot, Spot] = {}
    _, regions = find_regions(flow)
    for region in regions:
        inside = [n for n in drops.products if n in region.nodes]
        for merge in region.merges:
            where = flow.nodes[merge.node].spot
            if inside and where is not None:
                found[where] = drops.products[inside[-1]]
    return found
