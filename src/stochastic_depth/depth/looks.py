"""What can be left out of a model: its branches, its blocks, and what names stand for."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import BaseTorchFunctionMode

from .._torch import is_flat_parameter, tensor_leaves
from ..applied import names_in, sites
from ..branch import Branch, block_of, is_below, label_of, name_in_model
from ..drop.draws import Draws
from ..drop.layer import StochasticDepth
from ..drop.over import Aside, Over, WholeAside, skipped_in
from ..drop.slot import keep_slots
from ..find import WHOLE, find, find_blocks, guess_inputs
from ..find.plan import Findings, Plan
from ..install import remove
from ..new_forms import watch_block
from ..options import call_of
from ..trial import refuse_what_fails

__all__ = [
    "Inputs",
    "Look",
    "Target",
    "check_model",
    "inputs_of",
    "look_at",
    "names_of",
    "opened",
]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Target = str | Branch


@dataclass
class Look:
    """What one look at a model says can be left out.

    Attributes:
        found: its branches, and why others were refused.
        whole: whole blocks, by the same.
        blocks: the names of all blocks, in the order of execution.
        inputs: what the model was called with.
        layers: the names of its StochasticDepth layers.
    """

    found: Findings
    whole: Findings
    blocks: list[str]
    inputs: Inputs
    layers: list[str]

    @cached_property
    def wholes(self) -> dict[str, Branch]:
        """The blocks that can be left out as a whole, by name."""
        return {block_of(branch): branch for branch in self.whole.branches}

    def below(self, block: str) -> list[Branch]:
        """The branches in a block."""
        return [b for b in self.found.branches if is_below(block_of(b), block)]

    def refused_below(self, block: str) -> list[str]:
        """Why something in a block cannot be left out, by branch."""
        refused = [r for r in self.found.refused if is_below(block_of(r), block)]
        return [f"{r.name}: {r.reason}" for r in refused]

    def select(self, names: Iterable[str]) -> list[Branch]:
        """What names and globs stand for, in the order of execution.

        Raises:
            ValueError: something that selects nothing, with the reason.
        """
        chosen: dict[Branch, None] = {}
        for name in names:
            chosen |= dict.fromkeys(self._matching(name))
        if not chosen:
            raise ValueError("nothing to leave out: an empty list was given")
        return sorted(chosen, key=self._all().index)

    def _all(self) -> list[Branch]:
        return [*self.whole.branches, *self.found.branches]

    def _matching(self, item: str) -> list[Branch]:
        block = item.removesuffix(f":{WHOLE}")
        if block in self.wholes:
            return [self.wholes[block]]
        hits = [b for b in self.found.branches if fnmatchcase(b.name, item) or b.name == item]
        if hits:
            return hits
        hits = self.below(block) if ":" not in block else []
        if hits and (stays := self.refused_below(block)):
            raise ValueError(
                f"not all of {item!r} can be left out: name its branches. What stays: {stays[0]}"
            )
        if hits:
            return hits
        for refused in (*self.found.refused, *self.whole.refused):
            if refused.name in (item, f"{item}:{WHOLE}"):
                raise ValueError(f"{item!r} cannot be left out: {refused.reason}")
        known = [*self.blocks[:4], *[b.name for b in self.found.branches[:6]]]
        there = f"there are {', '.join(known)}" if known else f"none was found{self.about_layers()}"
        raise ValueError(f"{item!r} is no branch or block that can be left out; {there}")

    def about_layers(self) -> str:
        """What to do about StochasticDepth layers, if there are any."""
        if not self.layers:
            return ""
        return (
            f". The model has StochasticDepth layers ({', '.join(self.layers[:4])}), and no "
            "branches are looked for in them: skip() leaves a layer out, and to remove one, take "
            "it out of its list yourself"
        )


def names_of(model: nn.Module, what: Any) -> list[str]:
    """What is to be left out, by names and globs on the names in ``model`` as it is now.

    Raises:
        TypeError: it is nothing that names anything.
        ValueError: a branch of another model.
    """
    wanted = "what to leave out must be names, globs or Branches"
    if isinstance(what, str | Branch):
        what = [what]
    if not isinstance(what, Iterable):
        raise TypeError(f"{wanted}, got {what!r}")
    known, names = names_in(model), []
    for item in what:
        if isinstance(item, Branch):
            if item not in known:
                raise ValueError(f"{item!r} is not applied to this model (now): give its name")
            item = known[item]
        elif not isinstance(item, str):
            raise TypeError(f"{wanted}, got {item!r}")
        names.append(item)
    return names


def check_model(model: nn.Module) -> None:
    """Raise for what is no model, or one whose parameters are not all its own.

    Raises:
        TypeError: it is no module.
        ValueError: it is wrapped in DistributedDataParallel or sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                "the model is in DistributedDataParallel: give the module inside of it"
            )
        if kind.startswith(("FSDP", "FullySharded")) or kind == "OptimizedModule":
            raise ValueError(f"the model is in a {kind}: do this before it is wrapped")
    if any(is_flat_parameter(p) or type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ValueError("the model's parameters are sharded: do this before they are")


def inputs_of(model: nn.Module, example_inputs: Any) -> Inputs:
    """What to call a model with, without a cache, which would miss what is left out.

    Raises:
        ValueError: nothing is given, and nothing could be guessed.
    """
    if example_inputs is None:
        guess = guess_inputs(model)
        if guess is None:
            raise ValueError(
                f"{type(model).__name__} says too little of its inputs to run it: pass "
                "example_inputs"
            )
        args, kwargs = guess
    else:
        args, kwargs = call_of(example_inputs)
    if any(t.is_meta for t in tensor_leaves((args, kwargs))):
        raise ValueError("example_inputs are on the meta device, where there is nothing to compare")
    config = getattr(model, "config", None)
    takes_it = "use_cache" in inspect.signature(model.forward).parameters
    if takes_it and "use_cache" not in kwargs and hasattr(config, "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    return args, kwargs


def look_at(
    model: nn.Module, example_inputs: Any, names: Iterable[str] = (), inputs: Inputs | None = None
) -> Look:
    """Find the branches of a model and its blocks, and try them.

    Args:
        model: the model; its stochastic depth is left aside and is there again afterwards.
        example_inputs: what it is called with, or None to guess.
        names: of more modules, or branches, that may be blocks.
        inputs: the same as ``example_inputs``, as arguments and keywords.
    """
    args, kwargs = inputs or inputs_of(model, example_inputs)
    put_back = keep_slots(model)
    remove(model)
    try:
        found = find(model, args, kwargs, samples=None)
        found = refuse_what_fails(model, found, args, kwargs)
        blocks = blocks_of(model, found)
        modules = dict(model.named_modules())
        homes = [block_of(r) for r in found.refused]
        homes += [block_of(b) for b in found.branches]
        more = [n.removesuffix(f":{WHOLE}") for n in names]
        more = [n for n in more if n in modules and any(is_below(h, n) for h in homes)]
        wanted = list(dict.fromkeys([*blocks, *[n for n in more if n]]))
        whole = find_blocks(model, args, kwargs, wanted, samples=None)
    finally:
        put_back()
    layers = [name for name, m in model.named_modules() if isinstance(m, StochasticDepth)]
    return Look(found, whole, blocks, (args, kwargs), layers)


def blocks_of(model: nn.Module, found: Findings) -> list[str]:
    """The blocks of a model in the order of execution: items of a list of modules of one kind.

    A list whose items differ (T5's attention and feed-forward layers) is a part of a block.
    """
    modules = dict(model.named_modules())
    homes = list(dict.fromkeys(block_of(b) for b in found.branches))
    blocks: dict[str, None] = {}
    for home in homes:
        items = []
        parts = home.split(".") if home else []
        for i in range(len(parts), 0, -1):
            parent, name = modules[".".join(parts[: i - 1])], ".".join(parts[:i])
            if isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                items.append((name, parent))
        alike = [name for name, parent in items if _is_of_one_kind(parent, name, homes)]
        if items:
            blocks[alike[0] if alike else items[0][0]] = None
    return list(blocks)


def _is_of_one_kind(parent: nn.Module, item: str, homes: list[str]) -> bool:
    path = item.rpartition(".")[0]
    kinds = {
        type(child)
        for name, child in parent.named_children()
        if any(is_below(home, name_in_model(name, path)) for home in homes)
    }
    return len(kinds) == 1


@contextmanager
def opened(
    model: nn.Module, look: Look, chosen: Iterable[Branch], in_evaluation: bool = False
) -> Iterator[dict[Branch, Branch]]:
    """Slots for branches and blocks that can be skipped then, by what stands for each.

    In evaluation they can be weighed, too: the model's own drop modules, which would only hand on
    what comes, are not called.
    """
    by_name = {name: b for b, name in names_in(model).items()}
    own = {b: site for site in sites(model) for b in site.branches}
    stands: dict[Branch, Branch] = {}
    wanted: dict[tuple[str, bool], list[Branch]] = {}
    for branch in chosen:
        known = by_name.get(branch.name)
        if known is not None and known in own:
            stands[branch] = known
        else:
            wanted.setdefault((block_of(branch), branch.kind == "block"), []).append(branch)
    with ExitStack() as stack:
        if wanted and any(isinstance(m, nn.TransformerEncoder) for m in model.modules()):
            stack.enter_context(BaseTorchFunctionMode())  # else it gives its layers nested tensors
        for (name, is_whole), fresh in wanted.items():
            findings = look.whole if is_whole else look.found
            block = model.get_submodule(name)
            all_here = [b for b in findings.branches if block_of(b) == name]
            skipped = {f"{name}:{label_of(b)}": b for b in skipped_in(block)}
            named = skipped | by_name
            known_here = {b: named[b.name] for b in all_here if b.name in named}
            members = [known_here.get(b, b) for b in all_here]
            plans = {form: _with(plan, known_here) for form, plan in findings.plans[name].items()}
            draws = next((own[b].draws for b in members if b in own), Draws())
            kind = WholeAside if is_whole else Aside
            site = kind(block, members, plans, draws, watch_block, Findings())
            over = Over(site, frozenset(members) - own.keys())
            over.enter()
            site.replaces = in_evaluation
            stack.callback(over.leave)
            stands |= {b: known_here.get(b, b) for b in fresh}
        yield stands


def _with(plan: Plan, known: dict[Branch, Branch]) -> Plan:
    return replace(plan, branches=[known.get(b, b) for b in plan.branches])
