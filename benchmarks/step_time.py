"""Time and memory of a training step: the plain model, ours, the peers, and the bound.

    python -m benchmarks.step_time                     # the two models of issue and front page
    python -m benchmarks.step_time --full --save docs  # every model, mode and peer: the tables
    python -m benchmarks.step_time vit-s --modes row subset --peers DINOv2

All sides run interleaved in one process. Times are ratios to the plain model in the same round,
mean and standard error over the rounds. The bound is what is left of the plain step when each
branch's own time (forward and backward) goes with its probability to drop.
"""

import argparse
import copy
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

import torch

import stochastic_depth as sd
from stochastic_depth.sampling import Mode

from .harness import Side, branch_shares, interleave, machine, peak_mebibytes, spread
from .models import SUBJECTS, TokenBlock, build
from .peers import ON_TOKENS, PEERS, rates_of

SETTINGS = {
    "p=0": (0.0, "uniform"),
    "p=0.2": (0.2, "uniform"),
    "linear 0.5": (0.5, "linear"),
    "p=0.5": (0.5, "uniform"),
}


@dataclass
class Result:
    """One model at one setting: ratios to the plain model, by side."""

    model: str
    setting: str
    plain_seconds: float
    bound: float
    times: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


def measure(
    name: str, settings: list[str], modes: list[str], peers: list[str], rounds: int, device: str
) -> list[Result]:
    """Measure one model at each setting."""
    plain, x = build(name, torch.device(device))
    plain.train()
    on_tokens = any(isinstance(m, TokenBlock) for m in plain.modules())
    peers = [peer for peer in peers if on_tokens or peer not in ON_TOKENS]
    shares = branch_shares(Side(sd.apply(copy.deepcopy(plain), p=0.0), x))
    results = []
    for setting in settings:
        p, schedule = SETTINGS[setting]
        sides = {"plain": Side(plain, x)}
        for mode in modes:
            ours = sd.apply(copy.deepcopy(plain), p=p, schedule=schedule, mode=mode)
            sides[mode] = Side(ours, x)
        for peer in peers if p > 0 else []:
            model = copy.deepcopy(plain)
            PEERS[peer](model, rates_of(ours))
            sides[peer] = Side(model, x)
        times = interleave(sides, rounds)
        saved = sum(branch.p * shares[branch.name] for branch in sd.branches(ours))
        result = Result(name, setting, statistics.median(times["plain"]), 1 - saved)
        memory = {side: peak_mebibytes(sides[side]) for side in sides}
        for side in [*modes, *peers]:
            if side in sides:
                ratios = zip(times[side], times["plain"], strict=True)
                result.times[side] = [ours / plain for ours, plain in ratios]
                result.memory[side] = memory[side] / memory["plain"]
        results.append(result)
    return results


def table(results: list[Result], columns: list[str]) -> str:
    """A Markdown table of the time ratios, with the memory ratio behind each."""
    lines = ["| model | plain | setting | bound | " + " | ".join(columns) + " |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for r in results:
        cells = [r.model, f"{r.plain_seconds * 1e3:.0f} ms", r.setting, f"{r.bound:.2f}"]
        for column in columns:
            taken = r.times.get(column)
            cells.append(f"{spread(taken)} ({r.memory[column]:.2f})" if taken else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure the models named on the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(SUBJECTS))
    parser.add_argument("--full", action="store_true", help="every model, mode and peer")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode))
    parser.add_argument("--peers", nargs="*", choices=PEERS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, help="folder for step_time.json and step_time.md")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(SUBJECTS))
    if unknown:
        parser.error(f"unknown models {unknown}; there are {sorted(SUBJECTS)}")
    models = args.models or (list(SUBJECTS) if args.full else ["resnet50", "resnet110-cifar"])
    settings = args.settings or [s for s in SETTINGS if args.full or s != "p=0.2"]
    modes = args.modes or (list(get_args(Mode)) if args.full else ["batch"])
    peers = (
        args.peers if args.peers is not None else (list(PEERS) if args.full else ["torchvision"])
    )
    results: list[Result] = []
    print(machine(torch.device(args.device)), flush=True)
    for name in models:
        new = measure(name, settings, modes, peers, args.rounds, args.device)
        print(table(new, [*modes, *peers]), flush=True)
        results += new
    if args.save:
        where = machine(torch.device(args.device))
        args.save.mkdir(parents=True, exist_ok=True)
        text = f"{where}; time (memory) of a training step, plain = 1.\n\n"
        (args.save / "step_time.md").write_text(text + table(results, [*modes, *peers]) + "\n")
        content = {"machine": where, "results": [asdict(r) for r in results]}
        (args.save / "step_time.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
