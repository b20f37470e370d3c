"""What each variant of each seed gave, and what follows from all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from .names import described, label
from .statistics import half_width


@dataclass(frozen=True)
class Result:
    """What one rate gave with one seed; errors are shares of images, times are seconds.

    ``last`` are the scores on the test images after the last epoch, ``chosen`` those after the
    epoch with the lowest validation error. ``flops`` is the share of the model's that ran.
    ``ranking`` are the branches, the least important on validation images first, ``unranked`` why
    others are not among them, and ``curve`` the test errors after the chosen epoch with so many
    branches left.
    """

    seed: int
    p: float
    last: dict[str, float]
    chosen: dict[str, float]
    chosen_epoch: int
    step_seconds: float
    flops: float
    expected_flops: float | None
    expected_depth: float
    realised_depth: float
    history: list[dict[str, float]]
    ranking: list[str] = field(default_factory=list)
    unranked: dict[str, str] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def by_depth(self) -> dict[int, float]:
        """The test errors by the number of branches left."""
        return {int(point["branches"]): point["error"] for point in self.curve}

    def line(self, seeds: int) -> str:
        """The result in one line."""
        return (
            f"seed {self.seed + 1} of {seeds}, {described(self.p)}: test error "
            f"{100 * self.last['error']:.1f} % after the last epoch, "
            f"{100 * self.chosen['error']:.1f} % at epoch {self.chosen_epoch}, the best on "
            f"validation images; {1000 * self.step_seconds:.0f} ms per step"
        )


@dataclass(frozen=True)
class Quantity:
    """A row of the table; a ``ratio`` is compared by dividing."""

    key: str
    name: str
    value: Callable[[Result], float]
    decimals: int
    ratio: bool = False


QUANTITIES = (
    Quantity("error_last", "test error, last epoch, %", lambda r: 100 * r.last["error"], 1),
    Quantity("error_chosen", "test error, chosen epoch, %", lambda r: 100 * r.chosen["error"], 1),
    Quantity("nll_last", "test NLL, last epoch, nats", lambda r: r.last["nll"], 2),
    Quantity("nll_chosen", "test NLL, chosen epoch, nats", lambda r: r.chosen["nll"], 2),
    Quantity(
        "calibration_last",
        "calibration error, last epoch, %",
        lambda r: 100 * r.last["calibration_error"],
        1,
    ),
    Quantity("step_ms", "time per step, ms", lambda r: 1000 * r.step_seconds, 0, ratio=True),
    Quantity("flops", "FLOPs that ran, share", lambda r: r.flops, 2, ratio=True),
    Quantity("depth", "branches that ran", lambda r: r.realised_depth, 1),
)


@dataclass(frozen=True)
class Change:
    """How a rate differs from the reference, seed by seed, and half the mean's 95 % interval."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def half_width(self) -> float | None:
        return half_width(self.values)

    def text(self, decimals: int, sign: str = "+") -> str:
        """Mean ± half the interval."""
        text = f"{self.mean:{sign}.{decimals}f}".replace("-", "−")
        return text if self.half_width is None else f"{text} ± {self.half_width:.{decimals}f}"


class Comparison:
    """All results, by rate; the lowest rate is what the others are compared with."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.by_rate: dict[float, list[Result]] = {}
        for result in sorted(results, key=lambda result: (result.p, result.seed)):
            self.by_rate.setdefault(result.p, []).append(result)
        self.reference, *self.others = self.by_rate
        self.seeds = len(self.by_rate[self.reference])

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The rows of the table; the last ones are the test errors with less depth."""
        results = [result for results in self.by_rate.values() for result in results]
        whole, *left = results[0].by_depth or [0]
        shared = [n for n in left if all(n in result.by_depth for result in results)]
        return QUANTITIES + tuple(
            Quantity(
                f"error_at_{n}",
                f"test error, {n} of {whole} branches left, %",
                lambda r, n=n: 100 * r.by_depth[n],  # type: ignore[misc]
                1,
            )
            for n in shared
        )

    def values(self, quantity: Quantity, p: float) -> list[float]:
        """The quantity at a rate, by seed."""
        return [quantity.value(result) for result in self.by_rate[p]]

    def change(self, quantity: Quantity, p: float) -> Change:
        """A rate against the reference."""
        pairs = zip(self.values(quantity, p), self.values(quantity, self.reference), strict=True)
        return Change(tuple(a / b if quantity.ratio else a - b for a, b in pairs))

    def summary(self) -> dict[str, Any]:
        """All of the table's numbers, for each seed."""
        rows: dict[str, Any] = {}
        for quantity in self.quantities:
            row: dict[str, Any] = {label(p): self.values(quantity, p) for p in self.by_rate}
            for p in self.others:
                change = self.change(quantity, p)
                row[
                    f"{label(p)} {'over' if quantity.ratio else 'minus'} {label(self.reference)}"
                ] = {
                    "by_seed": list(change.values),
                    "mean": change.mean,
                    "half_width_95": change.half_width,
                }
            rows[quantity.name] = row
        return rows

    def findings(self, label_noise: float) -> list[str]:
        """What the numbers support, a sentence for each rate."""
        return [self.finding(p, label_noise) for p in self.others]

    def unranked(self) -> list[str]:
        """Which branches are never left out, a sentence for each rate and seed that has such."""
        return [
            f"Kept {described(p)}, seed {result.seed + 1}, as they cannot be ranked: "
            + "; ".join(f"{name} ({reason})" for name, reason in result.unranked.items())
            for p, results in self.by_rate.items()
            for result in results
            if result.unranked
        ]

    def finding(self, p: float, label_noise: float) -> str:
        """What the numbers support of a rate."""
        labels = (
            f"With {100 * label_noise:g} % of the training labels wrong, " if label_noise else ""
        )
        last, chosen, step, flops, *_ = (
            self.change(quantity, p)
            for quantity in QUANTITIES
            if quantity.key in ("error_last", "error_chosen", "step_ms", "flops")
        )
        before = fmean(self.values(QUANTITIES[0], self.reference))
        after = fmean(self.values(QUANTITIES[0], p))
        against = f", against {label(self.reference)}," if self.reference else ""
        text = f"{labels}stochastic depth at p = {p:g}{against} {verdict(last, before, after)}"
        if last.half_width is not None:
            text += f" At the epoch chosen on validation images the change is {interval(chosen)}."
        text += (
            f" A training step took {step.text(2, '')} × the time, with {flops.text(2, '')} × the "
            "FLOPs."
        )
        return text[0].upper() + text[1:]


def verdict(change: Change, before: float, after: float) -> str:
    """Whether the test error changed by more than chance would."""
    between = f"from {before:.1f} to {after:.1f} %"
    if change.half_width is None:
        return (
            f"took the test error after the last epoch {between} with this one seed, which tells "
            "nothing of chance."
        )
    if abs(change.mean) <= change.half_width:
        return (
            "made no difference to the test error after the last epoch that is beyond chance: "
            f"{interval(change)}."
        )
    verb = "lowered" if change.mean < 0 else "raised"
    return f"{verb} the test error after the last epoch {between}: {interval(change)}."


def interval(change: Change) -> str:
    """A change of an error, with its interval."""
    low, high = change.mean - (change.half_width or 0), change.mean + (change.half_width or 0)
    text = (
        f"{change.mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, "
        f"{len(change.values)} paired seeds)"
    )
    return text.replace("-", "−")
