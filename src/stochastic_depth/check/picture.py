"""The picture of a summary: the branches of a network in the order in which they run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..branch import block_of

if TYPE_CHECKING:  # which itself imports this
    from .summary import Row

__all__ = ["picture_of", "pyplot"]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GRAY = "#0072B2", "#D55E00", "#777777"
_BAND = "#f2f2f2"


def pyplot() -> Any:
    """``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed: pip install 'stochastic-depth[plot]'",
            name="matplotlib",
        ) from error
    return pyplot


def picture_of(rows: Sequence["Row"], running: Sequence[float], title: str) -> Any:
    """A figure of three columns: the network, the rates with what was dropped, and the compute.

    Args:
        rows: the branches.
        running: of each, the share of FLOPs that is expected to run.
        title: above it.
    """
    plt = pyplot()
    count = len(rows)
    height = 0.3 if count <= 24 else 0.17  # inches for a branch
    size = 8 if count <= 24 else 6.5
    figure = plt.figure(figsize=(9, 1.5 + height * count), dpi=120, layout="constrained")
    plt.close(figure)  # notebooks show what is returned, and would show an open figure once more
    network, rates, compute = figure.subplots(1, 3, sharey=True, width_ratios=(1, 2.2, 2.2))
    _draw_network(network, rows, size)
    _draw_rates(rates, rows)
    _draw_compute(compute, rows, running)
    for axes in (network, rates, compute):
        _draw_bands(axes, rows)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
    network.set_yticks(range(count), [row.name for row in rows], fontsize=size)
    network.set_ylim(count - 0.2, -0.8)  # the input on top
    for axes in (rates, compute):
        axes.tick_params(axis="y", labelleft=False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_bands(axes: Any, rows: Sequence["Row"]) -> None:
    """A band behind every second block."""
    blocks = list(dict.fromkeys(block_of(row) for row in rows))
    for y, row in enumerate(rows):
        if blocks.index(block_of(row)) % 2:
            axes.axhspan(y - 0.5, y + 0.5, color=_BAND, zorder=0, linewidth=0)


def _draw_network(axes: Any, rows: Sequence["Row"], size: float) -> None:
    """The shortcut as a line, and each branch as a box beside it, paler the more it drops."""
    axes.plot((0, 0), (-0.8, len(rows) - 0.2), color="black", linewidth=1.5, zorder=2)
    for y, row in enumerate(rows):
        style = {"color": "black", "linewidth": 0.8, "zorder": 2}
        axes.plot((0, 0.6, 0.6), (y - 0.4, y - 0.4, y - 0.28), **style)
        axes.plot((0.6, 0.6, 0), (y + 0.28, y + 0.4, y + 0.4), **style)
        axes.plot(0, y + 0.4, "o", color="white", mec="black", ms=0.6 * size, mew=0.8, zorder=3)
        if row.kind == "projection":
            axes.plot(0, y, "s", color=_GRAY, ms=0.6 * size, zorder=3)
        box = {"facecolor": (0, 0.447, 0.698, 1.0 - row.p), "edgecolor": "black"}
        axes.barh(y, 0.8, 0.56, 0.2, linewidth=0.8, zorder=3, **box)
    axes.text(0, -0.9, "input", fontsize=8, ha="center", va="bottom")
    axes.set(xlim=(-0.3, 1.2), xticks=())
    axes.set_xlabel("shortcut and branch;\npaler: runs less often", fontsize=8)


def _draw_rates(axes: Any, rows: Sequence["Row"]) -> None:
    """The rate of each branch, and the share of its decisions that dropped, if there were any."""
    places = range(len(rows))
    axes.barh(places, [row.p for row in rows], 0.7, color=_BLUE, label="p")
    seen = [(row.dropped / row.decided, y) for y, row in enumerate(rows) if row.decided]
    if seen:
        axes.plot(*zip(*seen, strict=True), "D", color=_ORANGE, ms=3.5, label="dropped so far")
        _legend(axes)
    highest = max([row.p for row in rows] + [share for share, _ in seen], default=0.0)
    axes.set_xlim(0, max(1.1 * highest, 0.01))
    axes.set_xlabel("probability to drop, p", fontsize=8)


def _draw_compute(axes: Any, rows: Sequence["Row"], running: Sequence[float]) -> None:
    """Each branch's share of the model's FLOPs: what is expected to run, and what is saved."""
    if any(row.flops is None for row in rows):
        axes.text(
            0.5, 0.5, "not measured:\ngive example_inputs", transform=axes.transAxes, ha="center"
        )
        axes.set_xticks(())
        return
    shares = [100 * (row.flops or 0.0) for row in rows]
    places = range(len(rows))
    axes.barh(places, shares, 0.7, color="white", edgecolor=_BLUE, linewidth=0.8, label="saved")
    axes.barh(places, [100 * share for share in running], 0.7, color=_BLUE, label="runs")
    _legend(axes)
    axes.set_xlim(0, 1.1 * max([*shares, 0.01]))
    axes.set_xlabel("share of the model's FLOPs, %", fontsize=8)


def _legend(axes: Any) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncol=2, fontsize=7, frameon=False)
