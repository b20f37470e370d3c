"""``scale="eval"`` becomes a part of the weights."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._torch import tensor_leaves
from ..branch import Branch, block_of
from ..find.state import copied
from .compare import output_of, running
from .looks import Inputs, Look
from .surgery import Undo

__all__ = ["fold", "is_close"]

Place = list[tuple[nn.Module, str]]  # parameters, by who has them


def fold(
    model: nn.Module, look: Look, weights: Mapping[Branch, float], undo: Undo, is_shared: bool
) -> None:
    """Multiply the last weights of each branch with what it counts in evaluation.

    Args:
        model: the model.
        look: at it.
        weights: by branch, or whole block.
        undo: takes note of what changes.
        is_shared: another model has the parameters, too, so this one gets others.

    Raises:
        ValueError: no weights of a branch are linear in its result.
    """
    folding = _Folding(model, look)
    for branch, weight in weights.items():
        attempt = folding.of(branch, weight, is_shared)
        if attempt is None:
            raise ValueError(
                f"scale='eval' counts {branch.name} {weight:.3g} times in evaluation, and it has "
                "no weights that this could become a part of: set its p to 0, or train with "
                "scale='train'"
            )
        undo.add(attempt)


class _Folding:
    """Looks for weights that the result of a branch is linear in."""

    def __init__(self, model: nn.Module, look: Look) -> None:
        self.model, self.look = model, look

    def of(self, branch: Branch, weight: float, is_shared: bool) -> Undo | None:
        """Multiply weights, and how to undo it."""
        wanted = output_of(self.model, self.look, (), {branch: weight})
        names = {name: name for name in wanted[1]}
        for place in self._places(branch):
            attempt = Undo()
            for holder, key in place:
                parameter: Any = holder._parameters[key]
                if is_shared:
                    scaled = nn.Parameter(parameter.detach() * weight, parameter.requires_grad)
                    attempt.keep(holder._parameters)[key] = scaled
                else:
                    attempt.keep_tensor(parameter)
                    with torch.no_grad():
                        parameter.mul_(weight)
            if is_close(output_of(self.model, self.look, blocks=names), wanted):
                return attempt
            attempt.put_back()
        return None

    def _places(self, branch: Branch) -> Iterator[Place]:
        """The weights, the last of the branch first."""
        if branch.kind != "block":
            yield from self._linear(branch, _last_weights(self.model, branch))
            return
        below = self.look.below(block_of(branch))
        parts = [next(self._places(one), None) for one in below]
        if parts and None not in parts:  # all at once, where they are side by side
            place = [item for part in parts for item in part or ()]
            yield from self._linear(branch, [place])

    def _linear(self, branch: Branch, places: Iterable[Place]) -> Iterator[Place]:
        calls = self._calls(block_of(branch))
        yield from (place for place in places if self._is_linear(branch, place, calls))

    def _calls(self, block: str) -> list[Inputs]:
        """What a block is called with in a run of the model."""
        calls: list[Inputs] = []

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(copied((args, kwargs)))

        with self.model.get_submodule(block).register_forward_pre_hook(keep, with_kwargs=True):
            output_of(self.model, self.look)
        return calls

    def _is_linear(self, branch: Branch, place: Place, calls: list[Inputs]) -> bool:
        """Whether half of these weights gives half of the branch, in the block by itself.

        The block's weights are drawn at random, these in several sizes: those of now may be zero,
        or so small that what bounds the result is never met.
        """
        block = self.model.get_submodule(block_of(branch))
        left_out = dict.fromkeys(self._beside(branch), (True, 1.0))
        whole = {**left_out, branch: (False, 1.0)}
        half = {**left_out, branch: (False, 0.5)}
        chosen = {id(holder._parameters[key]) for holder, key in place}
        shows = False
        for size, call in product((1e-3, 1.0, 1e3), calls):
            drawn = _drawn(block, chosen, size)
            given = {n: v for n, (_, v) in drawn.items()}
            halved = {n: v * 0.5 if i in chosen else v for n, (i, v) in drawn.items()}
            try:
                results = [
                    self._run(block, values, decisions, call)
                    for values, decisions in ((given, half), (halved, whole), (given, whole))
                ]
            except Exception:  # of any kind: a block that cannot be tried alone
                return False
            for wanted, got, full in zip(*results, strict=True):
                effect, apart = _apart(full, wanted), _apart(got, wanted)
                if effect > 32:
                    shows = True
                    if apart > effect / 16:
                        return False
        return shows

    def _run(self, block: nn.Module, values: Any, decisions: Any, call: Inputs) -> list[Tensor]:
        with running(self.model, self.look, decisions):
            return _floats(functional_call(block, values, *copied(call)))

    def _beside(self, branch: Branch) -> list[Branch]:
        """The other branches of its block, but for those around it."""
        nodes = self.look.found.nodes
        return [
            other
            for other in self.look.found.branches
            if branch.kind != "block"
            and other is not branch
            and block_of(other) == block_of(branch)
            and not nodes[branch] <= nodes[other]
        ]


def _apart(got: Tensor, wanted: Tensor) -> float:
    """How far they are apart, in units of the rounding."""
    both = got.isfinite() & wanted.isfinite()
    if not wanted[both].any():
        return 0.0
    apart, most = (got - wanted)[both].abs().max(), wanted[both].abs().max()
    return float(apart) / (torch.finfo(wanted.dtype).eps * float(most))


def _last_weights(model: nn.Module, branch: Branch) -> Iterator[Place]:
    """Weights that may be the last of a branch, the most likely first."""
    block = model.get_submodule(block_of(branch))
    for weight in reversed(branch.weights):
        home, _, key = weight.rpartition(".")
        yield [(block.get_submodule(home), key)]
    for name in reversed(branch.modules):
        for module in reversed(list(model.get_submodule(name).modules())):
            own = [key for key, value in module._parameters.items() if value is not None]
            if own:
                yield [(module, key) for key in own]


def _drawn(block: nn.Module, chosen: set[int], size: float) -> dict[str, tuple[int, Tensor]]:
    """Random weights for a block, by name, and whose place they take; the chosen of this size."""
    source = torch.Generator().manual_seed(0)
    drawn: dict[int, Tensor] = {}
    names: dict[str, tuple[int, Tensor]] = {}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        key = id(parameter)
        if key not in drawn:
            fan_in = parameter[0].numel() if parameter.dim() > 1 and len(parameter) else 1
            value = torch.randn(parameter.shape, generator=source) / max(fan_in, 1) ** 0.5
            drawn[key] = (value * (size if key in chosen else 1.0)).to(parameter)
        names[name] = key, drawn[key]
    return names


def is_close(got: Any, wanted: Any, tolerance: float = 64.0) -> bool:
    """Whether results are the same but for rounding, by so many times the precision."""
    for x, y in zip(_floats(got), _floats(wanted), strict=True):
        near = tolerance * torch.finfo(x.dtype).eps
        if not torch.allclose(x, y, rtol=near, atol=near * float(y.abs().max())):
            return False
    return True


def _floats(x: Any) -> list[Tensor]:
    return [t for t in tensor_leaves(x) if t.is_floating_point()]
