"""What a verification found, check by check."""

from dataclasses import dataclass

from ..tables import table_html

__all__ = ["Check", "Verification"]


@dataclass(frozen=True)
class Check:
    """One thing that was checked; ``failure`` says in words what is wrong, None that it holds."""

    name: str
    failure: str | None


@dataclass(frozen=True, repr=False)
class Verification:
    """What :func:`verify` found; prints as a list in words.

    Attributes:
        checks: what was checked.
        unchecked: (name, reason) of branches that the check of each one alone left out.
    """

    checks: tuple[Check, ...]
    unchecked: tuple[tuple[str, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.failure is None for check in self.checks)

    def __str__(self) -> str:
        lines = [
            f"ok      {check.name}"
            if check.failure is None
            else f"FAILED  {check.name}: {check.failure}"
            for check in self.checks
        ]
        lines += [f"skipped {name}, alone: {reason}" for name, reason in self.unchecked]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [(check.name, check.failure or "ok") for check in self.checks]
        lines += [(f"{name}, alone", f"skipped: {reason}") for name, reason in self.unchecked]
        return table_html([("check", "result"), *lines])
