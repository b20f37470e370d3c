"""Where a model's drop decisions come from, and whether all ranks draw the same."""

import copy
import hashlib
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..branch import Branch
from .balance import stream
from .collectives import is_split, is_whole, needs_all_ranks
from .deck import Deck, deal
from .ranks import from_first_rank, is_distributed, rank, world_size
from .replay import Tape, may_be_recomputed, ticket_of

__all__ = ["ASIDE", "Draw", "Draws", "Ranks"]

ASIDE = -1  # in the memo of a deep copy that the library makes for itself: none that counts

Draw = Literal["auto", "independent", "balanced"]
Ranks = Literal["auto", "shared", "separate"]
Decision = int | bool  # a branch of "batch" mode is dropped or not; others get a seed for samples

_KINDS = "separate", "shared"  # by whether decisions are shared
_Source = str | tuple[str, str]  # what draws: one of these, or one of these and the name of a deck
_UNIT = 1 << 53  # uniform numbers are k / 2^53, exact in a float

IN_GRAPH = (
    "stochastic depth: seed=, ranks='shared', draw='balanced' and generator= cannot be used inside "
    "torch.compile of the whole model, nor for samples in compiled blocks, as a graph draws for "
    "itself; use torch's default generator (seed=None and torch.manual_seed), or mode='batch' and "
    "compile block by block"
)
SPLIT_IN_GRAPH = (
    "stochastic depth: ranks compute a branch together, and inside torch.compile of the whole "
    "model, or for samples in compiled blocks, each draws for itself; use mode='batch' and compile "
    "block by block"
)
_TRACED = (
    "stochastic depth: torch.jit.trace keeps what this call drops, for ever: call model.eval() "
    "before"
)


class Draws:
    """Draws the decisions of a model's branches.

    Independent decisions that are not shared come from torch's default generator, where there is no
    seed. All others have generators of their own, seeded when first needed: the process group may
    be initialised after the model is applied.

    Args:
        seed: the seed; None chooses one where it is needed.
        ranks: ``"shared"``, the same decisions on all ranks; ``"separate"``; or ``"auto"``, shared
            where a branch needs it.
        draw: ``"independent"``, each branch by itself; ``"balanced"``, equally many in every call
            of the model; or ``"auto"``, balanced where there are other ranks.
    """

    def __init__(
        self, seed: int | None = None, ranks: Ranks = "auto", draw: Draw = "independent"
    ) -> None:
        self.seed, self.ranks, self.draw = seed, ranks, draw
        self.tape = Tape()
        self.decks: dict[Branch, Deck] = {}  # of each branch that may be balanced with others
        self._generators: dict[_Source, torch.Generator] = {}
        self._alone: set[_Source] = set()  # those that were seeded before there were other ranks
        self._common: int | None = None  # the seed that is chosen where none is given
        self._shared: dict[Hashable, bool] = {}  # what was found for a block
        self._copies = 0

    @staticmethod
    def from_generator(generator: torch.Generator) -> "Draws":
        """Draws all decisions from ``generator``."""
        draws = Draws(seed=0)
        draws._generators = {"separate": generator}
        return draws

    def __deepcopy__(self, memo: dict[int, Any]) -> "Draws":
        """A copy draws for itself: a seeded teacher would otherwise drop what its student drops."""
        copied = Draws(self.seed, self.ranks, self.draw)
        memo[id(self)] = copied
        copied.decks = copy.deepcopy(self.decks, memo)
        if self.seed is not None:
            self._copies += ASIDE not in memo
            copied.seed = _mixed(self.seed, "copy", self._copies)
        return copied

    def deal(
        self,
        branches: Sequence[Branch],
        nodes: Mapping[Branch, frozenset[int]],
        costs: Sequence[float],
    ) -> None:
        """Say which branches are balanced with one another; see :func:`.deck.deal`."""
        before, dealt = self.decks, set(branches)
        self.decks = {b: deck for b, deck in before.items() if b not in dealt}
        for deck in deal(branches, nodes, costs):
            first = deck.branches[0]
            if first in before:
                deck.resume(before[first])
            self.decks |= dict.fromkeys(deck.branches, deck)

    def withdraw(self, branches: Iterable[Branch]) -> None:
        """Balance no more with these branches, which are removed."""
        for branch in branches:
            if branch in self.decks:
                self.decks.pop(branch).withdraw(branch)

    def decide(self, branches: Sequence[Branch], block: nn.Module) -> list[Decision]:
        """The decisions for one call of ``block``, in one draw.

        p = 0 and p = 1 need no number and draw none. Checkpointing that repeats the call gets the
        same ones.

        Raises:
            RuntimeError: with such decisions the ranks could wait for each other for ever, or a
                recomputed forward does not find its own again.
        """
        undecided = [branch for branch in branches if not branch.is_certain]
        if not undecided:
            return [branch.is_always for branch in branches]
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            warnings.warn(_TRACED, stacklevel=2)
        sources: dict[tuple[bool, bool], list[Branch]] = {}
        if self.draw != "balanced" and not is_distributed():  # the usual one, without a detour
            sources[self.ranks == "shared", False] = undecided
        else:
            balanced = block.training and self.is_balanced()
            for branch in undecided:
                in_deck = balanced and branch.decides_calls and branch in self.decks
                sources.setdefault((self._is_shared(branch, block), in_deck), []).append(branch)
        drawn: dict[Branch, Decision] = {}
        for (shared, in_deck), members in sources.items():
            drawn |= zip(members, self._draw(members, shared, in_deck), strict=True)
        return [drawn.get(branch, branch.is_always) for branch in branches]

    def is_balanced(self) -> bool:
        """Whether calls drop equally many branches now."""
        return self.draw == "balanced" or (self.draw == "auto" and world_size() > 1)

    def check_graph(self, branch: Branch, modules: Iterable[nn.Module]) -> None:
        """Raise inside of torch.compile where the decisions cannot be a part of the graph."""
        if self.seed is not None or self.ranks == "shared" or self.draw == "balanced":
            raise RuntimeError(IN_GRAPH)
        if is_distributed() and (
            branch.talks or any(is_split(m) for module in modules for m in module.modules())
        ):
            raise RuntimeError(SPLIT_IN_GRAPH)

    def _draw(self, branches: list[Branch], shared: bool, in_deck: bool) -> list[Decision]:
        generator = None if in_deck else self.generator(_KINDS[shared])
        draw = partial(self._from_decks, shared) if in_deck else partial(_from, generator)
        if not may_be_recomputed():
            return draw(branches)
        names = [branch.name for branch in branches]
        purpose = tuple((b.p, b.mode, b.decides_calls) for b in branches)
        default = generator is None and not in_deck
        return self.tape.decide(partial(draw, branches), names, purpose, default)

    def _from_decks(self, shared: bool, branches: list[Branch]) -> list[Decision]:
        return [self._is_dropped(branch, shared) for branch in branches]

    def _is_dropped(self, branch: Branch, shared: bool) -> bool:
        deck, kind = self.decks[branch], _KINDS[shared]
        generator = self.generator((kind, deck.name))
        assert generator is not None
        return deck.is_dropped(branch, kind, generator, 0 if shared else rank())

    def _is_shared(self, branch: Branch, block: nn.Module) -> bool:
        if not is_distributed():
            return self.ranks == "shared"
        key = branch.name, branch.mode, branch.talks
        if key not in self._shared:
            self._shared[key] = is_shared(self.ranks, branch, block)
        return self._shared[key]

    def generator(self, source: _Source) -> torch.Generator | None:
        """The generator of a source of decisions; None is torch's default one."""
        if source == "separate" and self.seed is None:
            return None
        if source in self._alone and is_distributed():
            self._generators = {s: g for s, g in self._generators.items() if s not in self._alone}
            self._alone, self._common = set(), None
        if source not in self._generators:
            self._generators[source] = self._seeded(source)
            if not is_distributed():
                self._alone.add(source)
        return self._generators[source]

    def _seeded(self, source: _Source) -> torch.Generator:
        if source == "separate":
            assert self.seed is not None
            return _seeded(_mixed(self.seed, rank()) if is_distributed() else self.seed)
        common = self._common_seed()
        if source == "shared":
            return _seeded(common)
        return stream(_mixed(common, *source))

    def _common_seed(self) -> int:
        """The given seed, or a number of torch's default generator, which the next model gets not.

        Where the call may be repeated, which chooses no seed again, the tape's ticket sees to that.
        """
        if self.seed is not None:
            return self.seed
        if self._common is None:
            self._common = ticket_of(default=may_be_recomputed())
            if is_distributed():
                self._common = from_first_rank(self._common)
        return self._common

    def state(self) -> dict[str, Any]:
        """The states of those generators that have been used: tensors, numbers, dicts and lists."""
        decks = {deck.name: deck for deck in self.decks.values()}
        state: dict[str, Any] = {"seed": self.seed, "ranks": self.ranks, "draw": self.draw}
        state |= {"common": self._common, "rank": rank(), "decks": {}}
        for source, generator in self._generators.items():
            if isinstance(source, str):
                state[source] = generator.get_state()
            else:
                kind, name = source
                deck = decks.get(name)
                now = {} if deck is None else deck.rounds[kind].state()
                state["decks"].setdefault(name, {})[kind] = [generator.get_state(), now]
        return state

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where a :meth:`state` is not one of such draws; another seed will do for a seed."""
        settings = "seed", "ranks", "draw"
        own = {name: getattr(self, name) for name in settings}
        saved = {name: state.get(name) for name in settings}
        if (own["seed"] is None) != (saved["seed"] is None) or own != saved | {"seed": self.seed}:
            raise ValueError(
                f"the state is that of a model with {saved}, and this one has {own}: apply "
                "stochastic depth as it was when the state was saved"
            )

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state`, in which tensors may have become lists."""
        self.seed = state["seed"]
        self._alone.clear()  # what is restored is not seeded again
        self._common = state["common"]
        self._generators = {kind: _restored(state[kind]) for kind in _KINDS if kind in state}
        if "separate" in self._generators and state.get("rank", rank()) != rank():
            number = int(torch.randint(1 << 62, (), generator=self._generators["separate"]))
            self._generators["separate"] = _seeded(_mixed(number, rank()))
        decks = {deck.name: deck for deck in self.decks.values()}
        for name, by_kind in state["decks"].items():
            deck = decks.get(name)
            for kind, (generator, now) in by_kind.items():
                self._generators[kind, name] = _restored(generator)
                if deck is not None:
                    deck.rounds[kind].set_state(now)


def _from(generator: torch.Generator | None, branches: list[Branch]) -> list[Decision]:
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(_UNIT, (len(branches),), generator=generator, device=device)
    return [
        n / _UNIT < b.p if b.decides_calls else n
        for n, b in zip(drawn.tolist(), branches, strict=True)
    ]


def _restored(state: Any) -> torch.Generator:
    return torch.Generator().set_state(torch.as_tensor(state, dtype=torch.uint8, device="cpu"))


def _seeded(seed: int) -> torch.Generator:
    """A generator; torch's looks at the lower 32 bits of its seed."""
    return torch.Generator().manual_seed(seed if 0 <= seed < 1 << 32 else _mixed(seed))


def _mixed(*numbers: Hashable) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def is_shared(ranks: Ranks, branch: Branch, block: nn.Module) -> bool:
    """Whether all ranks must draw the same decisions for a branch, or shall.

    A rank that drops a branch does not run its modules. Where these talk to the other ranks
    (a module inside that is sharded by itself, SyncBatchNorm, tensor parallelism, collectives
    written by hand), all ranks have to run them, or none; and on the same samples, which several
    ranks may compute together.

    Raises:
        RuntimeError: the ranks could wait for each other for ever.
    """
    talking, better = needs_all_ranks(branch, block)
    waits = f"{branch.name} runs a {talking}, which waits for the other ranks, and"
    unless = "if it is FSDP's, shard the block as a whole and nothing inside of its branches"
    if is_whole(branch):
        unless = "if it is FSDP2's, drop the branches of the block and not the whole of it"
    if talking and branch.mode == "row":
        raise RuntimeError(
            f"{waits} in mode='row' a rank may keep no sample and not run it; use mode='subset' or "
            f"'batch', or, {unless}"
        )
    if talking and ranks == "separate":
        raise RuntimeError(
            f"{waits} with ranks='separate' some would run it and others not, or on other samples; "
            f"use ranks='shared' or 'auto', or, {unless}"
        )
    if ranks != "auto":
        return ranks == "shared"
    return bool(talking) or (branch.mode == "batch" and better)
