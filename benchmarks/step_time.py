"""Time and memory of a training step: the plain model, ours, the peers, and the bound.

    python -m benchmarks.step_time                     # the two models of issue and front page
    python -m benchmarks.step_time --full --save       # every model, mode and peer: for the page
    python -m benchmarks.step_time vit-s --modes row subset --peers DINOv2
    python -m benchmarks.step_time --full --save --device cuda --dtype bfloat16 --compiled   # a GPU

All sides run interleaved in one process. Times are ratios to the plain model in the same round,
mean and standard error over the rounds. The bound is what is left of the plain step when each
branch's own time (forward and backward) goes with its probability to drop. How close we come to it
is measured step by step, against the bound for what that step dropped: median over the rounds.

``--compiled`` adds the plain model and ours under torch.compile: the whole model in subset mode,
block by block in the others.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_map

import stochastic_depth as sd
from stochastic_depth import Mode

from .harness import Side, block_names, branch_shares, interleave, machine, peak_mebibytes, spread
from .models import ON_CPU, ON_GPU, SUBJECTS, TokenBlock, build
from .peers import ON_TOKENS, PEERS, rates_of

RESULTS = Path(__file__).parent / "results" / "step_time.json"
SETTINGS = ["p=0", "p=0.2", "linear 0.5", "p=0.5"]


@dataclass
class Result:
    """One model at one setting: ratios to the plain model, by side."""

    model: str
    setting: str
    plain_seconds: float
    bound: float
    times: dict[str, list[float]] = field(default_factory=dict)
    bounds: dict[str, list[float]] = field(default_factory=dict)  # of what each step dropped
    memory: dict[str, float] = field(default_factory=dict)


def compiled(model: nn.Module, mode: str) -> nn.Module:
    """``model`` in the way of compiling that its mode allows."""
    if mode in ("plain", "subset"):
        return torch.compile(model)
    for name in block_names(model):
        model.get_submodule(name).compile()
    return model


def measure(
    name: str,
    settings: list[str],
    modes: list[str],
    peers: list[str],
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiling: bool = False,
) -> list[Result]:
    """Measure one model at each setting."""
    plain, x = build(name, torch.device(device))
    plain.train()
    on_tokens = any(isinstance(m, TokenBlock) for m in plain.modules())
    peers = [peer for peer in peers if on_tokens or peer not in ON_TOKENS]
    shares = branch_shares(
        Side(sd.apply(copy.deepcopy(plain), p=0.0, example_inputs=x), x, dtype=dtype)
    )
    results = []
    for setting in settings:
        p, schedule = read_setting(setting)
        sides = {"plain": Side(plain, x, dtype=dtype)}
        for mode in modes:
            ours = sd.apply(
                copy.deepcopy(plain), p=p, schedule=schedule, mode=mode, example_inputs=x
            )
            sides[mode] = Side(ours, x, shares, dtype)
        for mode in ["plain", *modes] if compiling else []:
            side = Side(copy.deepcopy(sides[mode].model), x, dtype=dtype)
            side.model = compiled(side.model, mode)
            sides[f"{mode}, compiled"] = side
        for peer in peers if p > 0 else []:
            model = copy.deepcopy(plain)
            PEERS[peer](model, rates_of(ours))
            sides[peer] = Side(model, x, dtype=dtype)
        times, bounds = interleave(sides, rounds)
        saved = sum(branch.p * shares[branch.name] for branch in sd.branches(ours))
        result = Result(name, setting, statistics.median(times["plain"]), 1 - saved)
        memory = {side: peak_mebibytes(sides[side]) for side in sides}
        for side in sides.keys() - {"plain"}:
            ratios = zip(times[side], times["plain"], strict=True)
            result.times[side] = [ours / plain for ours, plain in ratios]
            result.memory[side] = memory[side] / memory["plain"]
            result.bounds[side] = bounds[side]
        results.append(result)
    return results


def tables(results: list[Result]) -> str:
    """Markdown: a table for each question."""
    questions = {
        "How long does a step take? Plain = 1; mean ± standard error.": time_of,
        "How far is that from the bound? 1: what was dropped is free.": over_bound,
        "How much memory does it need at its peak? Plain = 1.": memory_of,
    }
    return "\n\n".join(
        f"{question}\n\n{table(results, cell)}" for question, cell in questions.items()
    )


def table(results: list[Result], cell: Callable[[Result, str], str]) -> str:
    """A row for each model and setting, a column for each side that has a figure."""
    known = [*get_args(Mode), *(f"{mode}, compiled" for mode in ("plain", *get_args(Mode))), *PEERS]
    columns = [side for side in known if any(cell(r, side) for r in results)]
    lines = ["| " + " | ".join(["model", "plain", "setting", "bound", *columns]) + " |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for r in results:
        cells = [r.model, f"{r.plain_seconds * 1e3:.0f} ms", r.setting, f"{r.bound:.2f}"]
        lines.append("| " + " | ".join([*cells, *(cell(r, side) for side in columns)]) + " |")
    return "\n".join(lines)


def time_of(result: Result, side: str) -> str:
    return spread(result.times[side]) if side in result.times else ""


def over_bound(result: Result, side: str) -> str:
    if side not in get_args(Mode) or side not in result.times:
        return ""
    pairs = zip(result.times[side], result.bounds[side], strict=True)
    return f"{statistics.median(time / bound for time, bound in pairs):.2f}"


def memory_of(result: Result, side: str) -> str:
    return f"{result.memory[side]:.2f}" if side in result.times else ""


def read_setting(setting: str) -> tuple[float, str]:
    """Rate and schedule of a setting: "p=0.3", or "linear 0.3"."""
    for prefix, schedule in (("p=", "uniform"), ("linear ", "linear")):
        if setting.startswith(prefix):
            return float(setting.removeprefix(prefix)), schedule
    raise ValueError(f"setting must be like 'p=0.3' or 'linear 0.3', got {setting!r}")


def load() -> dict[str, list[Result]]:
    """The results that are kept, by machine."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {where: [Result(**r) for r in results] for where, results in kept.items()}


def save(where: str, results: list[Result]) -> None:
    """Keep results, beside those of other machines, models and settings."""
    kept = load()
    new = {(r.model, r.setting) for r in results}
    old = [r for r in kept.get(where, []) if (r.model, r.setting) not in new]
    kept[where] = [*old, *results]
    RESULTS.parent.mkdir(exist_ok=True)
    content = {w: [_rounded(asdict(r)) for r in each] for w, each in kept.items()}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def _rounded(value: Any) -> Any:
    return tree_map(lambda x: float(f"{x:.4g}") if isinstance(x, float) else x, value)


def main() -> None:
    """Measure the models named on the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(SUBJECTS))
    parser.add_argument("--full", action="store_true", help="every model, mode and peer")
    parser.add_argument("--settings", nargs="+", help='like "p=0.3" or "linear 0.3"')
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode))
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compiled", action="store_true", help="measure torch.compile too")
    parser.add_argument("--save", action="store_true", help=f"keep the results in {RESULTS.name}")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(SUBJECTS))
    if unknown:
        parser.error(f"unknown models {unknown}; there are {sorted(SUBJECTS)}")
    every = ON_CPU if args.device == "cpu" else ON_GPU
    models = args.models or (every if args.full else ["resnet50", "resnet110-cifar"])
    settings = args.settings or [s for s in SETTINGS if args.full or s != "p=0.2"]
    modes = args.modes or (list(get_args(Mode)) if args.full else ["batch"])
    peers = (
        args.peers if args.peers is not None else (list(PEERS) if args.full else ["torchvision"])
    )
    dtype = getattr(torch, args.dtype)
    where = machine(torch.device(args.device))
    where += "" if dtype is torch.float32 else f", {args.dtype} autocast"
    print(where, flush=True)
    for name in models:
        results = measure(
            name, settings, modes, peers, args.rounds, args.device, dtype, args.compiled
        )
        print(tables(results) + "\n", flush=True)
        if args.save:
            save(where, results)


if __name__ == "__main__":
    main()
