"""``summary``: what is dropped, how often, what it saves, and what could not be dropped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .calls import run_example
from .detect.capture import no_fast_path
from .executor import BranchState, observe
from .sampling import subset_size
from .surgery import Branch, branch_name, branches, detect

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True)
class Row:
    """A branch in the summary; shares are of the whole model.

    In ``"subset"`` mode, ``p`` is the rate that takes effect on a batch like the example:
    1 - k/B, where k of its B rows are kept.
    """

    name: str
    kind: str
    p: float
    parameters: float
    flops: float | None


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; ``str()`` of it is a table.

    Attributes:
        rows: the branches in depth order.
        refused: (name, reason) of what was found and cannot be dropped.
        unused: names of branches that could be dropped and are not.
    """

    rows: tuple[Row, ...]
    refused: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]

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

    def __str__(self) -> str:
        table = [("branch", "kind", "p", "params", "FLOPs")]
        for row in self.rows:
            flops = "-" if row.flops is None else f"{row.flops:.1%}"
            table.append((row.name, row.kind, f"{row.p:.3f}", f"{row.parameters:.1%}", flops))
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        rule = "-" * len(lines[0])
        lines.insert(1, rule)
        kept = "not measured: give example_inputs"
        if self.compute_kept is not None:
            kept = f"{self.compute_kept:.1%}"
        lines += [
            rule,
            f"expected depth  {self.expected_depth:.2f} of {self.depth} branches",
            f"compute kept    {kept}",
        ]
        if self.unused:
            lines += ["not dropped     " + ", ".join(self.unused)]
        for name, reason in self.refused:
            lines.append(f"refused         {name or '(the model)'}: {reason}")
        return "\n".join(lines)


def summary(model: nn.Module, example_inputs: Any = None) -> Summary:
    """What stochastic depth does to ``model``, as a table.

    The branches are those that :func:`stochastic_depth.apply` set up. Beside them the table
    lists what could be dropped and is not, and what was found but refused, with the reason.

    Args:
        model: a module, with or without stochastic depth.
        example_inputs: what the model is called with (a tensor, a tuple of arguments or a dict of
            keywords). FLOPs are measured on them, in one forward; None leaves them out. FLOPs
            are what :mod:`torch.utils.flop_counter` counts: matrix products, convolutions and
            attention.

    Raises:
        ValueError: the model fails on ``example_inputs``.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), p=0.5)
        >>> result = sd.summary(model, torch.zeros(1, 3, 64, 64))
        >>> print(f"{result.expected_depth} of {result.depth}, {result.compute_kept:.2f}")
        5.75 of 8, 0.74
    """
    applied = branches(model)
    findings = detect(model, example_inputs)
    names = {branch.name for branch in applied}
    whole = [branch.name.partition(":")[0] for branch in applied if branch.kind == "block"]

    def elsewhere(name: str) -> bool:
        """Whether it is in no block that is dropped as a whole."""
        path = name.partition(":")[0] + "."
        return not any(path.startswith(f"{block}." if block else "") for block in whole)

    found = [branch_name(f.block, f.label) for f in findings.branches]
    total = sum(p.numel() for p in model.parameters())
    flops: dict[str, float] = {}
    rows_seen: dict[str, int] = {}
    if example_inputs is not None:
        flops, rows_seen = _measure(model, example_inputs)
    rows = [
        Row(
            branch.name,
            branch.kind,
            _effective_rate(branch, rows_seen.get(branch.name)),
            _count_parameters(model, branch) / max(total, 1),
            None if example_inputs is None else flops.get(branch.name, 0.0),
        )
        for branch in applied
    ]
    return Summary(
        tuple(rows),
        tuple((r.name, r.reason) for r in findings.refused if elsewhere(r.name)),
        tuple(name for name in found if name not in names and elsewhere(name)),
    )


def _count_parameters(model: nn.Module, branch: Branch) -> int:
    modules = [model.get_submodule(name) for name in branch.modules]
    return sum(p.numel() for p in {p for m in modules for p in m.parameters()})


def _effective_rate(branch: Branch, rows: int | None) -> float:
    if branch.mode != "subset" or not rows:
        return branch.p
    return 1.0 - subset_size(rows, branch.p) / rows


def _measure(model: nn.Module, example_inputs: Any) -> tuple[dict[str, float], dict[str, int]]:
    """Each branch's share of the FLOPs of one forward, and how many rows it was given."""
    names = {id(branch._state): branch.name for branch in branches(model)}
    inside: dict[str, int] = dict.fromkeys(names.values(), 0)
    rows: dict[str, int] = {}
    counter = FlopCounterMode(display=False)

    def count(state: BranchState, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        before = counter.get_total_flops()
        output = run(*inputs)
        inside[names[id(state)]] += counter.get_total_flops() - before
        first = next(x for x in inputs if isinstance(x, Tensor))
        rows[names[id(state)]] = first.shape[state.found.batch_dim] if first.dim() else 0
        return output

    # Fused attention is not counted, on a CPU not even as attention: have it done in steps.
    with observe(count), counter, no_fast_path(), sdpa_kernel(SDPBackend.MATH):
        run_example(model, example_inputs)
    total = max(counter.get_total_flops(), 1)
    return {name: flops / total for name, flops in inside.items()}, rows
