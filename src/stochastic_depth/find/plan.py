"""What finding says about a model: how each call belongs to its branches. Data only.

A *block* is the innermost module whose call makes all calls of a branch and its sum, and below
which all modules of the branch hang. Its :class:`Plan` says what every call that its forward makes
has to do with its branches. Everything in a plan is a name, a number or a flag, so plans are
copied, pickled and compared without the modules that they describe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from ..branch import Branch, Place
from .batch import Samples

__all__ = ["Findings", "Form", "Gate", "Leaf", "Merge", "Plan", "Precision", "Refused", "only"]


class Leaf(NamedTuple):
    """One leaf of what a call returns.

    ``branch``: a tensor of the branch; ``argument``: a leaf of (args, kwargs), by its number,
    handed on; ``none``: None; ``unread``: a tensor that nobody read; ``value``: a number or string
    that depends on the shapes of now; ``object``: anything else, which nothing of value comes of.
    ``dtype``: of a tensor that was returned under autocast, which asking for its form does not see.
    """

    kind: Literal["branch", "argument", "none", "unread", "value", "object"]
    argument: int = 0
    place: Place | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Gate:
    """One call that a block's forward makes, the n-th of its module.

    Attributes:
        branch: the index in ``Plan.branches`` of the branch that it is part of, or None.
        last: no other call of the branch works on what it returns.
        given: by leaf of (args, kwargs), where the samples are; None for leaves without.
        single: the leaves that were one for all samples, each with the dimension of that one.
        returned: what its result consists of, by leaf.
        structure: how these leaves are nested, with their numbers in their places; None where it
            returns one tensor.
        drops: the class of a DropPath, which the branch's own decision replaces; else empty.
    """

    branch: int | None
    last: bool = False
    given: tuple[Place | None, ...] = ()
    single: tuple[tuple[int, int], ...] = ()
    returned: tuple[Leaf, ...] = ()
    structure: Any = None
    drops: str = ""


# Of a call: the dtype of its first tensor, or this and autocast's; None where it has no tensor.
Precision = torch.dtype | tuple[torch.dtype, torch.dtype] | None


@dataclass
class Plan:
    """What the calls of one block's forward have to do with its branches.

    Attributes:
        branches: of the block, in the order of execution.
        gates: by the name of a module below the block, its calls in their order.
        others: the names of the modules whose calls are met and belong to no branch.
        opened: the names of modules between the block and its gates or sums, whose forwards run as
            a part of the block's.
        dead: the leaves of what the block returns that belong to a branch and that nobody read.
        dtypes: by branch, the dtype of its sum where it is not that of its shortcut.
        precision: of the call in which that was so.
    """

    branches: list[Branch] = field(default_factory=list)
    gates: dict[str, tuple[Gate, ...]] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    opened: frozenset[str] = frozenset()
    dead: frozenset[int] = frozenset()
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    precision: Precision = None


Form = tuple[Any, ...]  # of a call: the types of its arguments, and the values of flags


def only(plan: Plan, branches: Sequence[Branch]) -> Plan:
    """``plan`` as it is where no other branches than these are dropped."""
    kept = [i for i, b in enumerate(plan.branches) if b in branches]
    numbers = {i: k for k, i in enumerate(kept)}
    gates = {
        path: tuple(
            replace(gate, branch=numbers[gate.branch]) if gate.branch in numbers else Gate(None)
            for gate in calls
        )
        for path, calls in plan.gates.items()
    }
    return replace(
        plan,
        branches=[plan.branches[i] for i in kept],
        gates=gates,
        dtypes={numbers[i]: dtype for i, dtype in plan.dtypes.items() if i in numbers},
    )


class Refused(NamedTuple):
    """What looks like a residual branch and cannot be dropped, and why, with what to do."""

    name: str
    reason: str


class Merge(NamedTuple):
    """Where a branch enters what goes on, in a recorded run.

    Attributes:
        node: the number of the sum, or of what else it enters.
        branch: the number of the branch's value.
        plain: it is a sum of two, with the shortcut as the other.
        key: by what the node is found again in another run.
        position: which of the tensors that it is given is the branch's.
    """

    node: int
    branch: int
    plain: bool
    key: Any
    position: int


@dataclass
class Findings:
    """What one look at a model found.

    Attributes:
        branches: in the order of execution.
        plans: by the qualified name of the block, and the form of its call.
        refused: what was found and cannot be dropped.
        unused: existing stochastic depth that is not on a branch, which goes on dropping.
        nodes: by branch, what the run computed for it, for :func:`flop_shares`.
        merges: by branch, where it enters what goes on, for :func:`run_weighed`.
        constants: tensors that the run read and that were there before it, for the same.
        writes: whether the run wrote to parameters.
        samples: what was known of where the inputs have their samples, if that was asked for.
        batched: the dimensions of the inputs that were taken for the samples'.
    """

    branches: list[Branch] = field(default_factory=list)
    plans: dict[str, dict[Form, Plan]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    unused: list[Refused] = field(default_factory=list)
    nodes: dict[Branch, frozenset[int]] = field(default_factory=dict)
    merges: dict[Branch, tuple[Merge, ...]] = field(default_factory=dict)
    constants: list[torch.Tensor] = field(default_factory=list)
    writes: bool = False
    samples: Samples | None = None
    batched: frozenset[int] = frozenset()

    def refuse(self, reasons: Mapping[Branch, str]) -> None:
        """Take branches out, each for its reason."""
        self.refused += [Refused(branch.name, reason) for branch, reason in reasons.items()]
        self.branches = [branch for branch in self.branches if branch not in reasons]
        for plans in self.plans.values():
            plans.update({form: only(plan, self.branches) for form, plan in plans.items()})
