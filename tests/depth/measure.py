"""Take depth out of one model, and compare with skipping the same and with what was foretold."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_leaves

import stochastic_depth as sd
from stochastic_depth.depth.looks import Look, look_at
from stochastic_depth.find.costs import FlopCounter

from .small import run

COLUMNS = (
    *("family", "model", "blocks", "branches", "taken out"),
    *("parameters, ×", "FLOPs, ×", "time, ×", "verdict", "note"),
)
HEADER = f"| {' | '.join(COLUMNS)} |\n" + len(COLUMNS) * "|---" + "|"
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """A line of the table; the ratios are those of the pruned model to the whole one."""

    family: str
    model: str
    blocks: str
    branches: int
    gone: str
    parameters: float
    flops: float
    seconds: float
    verdict: str
    note: str

    def __str__(self) -> str:
        note = self.note.replace("|", "/").replace("\n", " ")
        ratios = (f"{r:.2f}" for r in (self.parameters, self.flops, self.seconds))
        start = f"| {self.family} | {self.model} | {self.blocks} | {self.branches} | {self.gone} | "
        return start + " | ".join([*ratios, self.verdict, note]) + " |"


def measure(family: str, name: str, build: Callable[[], nn.Module], inputs: Any) -> Row:
    """Take out every second block and one more branch, or as much of this as can go.

    *same*: the pruned model gives what the model that skips the same gives, to the bit; it has lost
    the parameters and FLOPs that the summary says; its state_dict loads into another model that is
    pruned by the record alone. *refused*: nothing could go, and the model was as before.
    """
    model = awake(build().eval())
    look = look_at(model, inputs)
    blocks = [n for n in look.wholes if n in look.blocks]
    told = f"{len(blocks)} of {len(look.blocks)}", len(look.found.branches)
    notes: list[str] = []
    for what in attempts(look, blocks):
        try:
            pruned = sd.prune(copy.deepcopy(model), remove=what, example_inputs=inputs)
        except (RuntimeError, ValueError) as error:
            notes.append(f"{what[0]}: {error}".split("\n")[0][:160])
            wrong = unchanged(model, what, inputs)
        else:
            problems = [*differences(model, pruned, what, inputs, build)]
            ratios, foretold = sizes(model, pruned, look, what, inputs)
            problems += foretold
            verdict = "same" if not problems else "wrong"
            gone = f"{sum(':' not in n for n in what)} + {sum(':' in n for n in what)}"
            note = "; ".join([*problems, *notes])
            return Row(family, name, *told, gone, *ratios, verdict, note)
        if wrong:
            return Row(family, name, *told, "", 1.0, 1.0, 1.0, "wrong", wrong)
    return Row(family, name, *told, "0 + 0", 1.0, 1.0, 1.0, "refused", "; ".join(notes))


def attempts(look: Look, blocks: list[str]) -> list[list[str]]:
    """What to take out, the most first."""
    some = blocks[1::2] if len(blocks) > 1 else []
    alone = [b.name for b in look.found.branches]
    outside = [n for n in alone if not any(n.startswith((f"{b}.", f"{b}:")) for b in some)]
    one = outside[len(outside) // 2 :][:1] if len(alone) > 1 else []
    middle = blocks[len(blocks) // 2 :][:1] if len(alone) > 1 else []
    first = [n for n in (alone[0], alone[-1]) if len(alone) > 1] if alone else []
    tried = [some + one, some, middle, one, *[[n] for n in first]]
    return [list(what) for what in dict.fromkeys(map(tuple, tried)) if what]


def awake(model: nn.Module) -> nn.Module:
    """The model with values where all are zero at first, as in some heads: else all is the same."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    return model


def unchanged(model: nn.Module, what: list[str], inputs: Any) -> str:
    """What a refusal has changed, if anything."""
    before = run(model, inputs)
    tried = copy.deepcopy(model)
    try:
        sd.prune(tried, remove=what, example_inputs=inputs)
    except (RuntimeError, ValueError):
        same = all(torch.equal(a, b) for a, b in zip(run(tried, inputs), before, strict=True))
        keys = tried.state_dict().keys() == model.state_dict().keys()
        return "" if same and keys else f"changed by the refusal of {what}"
    return f"{what} is refused only the first time"


def differences(
    model: nn.Module, pruned: nn.Module, what: list[str], inputs: Any, build: Callable[[], Any]
) -> list[str]:
    """How what is given differs from the model that skips, and from one that is pruned afresh."""
    problems = []
    whole, got = run(model, inputs), run(pruned, inputs)
    with sd.skip(model, what, inputs):
        skipped = run(model, inputs)
    if not same(got, skipped):
        problems.append("differs from the model that skips")
    if same(whole, skipped):
        problems.append("skipping changes nothing, so nothing is shown")
    if not same(whole, run(model, inputs)):
        problems.append("not as before after skipping")
    fresh = sd.prune(build().eval(), remove=sd.pruned(pruned), example_inputs=inputs)
    fresh.load_state_dict(pruned.state_dict())
    if not same(run(fresh, inputs), got):
        problems.append("differs after loading into one that is pruned afresh")
    return problems


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether all tensors are equal to the bit."""
    return len(a) == len(b) > 0 and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


def sizes(
    model: nn.Module, pruned: nn.Module, look: Look, what: list[str], inputs: Any
) -> tuple[tuple[float, float, float], list[str]]:
    """Parameters, FLOPs and time that are left, and where these are not as the summary says."""
    applied = sd.apply(copy.deepcopy(model), 0.5, example_inputs=inputs)
    rows = {row.name: row for row in sd.summary(applied, inputs).rows}
    blocks = [n for n in what if ":" not in n]
    gone = {n for n in what if ":" in n} | {b.name for n in blocks for b in look.below(n)}
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    inside = {p for n in blocks for p in model.get_submodule(n).parameters()}
    outside = {
        p
        for name, p in model.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{n}.") for n in blocks)
    }
    foretold = sum(p.numel() for p in inside - outside) / counts[0]
    foretold += sum(rows[n].parameters for n in what if ":" in n and n in rows)
    # A scale that the forward of the block does more with than multiply stays.
    # So does what other branches use, too.
    alone = [b for b in look.found.branches if b.name in what]
    staying = [b for b in look.found.branches if b.name not in gone]
    shared = {*_parameters(model, alone)} & {*_parameters(model, staying)}
    foretold -= sum(p.numel() for p in shared - inside) / counts[0]
    left = sd.pruned(pruned).names
    for branch in look.found.branches:
        for weight in branch.weights if branch.name in what else ():
            name = left.get(f"{branch.name.partition(':')[0]}.{weight}".lstrip("."))
            foretold -= pruned.get_parameter(name).numel() / counts[0] if name else 0
    problems = []
    if abs(1 - counts[1] / counts[0] - foretold) > 1e-6:
        problems.append(f"parameters −{1 - counts[1] / counts[0]:.4f}, foretold −{foretold:.4f}")
    flops = [flops_of(m, inputs) for m in (model, pruned)]
    saved = sum(rows[n].flops or 0.0 for n in gone if n in rows)
    rest = flops[1] / max(flops[0], 1)
    matrices = sum(p.numel() for p in inside - outside if p.dim() > 1) / counts[0]
    told = sum(rows[b.name].parameters for n in blocks for b in look.below(n) if b.name in rows)
    more = matrices > told + 1e-6  # blocks do more than their branches
    if abs(1 - rest - saved) > 0.002 * max(1, len(gone)) and not (more and 1 - rest > saved):
        problems.append(f"FLOPs −{1 - rest:.4f}, foretold −{saved:.4f}")
    return (counts[1] / counts[0], rest, time_of(pruned, model, inputs)), problems


def _parameters(model: nn.Module, branches: list[sd.Branch]) -> Iterator[nn.Parameter]:
    for name in {name for branch in branches for name in branch.modules}:
        yield from model.get_submodule(name).parameters()


class Counter(FlopCounter):
    """Counts what is computed, and not what is asked for its shape alone."""

    def _count_flops(self, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves(out)):
            return out
        return super()._count_flops(func, out, args, kwargs)


def flops_of(model: nn.Module, inputs: Any) -> int:
    """FLOPs of a forward in evaluation, without torch's fused kernels, which are not counted."""
    with (
        Counter() as counter,
        sdpa_kernel(SDPBackend.MATH),
        BaseTorchFunctionMode(),
    ):
        run(model, inputs)
    return counter.get_total_flops()


def time_of(pruned: nn.Module, model: nn.Module, inputs: Any) -> float:
    """CPU time of a forward over that of the whole model's, the median of interleaved rounds."""
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for m in (pruned, model):
            start = time.process_time()
            run(m, inputs)
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)
