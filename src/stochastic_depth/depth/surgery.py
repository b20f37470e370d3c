"""Take blocks out of their lists, and branches out of their blocks, so that it can be undone."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..branch import Branch, block_of, name_in_model
from ..find.plan import Findings, Gate
from .removed import Removed

__all__ = ["Cuts", "Undo", "cut_blocks", "cut_branches", "cut_parameters", "held_by"]

_INDICES = {
    "layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "layer_i", "block_idx",
    "idx", "depth_idx",
}  # fmt: skip


class Undo:
    """Dicts and tensors as they were before they were changed."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[dict[Any, Any], dict[Any, Any]]] = {}
        self._tensors: list[tuple[Tensor, Tensor]] = []

    def keep(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """``values``, which may be changed from now on."""
        self._kept.setdefault(id(values), (values, dict(values)))
        return values

    def keep_tensor(self, tensor: Tensor) -> None:
        """A tensor that may be changed from now on."""
        self._tensors.append((tensor, tensor.detach().clone()))

    def add(self, later: "Undo") -> None:
        """What was changed after all that is here."""
        self._tensors += later._tensors
        for key, kept in later._kept.items():
            self._kept.setdefault(key, kept)

    def put_back(self) -> None:
        """All as before."""
        for values, before in self._kept.values():
            values.clear()
            values.update(before)
        with torch.no_grad():
            for tensor, value in reversed(self._tensors):
                tensor.copy_(value)


class Cuts:
    """What became of lists of blocks.

    Attributes:
        kept: by list, how many it had and the old numbers of those that stay.
        keys: by list, the new key of each item that stays.
    """

    def __init__(self, keys: dict[str, dict[str, str]] | None = None) -> None:
        self.kept: dict[str, tuple[int, list[int]]] = {}
        self.keys = keys or {}

    def name(self, old: str) -> str:
        """What a name that is still there has become."""
        for home in sorted(self.keys, key=len, reverse=True):
            prefix = f"{home}." if home else ""
            key, dot, rest = old[len(prefix) :].partition(".")
            if old.startswith(prefix) and key in self.keys[home]:
                old = prefix + self.keys[home][key] + dot + rest
        return old

    def old_name(self, new: str) -> str:
        """What it was before."""
        for home in sorted(self.keys, key=len):
            prefix = f"{home}." if home else ""
            key, dot, rest = new[len(prefix) :].partition(".")
            olds = [old for old, now in self.keys[home].items() if now == key]
            if new.startswith(prefix) and olds:
                new = prefix + olds[0] + dot + rest
        return new


def held_by(model: nn.Module, block: str) -> nn.Module | None:
    """The list that a block is an item of."""
    parent = model.get_submodule(block.rpartition(".")[0])
    lists = nn.ModuleList | nn.Sequential | nn.ModuleDict
    return parent if isinstance(parent, lists) else None


def cut_blocks(model: nn.Module, blocks: Iterable[str], undo: Undo) -> Cuts:
    """Take blocks out of their lists; what comes after them moves up.

    Raises:
        ValueError: a block is in no list.
    """
    cuts = Cuts()
    by_list: dict[str, list[str]] = {}
    for block in blocks:
        if held_by(model, block) is None:
            raise ValueError(
                f"{block!r} is in no ModuleList or Sequential that it could be taken out of: name "
                "its branches"
            )
        home, _, key = block.rpartition(".")
        by_list.setdefault(home, []).append(key)
    for home in sorted(by_list, key=len, reverse=True):  # names from the outside stay right
        keys = by_list[home]
        held = undo.keep(model.get_submodule(home)._modules)
        old = list(held)
        kept = [i for i, key in enumerate(old) if key not in keys]
        numbered = old == [str(i) for i in range(len(old))]
        items = [(old[i], held[old[i]]) for i in kept]
        held.clear()
        cuts.keys[home] = {}
        for new, (key, module) in enumerate(items):
            name = str(new) if numbered else key
            held[name] = module
            cuts.keys[home][key] = name
            if module is not None and numbered and str(new) != key:
                _renumber(module, int(key), new, undo)
        cuts.kept[home] = len(old), kept
    return cuts


def _renumber(module: nn.Module, old: int, new: int, undo: Undo) -> None:
    for m in module.modules():
        own = vars(m)
        for name in _INDICES & own.keys():
            if type(own[name]) is int and own[name] == old:
                undo.keep(own)[name] = new


def cut_branches(
    model: nn.Module, chosen: Iterable[Branch], findings: Findings, cuts: Cuts, undo: Undo
) -> list[str]:
    """Put :class:`Removed` where only these branches call a module; the old names of those.

    Raises:
        ValueError: a branch cannot be taken out alone.
    """
    gone: list[str] = []
    by_block: dict[str, list[Branch]] = {}
    for branch in chosen:
        if branch.joins:
            raise ValueError(
                f"{branch.name} is no term of a plain sum, so it cannot be taken out of its block; "
                "skip() leaves it out"
            )
        by_block.setdefault(block_of(branch), []).append(branch)
    for block, branches in by_block.items():
        called: dict[str, list[tuple[Branch | None, Gate, Any]]] = {}
        for plan in findings.plans[block].values():
            for path, gates in plan.gates.items():
                for gate in gates:
                    owner = None if gate.branch is None else plan.branches[gate.branch]
                    dtype = None if gate.branch is None else plan.dtypes.get(gate.branch)
                    called.setdefault(path, []).append((owner, gate, dtype))
        for branch in branches:
            gone += _cut_branch(model, branch, branches, called, cuts, undo)
    return list(dict.fromkeys(gone))


def _cut_branch(
    model: nn.Module, branch: Branch, others: list[Branch], called: Any, cuts: Cuts, undo: Undo
) -> list[str]:
    block = block_of(branch)
    own = [
        path
        for path, calls in called.items()
        if path and calls[0][0] is branch and all(owner in others for owner, _, _ in calls)
    ]
    if all(called[path][0][1].drops for path in own):
        raise ValueError(
            f"{branch.name} shares all of its modules with something that stays, so it cannot be "
            "taken out; skip() leaves it out"
        )
    order = {name: i for i, name in enumerate(branch.modules)}
    own.sort(key=lambda path: order.get(name_in_model(path, block), -1))
    makers = [path for path in own if not called[path][0][1].drops]
    has_last = any(gate.last for path in makers for _, gate, _ in called[path])
    for path in own:
        _, gate, dtype = called[path][0]
        parent, _, key = name_in_model(path, block).rpartition(".")
        holder = model.get_submodule(cuts.name(parent))
        if gate.drops:
            made: nn.Module = nn.Identity().train(holder.training)
        else:
            # A shared module without weights may come last; it hands on what it is given.
            last = gate.last or (not has_last and path == makers[-1])
            made = Removed(holder.get_submodule(key), branch, gate, last, dtype)
        undo.keep(holder._modules)[key] = made
    return [name_in_model(path, block) for path in own]


def cut_parameters(model: nn.Module, chosen: Iterable[Branch], cuts: Cuts, undo: Undo) -> list[str]:
    """Take out the parameters that blocks read themselves for these branches; their old names."""
    names = []
    for branch in chosen:
        block = block_of(branch)
        for weight in branch.weights:
            name = name_in_model(weight, block)
            home, _, key = name.rpartition(".")
            try:
                holder = model.get_submodule(cuts.name(home))
            except AttributeError:  # its module is gone
                continue
            if holder._parameters.get(key) is not None:
                undo.keep(holder._parameters)[key] = None
                names.append(name)
    return names
