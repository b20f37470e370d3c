"""Which branches, or which modules, a filter of the user's selects."""

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .branch import Branch, block_of, is_below

__all__ = ["Filter", "choose", "listed", "matching_modules", "outermost", "some"]

Pattern = str | type[nn.Module] | Callable[..., bool]
Filter = Pattern | Iterable[Pattern] | None


def listed(given: Filter, argument: str) -> Filter:
    """A filter that can be read again: patterns of an iterable are listed.

    Raises:
        ValueError: the list is empty.
    """
    patterns = _patterns(given)
    if not patterns and argument != "exclude":
        raise ValueError(f"{argument}={given!r}: nothing is included; None includes everything")
    return given if patterns == [given] else patterns


def choose(
    model: nn.Module, found: list[Branch], include: Filter, exclude: Filter, strict: bool = True
) -> list[Branch]:
    """The branches that ``include`` selects and ``exclude`` does not.

    Where ``strict``, every pattern has to match one, and one has to be left.

    Raises:
        TypeError, ValueError: a pattern of another kind; one that matches no branch.
    """
    chosen = found
    if include is not None:
        chosen = _matching(model, chosen, include, "include", strict)
    if exclude is not None:
        excluded = _matching(model, chosen, exclude, "exclude", strict)
        chosen = [branch for branch in chosen if branch not in excluded]
        if strict and not chosen:
            raise ValueError(f"exclude={exclude!r} leaves no branch")
    return chosen


def some(names: list[str], most: int = 4) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _matching(
    model: nn.Module, found: list[Branch], patterns: Filter, argument: str, strict: bool
) -> list[Branch]:
    """The branches that a pattern matches; where ``strict``, every pattern must match one."""
    modules = dict(model.named_modules())
    matched: set[Branch] = set()
    for pattern in _patterns(patterns):
        hits = {branch for branch in found if _selects(pattern, branch, modules, argument)}
        if strict and not hits:
            known = some([branch.name for branch in found], most=8)
            raise ValueError(f"{argument}={pattern!r} matches no branch; there are {known}")
        matched |= hits
    return [branch for branch in found if branch in matched]


def _selects(pattern: Any, branch: Branch, modules: Mapping[str, nn.Module], argument: str) -> bool:
    block = block_of(branch)
    if isinstance(pattern, str):
        below = pattern in modules and (block == pattern or block.startswith(f"{pattern}."))
        return below or fnmatchcase(branch.name, pattern)
    if isinstance(pattern, type):
        return isinstance(modules[block], pattern)
    if callable(pattern):
        return bool(pattern(branch))
    raise TypeError(
        f"{argument} must be globs on names, names of modules, module types or functions of a "
        f"Branch, got {pattern!r}"
    )


def matching_modules(model: nn.Module, patterns: Filter) -> list[str]:
    """The names of the modules that a pattern of ``blocks`` matches, in the model's order.

    Raises:
        TypeError, ValueError: a pattern of another kind; one that matches no module.
    """
    named = dict(model.named_modules())
    names: set[str] = set()
    for pattern in _patterns(patterns):
        if isinstance(pattern, str):
            hits = {n for n in named if fnmatchcase(n, pattern)}
        elif isinstance(pattern, type):
            hits = {n for n, m in named.items() if isinstance(m, pattern)}
        elif callable(pattern):
            hits = {n for n, m in named.items() if pattern(n, m)}
        else:
            raise TypeError(
                "blocks must be 'all', globs on names, module types or functions "
                f"(name, module) -> bool, got {pattern!r}"
            )
        if not hits:
            raise ValueError(f"blocks={pattern!r} matches no module of {type(model).__name__}")
        names |= hits
    return [name for name in named if name in names]


def _patterns(given: Filter) -> list[Any]:
    if isinstance(given, str | type) or not isinstance(given, Iterable):
        return [given]
    return list(given)


def outermost(found: list[Branch]) -> list[str]:
    """The blocks of these branches that are in no other block.

    A block that does nothing but add a stack of blocks to its input is not counted as one.
    """
    names = list(dict.fromkeys(map(block_of, found)))
    stacks = {
        name
        for name in names
        if all(
            any(is_below(other, m) for m in branch.modules for other in names if other != name)
            for branch in found
            if block_of(branch) == name
        )
    }
    layers = [name for name in names if name not in stacks]
    return [n for n in layers if not any(n != other and is_below(n, other) for other in layers)]
