"""A block that is dropped as a whole (LayerDrop)."""

from typing import Any

from torch import Tensor

from .._torch import tree_flatten, tree_map, tree_unflatten
from ..branch import Place
from ..find.plan import Plan
from .arguments import copies, each_once, fits, hand_on, has_samples, same_objects
from .around import Take, around
from .frame import Frame
from .site import Site
from .slot import Slot

__all__ = ["WholeSite"]


class WholeSite(Site):
    """What the slot of such a block asks: it has one branch, itself."""

    def _renew(self) -> None:
        """No frame meets the calls of its modules."""

    def reach(self, compiling: bool) -> dict[str, Slot]:
        return {}

    def run_plan(self, plan: Plan, slot: Slot, args: Any, kwargs: Any) -> Any:
        frame = Frame(self, plan, args, kwargs, self.is_outer(slot))
        run = frame.runs[0]
        frame.tell_hooks()
        branch, gate = run.branch, plan.gates[""][0]
        given, structure = tree_flatten((args, kwargs))
        output, main = next(
            (i, g.argument) for i, g in enumerate(gate.returned) if g.kind == "branch"
        )
        place = branch.place or branch.mask
        size = given[main].shape[place.dim] // place.fold if branch.place else 1
        select = branch.place is not None and fits(gate, given, size)
        taken: list[Any] = given
        returned: list[list[Any]] = []

        def call(take: Take) -> Tensor:
            nonlocal taken
            if take is not None:

                def computed(x: Any, at: Place | None) -> Any:
                    return take(x, at) if at is not None and has_samples(x, at, size) else x

                taken = each_once(computed, given, gate.given)
            made = tree_unflatten(taken, structure)
            inner_args, inner_kwargs = same_objects((args, kwargs), made)
            copied = copies((args, kwargs), (inner_args, inner_kwargs))
            out = slot.through(*inner_args, **inner_kwargs)
            run.check_copies(copied, copies((args, kwargs), (inner_args, inner_kwargs)))
            run.check_returned(gate, out)
            returned.append(tree_flatten(out)[0])
            result: Tensor = returned[0][output]
            return result

        run.owe(given)
        merged = around(run, given[main], call, select, place)
        if not run.compiling:
            merged = merged.to(plan.dtypes.get(0, given[main].dtype))
        leaves = returned[0] if returned else [None] * len(gate.returned)
        hand_on(gate, given, taken, leaves, run.put_back)
        for i, leaf in enumerate(gate.returned):
            if leaf.kind == "none" and isinstance(leaves[i], Tensor) and run.computed is not None:
                leaves[i] = run.unknown()
        leaves[output] = merged
        return merged if gate.structure is None else tree_map(lambda i: leaves[i], gate.structure)
