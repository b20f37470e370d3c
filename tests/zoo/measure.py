"""What is found in one model, against what is expected, and whether it is right."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.calls import call_of
from stochastic_depth.find import find


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    family: str
    model: str
    found: int
    expected: str
    verdict: str
    note: str
    build_seconds: float
    apply_seconds: float

    def __str__(self) -> str:
        note = self.note.replace("|", "/").replace("\n", " ")
        return (
            f"| {self.family} | {self.model} | {self.found} | {self.expected} | {self.verdict} | "
            f"{note} | {self.build_seconds:.1f} | {self.apply_seconds:.1f} |"
        )


Built = tuple[nn.Module, float]


def timed(build: Callable[[], nn.Module]) -> Built:
    """A model, and the seconds that building it took."""
    start = time.perf_counter()
    return build(), time.perf_counter() - start


def measure(
    family: str, name: str, built: Built, inputs: Any, expected: int | None, source: str
) -> Row:
    """Apply to a model, verify it, and compare what was found with what was expected."""
    model, build_seconds = built
    drops = drops_that_run(model, inputs)
    start = time.perf_counter()
    try:
        sd.apply(model, 0.2, example_inputs=inputs)
    except ValueError as error:
        seconds = time.perf_counter() - start
        verdict = "whole" if expected == 0 else "none"
        note = "" if expected == 0 else reasons(model, inputs) or str(error)[:80]
        told = f"{expected} ({source})"
        return Row(family, name, 0, told, verdict, note, build_seconds, seconds)
    seconds = time.perf_counter() - start
    found = sd.branches(model)
    taken = {drop for branch in found for drop in branch.existing}
    result = sd.verify(model, inputs)
    failed = "; ".join(f"{c.name}: {c.failure}" for c in result.checks if c.failure)
    missing = sorted(drops - taken)
    if expected is None:
        told, whole = f"{len(drops)} DropPath", bool(drops) and not missing
    else:
        told, whole = f"{expected} ({source})", len(found) >= expected
    verdict = "wrong" if failed else "whole" if whole else "partial"
    note = failed or (
        "" if whole else f"{', '.join(missing[:2])} {reasons(sd.remove(model), inputs)}"
    )
    return Row(family, name, len(found), told, verdict, note, build_seconds, seconds)


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
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for handle in handles:
        handle.remove()
    return ran


def _batch_norm_aside(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def reasons(model: nn.Module, inputs: Any) -> str:
    """Why blocks were refused, the first two reasons."""
    args, kwargs = call_of(inputs)
    found = find(model, args, kwargs, samples=False)
    reasons = dict.fromkeys(r.reason for r in found.refused)
    return "; ".join(list(reasons)[:2])
