"""Which blocks or branches go, where one says how many stay."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from ..branch import block_of
from .looks import Look
from .surgery import held_by
from .table import Importance

__all__ = ["Keep", "Ranking", "to_remove"]

Keep = int | Iterable[int | str]
Ranking = Importance | Sequence[str]


def to_remove(model: nn.Module, look: Look, keep: Any, by: Ranking | None) -> list[str]:
    """The names of what goes.

    Raises:
        TypeError, ValueError: what is to be kept is not there, or more would have to go than can.
    """
    reasons = {
        name: _reason(model, look, name)
        for name in look.blocks
        if name not in look.wholes or held_by(model, name) is None
    }
    if not _is_number(keep):
        if isinstance(keep, str) or not isinstance(keep, Iterable):
            raise TypeError(f"keep must be a number of blocks, or which, got {keep!r}")
        return _others(look, list(keep), reasons)
    everything = look.blocks
    if by is not None:
        ranking = list(by.ranking if isinstance(by, Importance) else by)
        if not ranking or not all(isinstance(name, str) for name in ranking):
            raise ValueError(f"by must be an importance or a list of names, got {by!r}")
        if twice := _twice(ranking):
            raise ValueError(f"by= ranks {twice[0]!r} twice")
        if not set(ranking) <= set(everything):
            everything = [b.name for b in look.found.branches]
            reasons = {}
        if unknown := sorted(set(ranking) - set(everything)):
            raise ValueError(f"by= ranks {unknown[0]!r}, which is no block or branch of the model")
        can_go = [name for name in ranking if name not in reasons]
    else:
        can_go = [name for name in everything if name not in reasons]
    what = "blocks" if everything is look.blocks else "branches"
    if not everything:
        raise ValueError(f"no block found: name branches with remove={look.about_layers()}")
    if not 1 <= keep < len(everything):
        raise ValueError(
            f"keep must be at least 1 and less than the {len(everything)} {what} that there are, "
            f"got {keep}"
        )
    count = len(everything) - keep
    if count > len(can_go):
        told = "".join(f"\n  {name}: {reason}" for name, reason in list(reasons.items())[:6])
        raise ValueError(
            f"keep={keep} would take {count} of {len(everything)} {what} out, and {len(can_go)} "
            f"can be or are ranked; keep at least {len(everything) - len(can_go)}.{told}"
        )
    if by is not None:
        return can_go[:count]
    return [can_go[int((i + 0.5) * len(can_go) / count)] for i in range(count)]


def _others(look: Look, keep: list[Any], reasons: dict[str, str]) -> list[str]:
    names = []
    for item in keep:
        if _is_number(item):
            if not -len(look.blocks) <= item < len(look.blocks):
                raise ValueError(f"keep has {item}, and there are {len(look.blocks)} blocks")
            names.append(look.blocks[item])
        elif item in look.blocks:
            names.append(item)
        else:
            raise ValueError(f"keep has {item!r}, which is none of the blocks {look.blocks}")
    if twice := _twice(names):
        raise ValueError(f"keep={keep!r} has {twice[0]!r} twice")
    gone = [name for name in look.blocks if name not in names]
    if not names or not gone:
        raise ValueError(f"keep={keep!r} would keep {len(names)} of {len(look.blocks)} blocks")
    if stuck := [name for name in gone if name in reasons]:
        raise ValueError(f"{stuck[0]!r} cannot be taken out: {reasons[stuck[0]]}")
    return gone


def _is_number(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _twice(names: list[str]) -> list[str]:
    return [name for i, name in enumerate(names) if name in names[:i]]


def _reason(model: nn.Module, look: Look, name: str) -> str:
    if name in look.wholes:
        return "it is in no ModuleList or Sequential"
    return next((r.reason for r in look.whole.refused if block_of(r) == name), "not found")
