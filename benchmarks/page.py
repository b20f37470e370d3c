"""Write docs/benchmarks.md and its plot from the results that are kept.

python -m benchmarks.page
"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from .peers import PEERS
from .step_time import RESULTS, SETTINGS, Result, load, read_setting, tables

DOCS = Path(__file__).parents[1] / "docs"
MODES = ["batch", "row", "subset"]
HEAD = """# Time and memory of a training step

Written by `python -m benchmarks.page` from `benchmarks/results/`, where
`python -m benchmarks.step_time --full --save` puts what it measures: training steps (forward,
backward, SGD) of all sides of a row, interleaved in one process, each as a ratio to the plain
model's in the same round.

The *bound* of a step is what is left of the plain step if everything that it dropped were free; the
column of that name holds the expected one. (A dropped branch also saves its part of the optimizer's
step, which the bound does not count, so less is possible.) Memory is that beside model, optimizer
and batch. torchvision's and timm's ways compute the branch and multiply it by zero; torchtune's and
DINOv2's compute the kept samples, and need the model rewritten, which the benchmark did where a
block's branches are functions of one tensor.
"""


FILES = {
    "overhead.md": """## What it costs beside what it saves

By `python -m benchmarks.overhead > benchmarks/results/overhead.md`: blocks that are as small as
they get, and the same with an `if` written into their forward.
""",
    "balance.md": """## What the slowest of many ranks executes

By `python -m benchmarks.balance > benchmarks/results/balance.md`: from the rates, on no machine. A
data-parallel step takes as long as the rank that drops least. Balanced decisions let every rank
drop equally many branches, and different ones.
""",
    "ranks.md": """## Steps and memory with balanced decisions

By `python -m benchmarks.ranks > benchmarks/results/ranks.md`, on gloo processes. A branch waits in
its forward and backward as for a device of its own, since eight ranks that compute on two cores
would wait for the cores and not for each other. *Separate*: each rank draws for itself; *shared*:
all ranks drop the same; *balanced*: equally many. Memory is what autograd saves in the forward, of
one process.
""",
    "regional.md": """## Compiled block by block

By `python -m benchmarks.regional > benchmarks/results/regional.md`. Graphs are those of all twelve
blocks, in 200 steps in which the rate falls from .5 to 0, another one every step.
""",
}


def plot(where: str, results: list[Result]) -> str:
    """A plot of time against p for each model that was measured at many, as Markdown."""
    curves: dict[str, list[tuple[float, Result]]] = {}
    for result in results:
        p, schedule = read_setting(result.setting)
        if schedule == "uniform":
            curves.setdefault(result.model, []).append((p, result))
    curves = {model: sorted(c, key=lambda x: x[0]) for model, c in curves.items() if len(c) > 4}
    if not curves:
        return ""
    figure, axes = plt.subplots(
        1, len(curves), figsize=(5 * len(curves), 4), sharey=True, squeeze=False, layout="tight"
    )
    for axis, (model, curve) in zip(axes[0], curves.items(), strict=True):
        rates = [p for p, _ in curve]
        axis.plot(rates, [r.bound for _, r in curve], "k--", label="bound")
        for side in [*MODES, *PEERS]:
            points = [(p, r.times[side]) for p, r in curve if side in r.times]
            if points:
                axis.errorbar(
                    [p for p, _ in points],
                    [statistics.mean(times) for _, times in points],
                    [statistics.stdev(times) / len(times) ** 0.5 for _, times in points],
                    label=side,
                    marker="o" if side in MODES else "x",
                    linestyle="-" if side in MODES else ":",
                )
        axis.set(title=model, xlabel="p, uniform", ylim=(0, None))
    axes[0][0].set_ylabel("time of a training step, plain = 1")
    axes[0][-1].legend(fontsize="small")
    image = DOCS / "images" / "time_against_p.png"
    figure.savefig(image, dpi=120)
    return f"![Time of a training step against p; {where}](images/{image.name})\n"


def main() -> None:
    """Write the page."""
    parts = [HEAD]
    for where, results in load().items():
        parts.append(f"## {where}\n")
        shown = [r for r in results if r.setting in SETTINGS]
        parts += [plot(where, results), tables(shown) + "\n"]
    for name, text in FILES.items():
        parts += [text, (RESULTS.parent / name).read_text()]
    (DOCS / "benchmarks.md").write_text("\n".join(filter(None, parts)))


if __name__ == "__main__":
    main()
