"""Models compiled block by block: is what is dropped still skipped, and how many graphs are there?

    python -m benchmarks.regional

Time: training steps of the plain model and of ours, each compiled block by block, interleaved; the
mean of the ratios at p = .5, and what the executed share of the branches alone would make of the
plain step. Graphs: how many torch.compile makes in 200 steps while the rates fall from p to 0, a
new rate every step.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter  # what torch's own tests count graphs with

import stochastic_depth as sd

from .harness import Side, block_names, branch_shares, interleave, machine, spread
from .models import llama, vit

MODES = ("batch", "row", "subset")
ORDERS = ("apply, compile", "compile, apply")


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "ViT":
        return vit("vit_tiny_patch16_224", 96), torch.randn(args.batch, 3, 96, 96)
    return llama(12, 192, 3), torch.randn(args.batch, 64, 192)


def compile_blocks(model: nn.Module, names: list[str], backend: object) -> None:
    for name in names:
        model.get_submodule(name).compile(backend=backend)


def time_rows(name: str, args: argparse.Namespace) -> list[str]:
    plain, x = build(name, args)
    shares = branch_shares(Side(sd.apply(copy.deepcopy(plain), p=0.0, example_inputs=x), x))
    sides = {"plain": Side(copy.deepcopy(plain), x)}
    for mode in MODES:
        ours = sd.apply(copy.deepcopy(plain), 0.5, schedule="uniform", mode=mode, example_inputs=x)
        sides[mode] = Side(ours, x, shares)
    names = block_names(ours)
    for side in sides.values():
        compile_blocks(side.model, names, args.backend)
    for _ in range(12):  # most patterns of what is dropped come up, and are compiled
        for side in sides.values():
            side.step()
    times, bounds = interleave(sides, args.rounds)
    rows = []
    for mode in MODES:
        ratios = [a / b for a, b in zip(times[mode], times["plain"], strict=True)]
        counted = any(branch.decided for branch in sd.branches(sides[mode].model))
        kept = f"{sum(bounds[mode]) / len(bounds[mode]):.3f}" if counted else "drawn in the graph"
        rows.append(f"| {name} | {mode} | {spread(ratios)} | {kept} |")
    return rows


def graph_row(name: str, args: argparse.Namespace, mode: str, order: str) -> str:
    model, x = build(name, args)
    names = block_names(sd.apply(copy.deepcopy(model), p=0.5, example_inputs=x))
    counter = CompileCounter()
    torch.compiler.reset()
    if order == ORDERS[1]:
        compile_blocks(model, names, counter)
    sd.apply(model, 0.5, schedule="uniform", mode=mode, example_inputs=x)
    if order == ORDERS[0]:
        compile_blocks(model, names, counter)
    side, rates = Side(model, x), sd.RateSchedule(model, lambda t: 1.0 - t / args.steps)
    for _ in range(args.steps):
        side.step()
        rates.step()
    dropped = sum(branch.dropped for branch in sd.branches(model))
    decided = sum(branch.decided for branch in sd.branches(model))
    share = f"{dropped / decided:.2f}" if decided else "drawn in the graph"
    return f"| {name} | {mode} | {order} | {counter.frame_count} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["graphs", "time"])
    parser.add_argument("--models", nargs="+", default=["ViT", "Llama"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30, help="steps that are timed")
    parser.add_argument("--steps", type=int, default=200, help="steps in which graphs are counted")
    parser.add_argument("--backend", default="inductor", help="of the steps that are timed")
    args = parser.parse_args()
    # All sides are of one class, whose graphs torch.compile counts together.
    torch._dynamo.config.recompile_limit = 64
    print(machine(torch.device("cpu")))
    print(f"12 blocks of width 192, batch {args.batch}, p = .5 for all\n")
    if "graphs" in args.parts:
        print("| model | mode | order | graphs | dropped, share |\n|---|---|---|---|---|")
        for name in args.models:
            for mode in MODES:
                for order in ORDERS:
                    print(graph_row(name, args, mode, order), flush=True)
        print()
    if "time" in args.parts:
        print("| model | mode | time, compiled plain = 1 | what is left without overhead |")
        print("|---|---|---|---|")
        for name in args.models:
            print("\n".join(time_rows(name, args)), flush=True)


if __name__ == "__main__":
    main()
