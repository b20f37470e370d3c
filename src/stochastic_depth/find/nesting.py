"""All branches of a recorded run: of those inside of others, one has to give way."""

from collections.abc import Container

from .flow import Flow
from .regions import Finder, Region, Rejected

__all__ = ["find_regions"]


def find_regions(flow: Flow, drops: Container[str] = ()) -> tuple[Finder, list[Region]]:
    """Who has found the branches and what it refused, and the branches in the order of their sums.

    Of nested ones, the outermost is kept, but not one around several, unless it is dropped:
    x + f(x) inside of a branch is a part of that branch; but a sum around a stack of residual
    blocks is a long skip, and the blocks are the branches. Where the model drops the outer one by
    itself, its author has decided: that is the branch.

    Args:
        flow: the recorded run.
        drops: the names of modules that drop a branch by themselves.
    """
    finder = Finder(flow, drops)
    finder.run()
    chosen: dict[int, Region] = {}
    for outer in sorted(finder.found.values(), key=lambda r: len(r.nodes)):
        inner = [chosen[i] for i in outer.nodes if i in chosen]
        dropped = set(outer.drops).difference(*(r.drops for r in inner))
        blocks = [r for r in inner if finder.is_block(r)]
        if len(blocks) >= 2 and not dropped:
            reason = f"a long skip around {len(inner)} residual branches, which are dropped instead"
            finder.rejected.append(Rejected(outer.block, outer.calls, reason, outer.sum))
            continue
        for r in inner:
            del chosen[r.sum]
        chosen[outer.sum] = outer
    return finder, [chosen[i] for i in sorted(chosen)]
