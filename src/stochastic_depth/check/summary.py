"""``summary``: what is dropped, how often, what it saves, and what could not be dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from ..applied import branches, sites
from ..branch import Branch, block_of, is_below
from ..calls import call_of
from ..drop.balance import Way, cost_classes, slowest
from ..drop.collectives import own_parameters
from ..drop.decide import subset_size
from ..drop.layer import StochasticDepth
from ..drop.merging import Owner
from ..find import find, find_blocks, flop_shares, guess_inputs
from ..find.blocks import WHOLE
from ..find.plan import Findings, Refused
from ..tables import table_html
from .picture import picture_of

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True)
class Row:
    """A branch in the summary; shares are of the whole model.

    In ``"subset"`` mode, ``p`` is the rate that takes effect on a batch like the example:
    1 - k/B, where k of its B samples are kept. ``decided`` and ``dropped`` count the decisions of
    training so far.
    """

    name: str
    kind: str
    p: float
    parameters: float
    flops: float | None
    decided: int = 0
    dropped: int = 0


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` found; prints as a table.

    Attributes:
        rows: the branches in the order of execution.
        refused: (name, reason) of what was found but can't be dropped.
        unused: names of branches that could be dropped but aren't.
        ranks: how many ranks ``slowest`` is for.
        slowest: the expected share of the model's FLOPs that the slowest of the ranks executes in a
            training step, by how decisions are drawn: ``"independent"``, ``"shared"`` by all ranks,
            ``"balanced"``. Empty for one rank, without FLOPs, or in other modes than ``"batch"``.
    """

    rows: tuple[Row, ...]
    refused: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]
    ranks: int = 1
    slowest: Mapping[str, float] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """The number of droppable branches."""
        return len(self.rows)

    @property
    def expected_depth(self) -> float:
        """The expected number of them that run in a training step: the sum of 1-p."""
        return sum(1.0 - row.p for row in self.rows)

    @property
    def compute_kept(self) -> float | None:
        """The expected share of the model's FLOPs in training, if they were measured."""
        if any(row.flops is None for row in self.rows):
            return None
        return 1.0 - sum(row.p * (row.flops or 0.0) for row in self.rows)

    def _table(self) -> list[tuple[str, ...]]:
        table: list[tuple[str, ...]] = [("branch", "kind", "p", "params", "FLOPs")]
        for row in self.rows:
            flops = "-" if row.flops is None else f"{row.flops:.1%}"
            table.append((row.name, row.kind, f"{row.p:.3f}", f"{row.parameters:.1%}", flops))
        return table

    def _notes(self) -> list[str]:
        kept = "not measured: give example_inputs"
        if self.compute_kept is not None:
            kept = f"{self.compute_kept:.1%}"
        lines = [
            f"expected depth  {self.expected_depth:.2f} of {self.depth} branches",
            f"compute kept    {kept}",
        ]
        if self.slowest:
            shares = ", ".join(f"{share:.1%} {draw}" for draw, share in self.slowest.items())
            lines.append(f"slowest of {self.ranks:<5}{shares}")
        if self.unused:
            lines.append("not dropped     " + ", ".join(self.unused))
        lines += [f"skipped         {n or '(the model)'}: {reason}" for n, reason in self.refused]
        return lines

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:], rule, *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return table_html(self._table(), self._notes())

    def plot(self) -> Any:
        """Draw the branches in the order in which they run, with matplotlib.

        Each has its rate, the share of its decisions that have dropped it in training so far, and
        its share of the model's FLOPs, if example inputs were given.

        Returns:
            A ``matplotlib.figure.Figure``: notebooks show it, and ``figure.savefig("model.png")``
            writes it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> import torchvision, stochastic_depth as sd
            >>> model = sd.apply(torchvision.models.resnet18(), p=0.2)
            >>> figure = sd.summary(model).plot()
        """
        kept = "" if self.compute_kept is None else f"; compute kept {self.compute_kept:.1%}"
        return picture_of(
            self.rows, f"expected depth {self.expected_depth:.2f} of {self.depth} branches{kept}"
        )


def summary(model: nn.Module, example_inputs: Any = None, *, ranks: int = 1) -> Summary:
    """What stochastic depth does to ``model``, as a table.

    The branches are those that :func:`stochastic_depth.apply` set up. The table also lists what
    could be dropped and is not, and what was found and skipped, with the reason.

    Args:
        model: a module, with or without stochastic depth.
        example_inputs: what the model is called with (a tensor, a tuple of arguments or a dict of
            keywords). FLOPs are measured on them, in evaluation; None leaves them out. FLOPs
            are what :mod:`torch.utils.flop_counter` counts: matrix products, convolutions and
            attention.
        ranks: also tell what the slowest of this many ranks executes in a step, with these rates.

    Raises:
        ValueError: the model fails on ``example_inputs``; ``ranks`` is below 1.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), p=0.5)
        >>> result = sd.summary(model, torch.zeros(1, 3, 64, 64), ranks=8)
        >>> print(f"{result.expected_depth} of {result.depth}, {result.compute_kept:.2f}")
        5.75 of 8, 0.74
        >>> print({draw: round(share, 2) for draw, share in result.slowest.items()})
        {'independent': 0.93, 'shared': 0.74, 'balanced': 0.77}
    """
    if ranks < 1:
        raise ValueError(f"ranks is how many take part in a step, at least 1, got {ranks!r}")
    applied = branches(model)
    owners: dict[Branch, Owner] = {
        branch: site for site in sites(model) for branch in site.branches
    }
    owners |= {m.branch: m for m in model.modules() if isinstance(m, StochasticDepth)}
    shares: dict[str, float] = {}
    size = 0
    if example_inputs is not None:
        args, kwargs = call_of(example_inputs)
        findings = _look(model, args, kwargs, applied)
        shares = {b.name: share for b, share in flop_shares(model, args, kwargs, findings).items()}
        size = _size(args, kwargs)
    else:
        findings = _known(model)
    total = max(sum(p.numel() for p in model.parameters()), 1)
    rows = []
    for branch in applied:
        owner = owners[branch]
        flops = None
        if example_inputs is not None:  # a wrapper is found as a block
            flops = shares.get(branch.name, shares.get(f"{branch.name}:{WHOLE}", 0.0))
        count = sum(p.numel() for p in own_parameters(branch, owner))
        share, p = count / total, _rate(branch, size)
        counts = branch.decided, branch.dropped
        rows.append(Row(branch.name, branch.kind, p, share, flops, *counts))
    names = {branch.name for branch in applied}
    blocks = [block_of(b) for b in applied if b.kind == "block"]
    free = [b.name for b in findings.branches if b.name not in names and not _is_in(b, blocks)]
    refused = [r for r in (*findings.refused, *findings.unused) if not _is_in(r, blocks)]
    in_batch = all(branch.mode == "batch" for branch in applied)
    return Summary(
        tuple(rows),
        tuple((r.name, r.reason) for r in refused),
        tuple(free),
        ranks,
        _slowest(rows, ranks) if in_batch and ranks > 1 and example_inputs is not None else {},
    )


def _slowest(rows: list[Row], ranks: int) -> dict[str, float]:
    """What the slowest rank executes of the model, by how decisions are drawn."""
    rates, costs = [row.p for row in rows], [row.flops or 0.0 for row in rows]
    classes = cost_classes([row.parameters for row in rows])  # as balanced decisions have them
    executed = {way: slowest(rates, costs, ranks, way, classes=classes) for way in get_args(Way)}
    return {way: 1.0 - sum(costs) * (1.0 - share) for way, share in executed.items()}


def _is_in(found: Branch | Refused, blocks: list[str]) -> bool:
    """Whether it is in one of the blocks that are dropped as a whole."""
    return any(is_below(block_of(found), block) for block in blocks)


def _look(model: nn.Module, args: Any, kwargs: Any, applied: list[Branch]) -> Findings:
    findings = find(model, args, kwargs, samples=None)
    whole = [block_of(b) for b in applied if b.kind == "block" and b.modules]
    if whole:
        extra = find_blocks(model, args, kwargs, whole, samples=None)
        findings.nodes |= extra.nodes
    return findings


def _known(model: nn.Module) -> Findings:
    """What was found when stochastic depth was applied, or is found on inputs that are made up."""
    for site in sites(model):
        return site.findings
    guess = guess_inputs(model)
    return Findings() if guess is None else find(model, *guess, samples=None)


def _size(args: Any, kwargs: Any) -> int:
    shapes: list[Any] = [getattr(x, "shape", ()) for x in (*args, *kwargs.values())]
    return next((int(shape[0]) for shape in shapes if len(shape)), 0)


def _rate(branch: Branch, size: int) -> float:
    if branch.mode != "subset" or not size:
        return branch.p
    return 1.0 - subset_size(size, branch.p) / size
