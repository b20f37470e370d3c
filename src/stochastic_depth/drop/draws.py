"""Where a model's drop decisions come from, and whether all ranks draw the same."""

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn

from ..branch import Branch
from .collectives import needs_all_ranks
from .replay import Tape, may_be_recomputed

__all__ = ["Draws", "Ranks", "check_ranks", "is_distributed"]

Ranks = Literal["auto", "shared", "separate"]
Decision = int | bool  # a branch of "batch" mode is dropped or not; others get a seed for samples

_UNIT = 1 << 53  # uniform numbers are k / 2^53, exact in a float

IN_GRAPH = (
    "stochastic depth: a generator of your own (seed=, ranks='shared', generator=) cannot be used "
    "inside torch.compile of the whole model; use torch's default generator (seed=None and "
    "torch.manual_seed), or compile block by block"
)


def check_ranks(ranks: str) -> Ranks:
    """``ranks``, if it is one of the choices."""
    if ranks not in get_args(Ranks):
        raise ValueError(f"ranks must be one of {get_args(Ranks)}, got {ranks!r}")
    return ranks  # type: ignore[return-value]


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized()


class Draws:
    """Draws the decisions of a model's branches.

    Decisions that are not shared come from torch's default generator, where there is no seed. All
    others have a generator of their own, seeded when first needed: the process group may be
    initialised after the model is applied.

    Args:
        seed: the seed; None chooses one for shared decisions and needs none for others.
        ranks: ``"shared"``, the same decisions on all ranks; ``"separate"``; or ``"auto"``, shared
            where a branch needs it.
    """

    def __init__(self, seed: int | None = None, ranks: Ranks = "auto") -> None:
        self.seed = seed
        self.ranks = ranks
        self.tape = Tape()
        self._generators: dict[bool, torch.Generator] = {}  # by whether shared
        self._alone: set[bool] = set()  # those that were seeded before there were other ranks
        self._shared: dict[Hashable, bool] = {}  # what was found for a block
        self._copies = 0

    @staticmethod
    def from_generator(generator: torch.Generator) -> "Draws":
        """Draws all decisions from ``generator``."""
        draws = Draws(seed=0)
        draws._generators = {False: generator}
        return draws

    def __deepcopy__(self, memo: dict[int, Any]) -> "Draws":
        """A copy draws for itself: a seeded teacher would otherwise drop what its student drops."""
        copied = Draws(self.seed, self.ranks)
        memo[id(self)] = copied
        if self.seed is not None:
            self._copies += 1
            copied.seed = _mixed(self.seed, "copy", self._copies)
        return copied

    def decide(self, branches: Sequence[Branch], block: nn.Module) -> list[Decision]:
        """The decisions for one call of ``block``, in one draw.

        p = 0 and p = 1 need no number and draw none. Checkpointing that repeats the call gets the
        same ones.

        Raises:
            RuntimeError: with such decisions the ranks could wait for each other for ever, or a
                recomputed forward does not find its own again.
        """
        decisions: list[Decision] = [branch.p == 1.0 for branch in branches]
        sources: dict[bool, list[int]] = {}
        for i, branch in enumerate(branches):
            if 0.0 < branch.p < 1.0:
                sources.setdefault(self._is_shared(branch, block), []).append(i)
        for shared, members in sources.items():
            generator = self.generator(shared)
            drawn = self._draw([branches[i] for i in members], generator)
            for i, decision in zip(members, drawn, strict=True):
                decisions[i] = decision
        return decisions

    @property
    def is_default(self) -> bool:
        """Whether decisions are drawn from torch's default generator."""
        return self.seed is None and self.ranks != "shared"

    def check_graph(self) -> None:
        """Raise inside of torch.compile where these decisions cannot be a part of the graph."""
        if self.seed is not None or self.ranks == "shared":
            raise RuntimeError(IN_GRAPH)

    def _draw(self, branches: list[Branch], generator: torch.Generator | None) -> list[Decision]:
        def draw() -> list[Decision]:
            device = "cpu" if generator is None else generator.device
            numbers = torch.randint(
                _UNIT, (len(branches),), generator=generator, device=device
            ).tolist()
            return [
                n / _UNIT < b.p if b.decides_calls else n
                for n, b in zip(numbers, branches, strict=True)
            ]

        if not may_be_recomputed():
            return draw()
        purpose = tuple((branch.name, branch.p, branch.mode) for branch in branches)
        return self.tape.decide(draw, purpose, default=generator is None)

    def _is_shared(self, branch: Branch, block: nn.Module) -> bool:
        if not is_distributed():
            return self.ranks == "shared"
        key = branch.name, branch.mode
        if key not in self._shared:
            self._shared[key] = is_shared(self.ranks, branch, block)
        return self._shared[key]

    def generator(self, shared: bool) -> torch.Generator | None:
        """The generator of decisions that are ``shared`` or not; None is torch's default one."""
        if not shared and self.seed is None:
            return None
        if shared not in self._generators or (shared in self._alone and is_distributed()):
            self._generators[shared] = torch.Generator().manual_seed(self._choose_seed(shared))
            self._alone.discard(shared)
            if not is_distributed():
                self._alone.add(shared)
        return self._generators[shared]

    def _choose_seed(self, shared: bool) -> int:
        if self.seed is not None:
            alone = shared or not is_distributed()
            return self.seed if alone else _mixed(self.seed, distributed.get_rank())
        state = torch.get_rng_state()  # peek: nobody's numbers change
        seed = [int(torch.randint(1 << 62, (), device="cpu"))]
        torch.set_rng_state(state)
        if is_distributed():
            distributed.broadcast_object_list(seed, src=0)
        return seed[0]

    def state(self) -> dict[str, Tensor]:
        """The states of those generators that have been used."""
        return {_NAMES[s]: generator.get_state() for s, generator in self._generators.items()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""
        self._alone.clear()  # what is restored is not seeded again
        self._generators = {
            shared: torch.Generator().set_state(state[name])
            for shared, name in _NAMES.items()
            if name in state
        }


_NAMES = {True: "shared", False: "separate"}


def _mixed(*numbers: Hashable) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def is_shared(ranks: Ranks, branch: Branch, block: nn.Module) -> bool:
    """Whether all ranks must draw the same decisions for a branch, or shall.

    A rank that drops a branch does not run its modules. Where these talk to the other ranks
    (a module inside that is sharded by itself, SyncBatchNorm, tensor parallelism), all ranks have
    to run them, or none.

    Raises:
        RuntimeError: the ranks could wait for each other for ever.
    """
    talking, sharded = needs_all_ranks(branch, block)
    waits = f"{branch.name} runs a {talking}, which waits for the other ranks, and"
    unless = "if it is FSDP's, shard the block as a whole and nothing inside of its branches"
    if talking and branch.mode == "row":
        raise RuntimeError(
            f"{waits} in mode='row' a rank may keep no sample and not run it; use mode='subset' or "
            f"'batch', or, {unless}"
        )
    if talking and branch.mode == "batch" and ranks == "separate":
        raise RuntimeError(
            f"{waits} with ranks='separate' some would run it and others not; use ranks='shared' "
            f"or 'auto', mode='subset', or, {unless}"
        )
    if ranks != "auto":
        return ranks == "shared"
    return branch.mode == "batch" and (bool(talking) or sharded)
