"""All branches of a recorded run: of those inside of others, one has to give way."""

from collections.abc import Callable

from .flow import Flow
from .regions import Finder, Region, Rejected

__all__ = ["find_regions"]


def find_regions(
    flow: Flow, is_drop: Callable[[int], bool] = lambda call: False
) -> tuple[Finder, list[Region], list[Rejected]]:
    """The branches in the order of their sums, the outermost of nested ones, and what was refused.

    Args:
        flow: the recorded run.
        is_drop: whether a call is of a module that drops a branch by itself.
    """
    finder = Finder(flow, is_drop)
    finder.run()
    return finder, *_settle_nesting(list(finder.found.values()), finder.rejected, finder)


def _settle_nesting(
    found: list[Region], rejected: list[Rejected], finder: Finder
) -> tuple[list[Region], list[Rejected]]:
    """Keep the outermost of nested branches, but not one around several, unless it is dropped.

    x + f(x) inside of a branch is a part of that branch; but a sum around a stack of residual
    blocks is a long skip, and the blocks are the branches. Where the model drops the outer one by
    itself, its author has decided: that is the branch.
    """
    chosen: dict[int, Region] = {}
    for outer in sorted(found, key=lambda r: len(r.nodes)):
        within = outer.nodes if len(outer.nodes) < len(chosen) else chosen
        inner = [chosen[i] for i in within if i in chosen and i in outer.nodes]
        drops = set(outer.drops).difference(*(r.drops for r in inner))
        blocks = [r for r in inner if finder.is_block(r)]
        if len(blocks) >= 2 and not drops:
            reason = f"a long skip around {len(inner)} residual branches, which are dropped instead"
            rejected.append(Rejected(outer.block, outer.calls, reason, outer.sum))
            continue
        for r in inner:
            del chosen[r.sum]
        chosen[outer.sum] = outer
    return [chosen[i] for i in sorted(chosen)], rejected
