"""Where a model's coins come from, and whether all ranks toss the same."""

import hashlib
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn import SyncBatchNorm

from .sampling import PRIVATE_IN_GRAPH, Mode

__all__ = [
    "Coins",
    "Sharing",
    "check_sharing",
    "is_distributed",
    "is_flattened",
    "is_view_of_flat",
    "is_wrapper",
]

Sharing = Literal["auto", "shared", "separate"]


def check_sharing(sharing: str) -> Sharing:
    """``sharing``, if it is one of the choices."""
    if sharing not in get_args(Sharing):
        raise ValueError(f"coins must be one of {get_args(Sharing)}, got {sharing!r}")
    return sharing  # type: ignore[return-value]


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized()


class Coins:
    """The generators that a model draws its coins from.

    Coins that are not shared come from torch's default generator, where there is no seed. All
    others have a generator of their own, seeded when first needed: the process group may be
    initialised after the model is applied.

    Args:
        seed: the seed; None chooses one for shared coins and needs none for others.
        sharing: ``"shared"``, the same coins on all ranks; ``"separate"``; or ``"auto"``, shared
            where a branch needs it.
    """

    def __init__(self, seed: int | None = None, sharing: Sharing = "auto") -> None:
        self.seed = seed
        self.sharing = sharing
        self._generators: dict[bool, torch.Generator] = {}  # by whether shared
        self._alone: set[bool] = set()  # those that were seeded before there were other ranks
        self._shared: dict[Hashable, bool] = {}  # what was found for a branch

    def of(
        self,
        mode: Mode,
        modules: Callable[[], Iterable[nn.Module]],
        block: nn.Module,
        name: str,
    ) -> torch.Generator | None:
        """The generator for a branch of ``block`` that runs ``modules``; None is torch's own.

        Raises:
            RuntimeError: with these coins the ranks could wait for each other for ever.
        """
        if torch.compiler.is_compiling():
            if self.seed is not None or self.sharing == "shared":
                raise RuntimeError(PRIVATE_IN_GRAPH)
            return None
        if not is_distributed():
            return self.generator(self.sharing == "shared")
        key = name, mode, type(block)
        if key not in self._shared:
            self._shared[key] = _is_shared(self.sharing, mode, modules(), block, name)
        return self.generator(self._shared[key])

    def generator(self, shared: bool) -> torch.Generator | None:
        """The generator of coins that are ``shared`` or not; None is torch's default one."""
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
            return self.seed if alone else _seed_of_rank(self.seed, distributed.get_rank())
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


def _seed_of_rank(seed: int, rank: int) -> int:
    digest = hashlib.blake2b(repr((seed, rank)).encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def _is_shared(
    sharing: Sharing, mode: Mode, modules: Iterable[nn.Module], block: nn.Module, name: str
) -> bool:
    """Whether all ranks must toss the same coins for a branch, or shall.

    A rank that drops a branch does not run its modules. Where these talk to the other ranks
    (a module inside that is sharded by itself, SyncBatchNorm), all ranks have to run them, or none.

    Args:
        sharing: what was asked for.
        mode: how the branch is dropped.
        modules: what the branch runs.
        block: the module with the branch.
        name: what to call the branch in an error.

    Raises:
        RuntimeError: the ranks could wait for each other for ever.
    """
    inside = [m for module in modules for m in module.modules() if m is not block]
    talking = next((type(m).__name__ for m in inside if _talks(m)), None)
    if talking is not None and mode == "row":
        raise RuntimeError(
            f"{name} runs a {talking}, which waits for the other ranks, and in mode='row' a rank "
            "may keep no row and not run it; use mode='subset' or 'batch', or, if it is FSDP's, "
            "shard the block as a whole and nothing inside of its branches"
        )
    if talking is not None and mode == "batch" and sharing == "separate":
        raise RuntimeError(
            f"{name} runs a {talking}, which waits for the other ranks, and with coins='separate' "
            "some would run it and others not; use coins='shared' or 'auto', mode='subset', or, "
            "if it is FSDP's, shard the block as a whole and nothing inside of its branches"
        )
    if sharing != "auto":
        return sharing == "shared"
    return mode == "batch" and (talking is not None or _is_sharded(block))


def _talks(module: nn.Module) -> bool:
    return isinstance(module, SyncBatchNorm) or _is_unit(module)


def _is_unit(module: nn.Module) -> bool:
    """Whether FSDP gathers the parameters of ``module`` when it is called."""
    return is_wrapper(module) or any(
        _is_a(module, package, "FSDPModule")
        for package in ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")
    )


def is_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is a wrapper of FSDP1."""
    return _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def _is_a(module: nn.Module, package: str, name: str) -> bool:
    # Slow to import, and not imported where it is not used.
    return isinstance(module, getattr(sys.modules.get(package), name, ()))


def _is_sharded(block: nn.Module) -> bool:
    """Whether the parameters of ``block`` are sharded, seen from inside of its forward."""
    if any(map(_is_unit, block.modules())):
        return True
    return any(is_view_of_flat(t) for m in block.modules() for t in _tensors(m))


def _tensors(module: nn.Module) -> Iterable[Any]:
    return (*module._parameters.values(), *module.__dict__.values())


def is_view_of_flat(value: Any) -> bool:
    """Whether ``value`` is what FSDP1 puts in a parameter's place during the forward."""
    return isinstance(value, Tensor) and getattr(value._base, "_is_flat_param", False)


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has made ``parameter`` a part of a flat one, or it is such a flat one."""
    return any(getattr(parameter, name, False) for name in ("_is_flat_param", "_fsdp_flattened"))
