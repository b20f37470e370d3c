"""What is found in one model, against what is expected, and whether it is right."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.branch import Mode
from stochastic_depth.find import find
from stochastic_depth.options import call_of
from stochastic_depth.trial import refuse_what_fails

COLUMNS = (
    "family", "model", "found", "samples", "expected", "verdict", "note",
    "build, s", "forward, s", "apply, s", "with samples, s",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        family: of the model, or its file.
        model: its name.
        found: the number of branches.
        expected: what is expected, and where that comes from.
        verdict: as the page says.
        note: why it is not whole.
        samples: the number of branches in which samples can be selected.
        seconds: of building, of one forward, of ``apply`` without samples and with; None where
            that is not measured.
    """

    family: str
    model: str
    found: int
    expected: str
    verdict: str
    note: str = ""
    samples: int | None = None
    seconds: tuple[float | None, ...] = ()

    def __str__(self) -> str:
        note = self.note.replace("|", "/").replace("\n", " ")
        seconds = [*self.seconds, None, None, None, None][:4]
        cells = [self.family, self.model, self.found, _shown(self.samples), self.expected]
        cells += [self.verdict, note]
        cells += ["" if s is None else f"{s:.3f}" if s < 0.1 else f"{s:.2f}" for s in seconds]
        return "| " + " | ".join(map(str, cells)) + " |"


def _shown(x: Any) -> str:
    return "" if x is None else str(x)


Built = tuple[nn.Module, float]


def timed(run: Callable[[], Any]) -> Any:
    """What ``run`` returns, and the seconds of processor time that it took."""
    start = time.process_time()
    return run(), time.process_time() - start


def measure(
    family: str,
    name: str,
    built: Built,
    inputs: Any,
    expected: int | None,
    source: str,
    verified: bool = True,
) -> Row:
    """Apply to a model, verify it, and compare what was found with what was expected."""
    model, build = built
    drops = drops_that_run(model, inputs)
    told = f"{len(drops)} DropPath" if expected is None else f"{expected} ({source})"
    forward = _forward_seconds(model, inputs)
    modes: tuple[Mode, ...] = ("batch", "row")
    seconds = [build, forward]
    for mode in modes:
        try:
            _, spent = timed(lambda: sd.apply(model, 0.2, mode=mode, example_inputs=inputs))  # noqa: B023
        except ValueError as error:
            verdict = "whole" if expected == 0 else "none"
            note = "" if expected == 0 else reasons(model, inputs) or str(error)[:80]
            return Row(family, name, 0, told, verdict, note, None, (*seconds,))
        seconds.append(spent)
    found = sd.branches(model)
    selected = sum(branch.place is not None for branch in found)
    taken = {drop for branch in found for drop in branch.existing}
    failed = ""
    if verified:
        checks = sd.verify(model, inputs).checks
        failed = "; ".join(f"{c.name}: {c.failure}" for c in checks if c.failure)
    missing = sorted(drops - taken)
    whole = len(found) >= (expected or 0) and not (expected is None and (missing or not drops))
    note = failed
    if not failed and not whole:
        note = f"{', '.join(missing[:2])} {reasons(sd.remove(model), inputs)}"
    elif not failed and selected < len(found):
        note = "; ".join(dict.fromkeys(b.reason for b in found if b.place is None))
    if not verified:
        note = f"not verified. {note}".strip()
    verdict = "wrong" if failed else "whole" if whole else "partial"
    return Row(family, name, len(found), told, verdict, note, selected, (*seconds,))


def call(model: nn.Module, inputs: Any) -> None:
    """One forward without gradients."""
    args, kwargs = call_of(inputs)
    with torch.no_grad():
        model(*args, **kwargs)


def _forward_seconds(model: nn.Module, inputs: Any) -> float:
    """Of the second one, in evaluation."""
    model.eval()
    call(model, inputs)
    _, seconds = timed(lambda: call(model, inputs))
    model.train()
    return float(seconds)


def drops_that_run(model: nn.Module, inputs: Any) -> set[str]:
    """The names of the drop modules that a training step runs.

    Not those of blocks that say that they have no shortcut (RegNetZ's), where they mask no branch.
    """
    names = modules_that_run(model, inputs, ("DropPath", "StochasticDepth"))
    blocks = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    return {name for name, block in blocks.items() if getattr(block, "shortcut", 0) is not None}


def modules_that_run(model: nn.Module, inputs: Any, kinds: tuple[str, ...]) -> set[str]:
    """The names of the modules that a training step runs, of classes whose names end so."""
    ran: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
        if type(module).__name__.endswith(kinds)
    ]
    model.train()
    _batch_norm_aside(model)
    call(model, inputs)
    for handle in handles:
        handle.remove()
    return ran


def _batch_norm_aside(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def reasons(model: nn.Module, inputs: Any, most: int = 2) -> str:
    """Why branches of a plain model were refused, the first two reasons."""
    args, kwargs = call_of(inputs)
    found = refuse_what_fails(model, find(model, args, kwargs, samples=None), args, kwargs)
    return "; ".join(list(dict.fromkeys(r.reason for r in found.refused))[:most])
