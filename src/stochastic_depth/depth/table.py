"""The table of :func:`stochastic_depth.importance`."""

from dataclasses import dataclass
from typing import Any, Literal

from ..check.picture import pyplot
from ..tables import table_html

__all__ = ["By", "Importance", "Of", "Row"]

By = Literal["influence", "loss", "greedy"]
Of = Literal["branches", "blocks"]

_HEADS = {
    "influence": "1 - cosine",
    "loss": "loss without it",
    "greedy": "loss without it and all above",
}


@dataclass(frozen=True)
class Row:
    """One branch or block, and what was measured of it."""

    name: str
    value: float


@dataclass(frozen=True, repr=False)
class Importance:
    """How much each branch or block matters; prints as a table, the least important first.

    Attributes:
        rows: in order of execution; for ``"greedy"``, in the order in which they were left out.
        unmeasured: (name, reason) of what couldn't be measured, and counts as important.
        by: how it was measured.
        of: what was measured, branches or blocks.
        loss: of the whole model, where losses were measured.
    """

    rows: tuple[Row, ...]
    unmeasured: tuple[tuple[str, str], ...]
    by: By
    of: Of
    loss: float | None = None

    @property
    def ranking(self) -> list[str]:
        """The names of what was measured, the least important first."""
        return [row.name for row in self._sorted()]

    def __getitem__(self, name: str) -> float:
        for row in self.rows:
            if row.name == name:
                return row.value
        raise KeyError(name)

    def _sorted(self) -> list[Row]:
        if self.by == "greedy":
            return list(self.rows)
        return sorted(self.rows, key=lambda row: row.value)

    def _table(self) -> list[tuple[str, str]]:
        head = (self.of.removesuffix("es") if self.of == "branches" else "block", _HEADS[self.by])
        return [head, *[(row.name, f"{row.value:.4g}") for row in self._sorted()]]

    def _notes(self) -> list[str]:
        notes = [] if self.loss is None else [f"loss of the whole model  {self.loss:.4g}"]
        return notes + [f"not measured  {name}: {reason}" for name, reason in self.unmeasured]

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(line[i]) for line in table) for i in range(2)]
        lines = [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}" for a, b in table]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:], rule, *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return table_html(self._table(), self._notes())

    def plot(self, ax: Any = None) -> Any:
        """A bar for each, in the order of ``rows``, with matplotlib.

        Args:
            ax: the axes to draw on; None makes new ones.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        if ax is None:
            _, ax = pyplot().subplots(figsize=(6, 0.8 + 0.22 * len(self.rows)))
        names = [row.name for row in self.rows]
        ax.barh(range(len(names)), [row.value for row in self.rows])
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlabel(_HEADS[self.by])
        if self.loss is not None:
            ax.axvline(self.loss, color="gray", linestyle="--")
        return ax
