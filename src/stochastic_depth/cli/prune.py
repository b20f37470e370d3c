"""A model that a run left, with less depth."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import stochastic_depth as sd

from ..find.costs import FlopCounter
from .errors import CommandError, first_line
from .saving import PRUNED_HEAD, Saved, find, snippet, write
from .settings import check_place


def prune(*, run: Path, keep: int, out: Path) -> None:
    """Take the least important branches out of a model, and write what is left to a file."""
    if out.exists():
        raise CommandError(f"--out {out}: is there already; name another file")
    check_place(out, out.parent)
    saved = find(run)
    ranking, errors = ranked(saved)
    depth = max(errors)
    if keep >= depth:
        raise CommandError(f"--keep {keep}: must be less than the {depth} branches of {saved.path}")
    if depth - keep > len(ranking):
        raise CommandError(
            f"--keep {keep}: {len(ranking)} of the {depth} branches of {saved.path} are ranked, "
            f"and no others are taken out; keep at least {depth - len(ranking)}"
        )
    network = saved.network()
    model, example = network.model, saved.example()
    before = size(model, example)
    gone = ranking[: depth - keep]
    try:
        sd.prune(model, remove=gone, example_inputs=example)
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"--keep {keep}: {first_line(error)}") from error
    after = size(model, example)
    found = sd.pruned(model)
    info = {
        **saved.info,
        "removed": list(found.removed) if found else [],
        "branches": keep,
        "snippet": snippet(PRUNED_HEAD, out, network.code, len(saved.info["classes"])),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, {"info": info, "state": model.state_dict()})
    except (OSError, RuntimeError) as error:
        raise CommandError(f"--out {out}: cannot be written ({first_line(error)})") from error
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{saved.path}: took out {depth - keep} of {depth} branches: {', '.join(gone)}.")
    for name, a, b in zip(("Parameters", "FLOPs"), before, after, strict=True):
        console.print(f"{name}: {b:,} of {a:,}, {b / max(a, 1):.2f} ×.")
    if keep in errors:
        console.print(
            f"Test error: {100 * errors[keep]:.1f} %, against {100 * errors[depth]:.1f} % with all."
        )
    console.print(f"{out} holds what is left. These lines, also in it, load it:\n")
    console.print(info["snippet"])


def ranked(saved: Saved) -> tuple[list[str], dict[int, float]]:
    """The branches, the least important first, and the test errors by the number left."""
    if saved.path.is_file():
        raise CommandError(f"RUN {saved.path}: is pruned already; give the run that it came from")
    try:
        ranking = [str(name) for name in saved.info["ranking"]]
        errors = {int(point["branches"]): float(point["error"]) for point in saved.info["curve"]}
    except (KeyError, TypeError, ValueError):
        errors = {}
    if not errors:
        raise CommandError(
            f"{saved.path / 'model.json'}: has no ranking of the branches, so there is no saying "
            "which to take out; fine-tune again"
        )
    return ranking, errors


def size(model: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """The numbers of parameters, and of FLOPs for an image."""
    counter: Any = FlopCounter()
    with counter, torch.no_grad():
        model(example)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()
