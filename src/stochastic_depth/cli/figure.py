"""The figure of a run: error over the epochs, in the end, and with less depth; time per step."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

from .names import label
from .results import QUANTITIES, Comparison, Quantity

# Okabe and Ito's colours, which colour-blind readers can tell apart, and shapes as well.
STYLES = (
    ("#000000", "o"),
    ("#0072B2", "s"),
    ("#D55E00", "^"),
    ("#009E73", "D"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
)


def plot(comparison: Comparison, task: str, label_noise: float, path: Path) -> None:
    """Draw the four panels; a thin line or small mark is one seed, a thick one the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained", dpi=100)
    (curve, test), (depth, cost) = figure.subplots(2, 2, width_ratios=(1.2, 1))
    rates = list(comparison.by_rate)
    for place, p in enumerate(rates):
        colour, marker = STYLES[place % len(STYLES)]
        draw_curves(curve, comparison, p, colour, marker)
        draw_errors(test, comparison, p, place, colour, marker)
        draw_depths(depth, comparison, p, colour, marker)
        points(cost, place, comparison.values(by_key("step_ms"), p), colour, marker)
    curve.set(xlabel="epoch", ylabel="validation error, %")
    curve.legend(title="stochastic depth", frameon=False, fontsize=8, title_fontsize=8)
    test.set(ylabel="test error, %", xlim=(-0.5, 1.5))
    test.set_xticks((0, 1), ("last epoch", "epoch chosen\non validation"))
    cost.set_xticks(range(len(rates)), [costs(comparison, p) for p in rates], fontsize=8)
    cost.set(ylabel="time per step, ms", xlim=(-0.6, len(rates) - 0.4))
    if comparison.others:
        cost.set_xlabel("below the rate: × time, × FLOPs", fontsize=8)
    highest = max(value for p in rates for value in comparison.values(by_key("step_ms"), p))
    cost.set_ylim(0, 1.1 * highest)
    depth.set(xlabel="branches left, chosen epoch", ylabel="test error, %")
    depth.invert_xaxis()
    for axes in (curve, test, depth, cost):
        axes.spines[["top", "right"]].set_visible(False)
    seeds = comparison.seeds
    noise = f", {100 * label_noise:g} % of the labels wrong" if label_noise else ""
    names = ", ".join(label(p) for p in rates)
    figure.suptitle(
        fill(f"{task}{noise}", 100)
        + f"\n{names}; {seeds} seed{'s'[: seeds > 1]}"
        + (" (thin), mean (thick)" if seeds > 1 else ""),
        fontsize=10,
    )
    figure.savefig(path)


def by_key(key: str) -> Quantity:
    """The quantity of that key."""
    return next(quantity for quantity in QUANTITIES if quantity.key == key)


def draw_curves(axes: Any, comparison: Comparison, p: float, colour: str, marker: str) -> None:
    """The validation error over the epochs."""
    curves = [[100 * epoch["val_error"] for epoch in r.history] for r in comparison.by_rate[p]]
    lines(axes, range(1, len(curves[0]) + 1), curves, p, colour, marker)


def draw_depths(axes: Any, comparison: Comparison, p: float, colour: str, marker: str) -> None:
    """The test error with fewer and fewer branches."""
    found = [result.by_depth for result in comparison.by_rate[p]]
    left = [n for n in found[0] if all(n in errors for errors in found)]
    lines(axes, left, [[100 * errors[n] for n in left] for errors in found], p, colour, marker)


def draw_errors(
    axes: Any, comparison: Comparison, p: float, place: int, colour: str, marker: str
) -> None:
    """The test errors after the last and after the chosen epoch."""
    shift = 0.22 * (place - (len(comparison.by_rate) - 1) / 2)
    for x, key in enumerate(("error_last", "error_chosen")):
        points(axes, x + shift, comparison.values(by_key(key), p), colour, marker)
    axes.margins(y=0.12)


def costs(comparison: Comparison, p: float) -> str:
    """The rate, and the ratios of time and FLOPs below it."""
    if p == comparison.reference:
        return label(p)
    time, flops = (comparison.change(by_key(key), p).mean for key in ("step_ms", "flops"))
    return f"{label(p)}\n× {time:.2f}\n× {flops:.2f}"


def lines(
    axes: Any,
    x: Sequence[int],
    seeds: Sequence[Sequence[float]],
    p: float,
    colour: str,
    marker: str,
) -> None:
    """A thin line for each seed, and a thick one for the mean."""
    if len(seeds) > 1:
        for values in seeds:
            axes.plot(x, values, color=colour, linewidth=0.8, alpha=0.4)
    mean = [fmean(column) for column in zip(*seeds, strict=True)]
    axes.plot(x, mean, color=colour, linewidth=2, marker=marker, ms=4, label=label(p))
    axes.xaxis.get_major_locator().set_params(integer=True)


def points(axes: Any, x: float, values: Sequence[float], colour: str, marker: str) -> None:
    """A small mark for each seed, and a line at the mean."""
    axes.plot([x] * len(values), values, marker, color=colour, ms=5, alpha=0.6, mec="none")
    axes.hlines(fmean(values), x - 0.09, x + 0.09, color=colour, linewidth=2.5)
