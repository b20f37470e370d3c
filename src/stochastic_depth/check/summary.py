"""``summary``: what is dropped, how often, what it saves, and what could not be dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import nn

from ..applied import branches, names_in, owners, sites
from ..branch import Branch, block_of, is_below, name_in_model
from ..drop.balance import Way, chances_to_run, cost_classes, slowest
from ..drop.collectives import own_parameters
from ..drop.force import plain
from ..drop.layer import StochasticDepth
from ..drop.site import Site
from ..find import find, flop_shares, guess_inputs
from ..find.plan import Findings, Refused
from ..options import call_of
from ..tables import table_html
from .measured import projection_shares, rates_in_effect
from .picture import picture_of

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True)
class Row:
    """A branch in the summary; shares are of the whole model, and names those in it.

    In ``"subset"`` mode, ``p`` is the rate that takes effect on a batch like the example:
    1 - k/B, where k of its B samples are kept. ``decided`` and ``dropped`` count the decisions of
    training so far. ``inside`` is the name of the innermost branch around it, if there is one: it
    runs only where that is kept, and what it costs is a part of what that costs. ``projection`` is
    what a wrapper's projection takes, in training besides all the model has; it is never dropped.
    A branch that is ``masked`` is computed for all samples, as they can't be selected.
    """

    name: str
    kind: str
    p: float
    parameters: float
    flops: float | None
    decided: int = 0
    dropped: int = 0
    inside: str | None = None
    projection: float = 0.0
    masked: bool = False


@dataclass(frozen=True, repr=False)
class Summary:
    """What :func:`summary` found; prints as a table.

    Attributes:
        rows: the branches in the order of execution.
        refused: (name, reason) of what was found but can't be dropped, now or when stochastic
            depth was applied to the model or to parts of it.
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
        """The expected number of them that run in a training step.

        That is the sum of 1-p, where no branch is inside of another.
        """
        return sum(chances_to_run([row.p for row in self.rows], _around(self.rows)))

    @property
    def compute_kept(self) -> float | None:
        """The expected share of the model's FLOPs in training, if they were measured.

        Projections of wrappers come on top: they run whether the wrapped module is kept or not.
        """
        if any(row.flops is None for row in self.rows):
            return None
        return _executed(self.rows)

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
        if masked := [row.name for row in self.rows if row.masked]:
            lines.append("masked          " + ", ".join(masked))
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
        title = f"expected depth {self.expected_depth:.2f} of {self.depth} branches{kept}"
        return picture_of(self.rows, _running(self.rows), title)


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
    applied, own, names = branches(model), owners(model), names_in(model)
    inside = _inside(own)
    shares: dict[Branch, float] = {}
    rates: dict[Branch, float] = {}
    beside: dict[Branch, float] = {}
    found, refused = _known(model, names)
    if example_inputs is not None:
        args, kwargs = call_of(example_inputs)
        with plain():
            findings = find(model, args, kwargs, samples=None)
            by_name = {branch.name: branch for branch in findings.branches}
            same = {branch: by_name.get(names[branch], branch) for branch in applied}
            others = {b: own[b].modules_of(b) for b in applied if same[b] is b}
            measured = flop_shares(model, args, kwargs, findings, others)
        shares = {branch: measured[same[branch]] for branch in applied}
        rates = rates_in_effect(model, applied, args, kwargs)
        beside = projection_shares(model, shares, args, kwargs)
        found, refused = list(by_name), _each_once(findings, refused)
    elif not found and (guess := guess_inputs(model)) is not None:
        with plain():
            findings = find(model, *guess, samples=None)
        found, refused = [b.name for b in findings.branches], _each_once(findings, [])
    total = max(sum(p.numel() for p in model.parameters()), 1)
    rows = []
    for branch in applied:
        count = sum(p.numel() for p in own_parameters(branch, own[branch]))
        outer = inside.get(branch)
        rows.append(
            Row(
                names[branch], branch.kind, rates.get(branch, branch.p), count / total,
                shares.get(branch), branch.decided, branch.dropped,
                None if outer is None else names[outer], beside.get(branch, 0.0),
                isinstance(own[branch], Site) and branch.place is None and not branch.decides_calls,
            )
        )  # fmt: skip
    blocks = [block_of(row) for row in rows if row.kind == "block"]
    blocks += [""] * isinstance(model, StochasticDepth)
    used = set(names.values())
    refused = [r for r in refused if r.name not in used and not _is_in(r.name, blocks)]
    used |= {r.name for r in refused}
    free = [name for name in found if name not in used and not _is_in(name, blocks)]
    in_batch = all(branch.mode == "batch" for branch in applied)
    of_ranks = in_batch and ranks > 1 and example_inputs is not None
    return Summary(
        tuple(rows),
        tuple((r.name, r.reason) for r in refused),
        tuple(free),
        ranks,
        {way: _executed(rows, ranks, way) for way in get_args(Way)} if of_ranks else {},
    )


def _executed(rows: Sequence[Row], ranks: int = 1, way: Way = "independent") -> float:
    """What the slowest rank executes of the model."""
    rates, costs, around = _saving(rows), [r.flops or 0.0 for r in rows], _around(rows)
    share = sum(cost for cost, outer in zip(costs, around, strict=True) if outer is None)
    classes = cost_classes([row.parameters for row in rows])  # as balanced decisions have them
    kept = slowest(rates, costs, ranks, way, classes=classes, around=around)
    chances = chances_to_run(rates, around)
    reached = [1.0 if outer is None else chances[outer] for outer in around]
    beside = [row.projection * chance for row, chance in zip(rows, reached, strict=True) if row.p]
    return 1.0 - share * (1.0 - kept) + sum(beside)


def _running(rows: Sequence[Row]) -> list[float]:
    """By row, the share of FLOPs that its branch is expected to run, with those inside of it."""
    around = _around(rows)
    own = [row.flops or 0.0 for row in rows]
    for row, outer in zip(rows, around, strict=True):
        if outer is not None:
            own[outer] -= row.flops or 0.0
    chances = chances_to_run(_saving(rows), around)
    running = [0.0] * len(rows)
    for i, (cost, chance) in enumerate(zip(own, chances, strict=True)):
        at: int | None = i
        while at is not None:
            running[at] += cost * chance
            at = around[at]
    return running


def _saving(rows: Sequence[Row]) -> list[float]:
    """By row, how often what it drops is not computed."""
    return [0.0 if row.masked else row.p for row in rows]


def _around(rows: Sequence[Row]) -> list[int | None]:
    """By row, the number of that whose branch is around its own."""
    numbers = {row.name: i for i, row in enumerate(rows)}
    return [None if row.inside is None else numbers[row.inside] for row in rows]


def _inside(own: Mapping[Branch, Site | StochasticDepth]) -> dict[Branch, Branch]:
    """By branch that is in another, the innermost one around it."""
    held = {b: {m for top in o.modules_of(b) for m in top.modules()} for b, o in own.items()}
    inside = {}
    for branch, owner in own.items():
        home = owner.block if isinstance(owner, Site) else owner
        around = [b for b, modules in held.items() if home in modules and b is not branch]
        if around:
            inside[branch] = min(around, key=lambda b: len(held[b]))
    return inside


def _each_once(findings: Findings, known: list[Refused]) -> list[Refused]:
    """What was refused now, and before."""
    now = dict.fromkeys((*findings.refused, *findings.unused))
    names = {refused.name for refused in now}
    return [*now, *(refused for refused in known if refused.name not in names)]


def _is_in(name: str, blocks: list[str]) -> bool:
    """Whether what is called so is in one of the blocks that are dropped as a whole."""
    return any(is_below(name.partition(":")[0], block) for block in blocks)


def _known(model: nn.Module, names: Mapping[Branch, str]) -> tuple[list[str], list[Refused]]:
    """What was found, and refused, each time that stochastic depth was applied, by its name now."""
    looks: dict[int, tuple[Findings, dict[str, str]]] = {}
    for site in sites(model):
        branch = site.branches[0]
        _, homes = looks.setdefault(id(site.findings), (site.findings, {}))
        homes[block_of(branch)] = names[branch].partition(":")[0]
    found: dict[str, None] = {}
    refused: dict[Refused, None] = {}
    for findings, homes in looks.values():
        for branch in findings.branches:
            if (name := _name_now(branch.name, homes)) is not None:
                found[name] = None
        for name, reason in (*findings.refused, *findings.unused):
            if (name := _name_now(name, homes)) is not None:
                refused[Refused(name, reason)] = None
    return list(found), list(refused)


def _name_now(name: str, homes: Mapping[str, str]) -> str | None:
    """The name of what was found, in this model; None for what is not in it.

    Args:
        name: in the module that was given to ``apply``.
        homes: by the names of blocks there, those in this model.
    """
    path, colon, label = name.partition(":")
    home, now = next(iter(homes.items()))
    if path in homes:
        return homes[path] + colon + label
    if f".{now}".endswith(f".{home}") or not home:  # that module is a part of this model
        return name_in_model(name, now.removesuffix(home).removesuffix("."))
    if f".{home}".endswith(f".{now}") or not now:  # this model is a part of that module
        above = home.removesuffix(now).removesuffix(".")
        return name.removeprefix(above).removeprefix(".") if is_below(path, above) else None
    return name
