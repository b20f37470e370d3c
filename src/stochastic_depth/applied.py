"""The branches of a model, and the blocks that they are in."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .branch import Branch, label_of
from .drop.draws import Draws
from .drop.layer import StochasticDepth
from .drop.site import Site
from .drop.slot import outer_slot, slot_of
from .tables import table_html

__all__ = ["awaited", "branches", "draws_of", "is_applied", "names_in", "owners", "sites"]


def branches(model: nn.Module) -> list[Branch]:
    """The droppable branches of ``model`` in the order of execution; empty where there are none.

    Each call returns the same objects. A :class:`stochastic_depth.StochasticDepth` wrapper in the
    model is a branch, too. Notebooks show the list as a table.

    Example:
        >>> import torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), 0.2)
        >>> sd.branches(model)[-1]
        Branch('layer4.1:conv1', p=0.2, kind='identity', mode='batch')
        >>> sd.branches(model)[0].p = 0.0  # never drop the first
    """
    for name, module in model.named_modules():
        if isinstance(module, StochasticDepth):
            module.branch.name = name or "StochasticDepth"
    return _Listed(sorted(owners(model), key=lambda branch: branch.order))


class _Listed(list[Branch]):
    """A list that notebooks show as a table."""

    def _repr_html_(self) -> str:
        head = ("branch", "kind", "p", "mode", "modules", "decided", "dropped")
        lines = [
            (b.name, b.kind, f"{b.p:.3f}", b.mode, ", ".join(b.modules), *map(str, counts))
            for b in self
            for counts in [(b.decided, b.dropped)]
        ]
        return table_html([head, *lines])


def is_applied(model: nn.Module) -> bool:
    """Whether stochastic depth is applied to ``model``, or to a part of it.

    Example:
        >>> import torchvision, stochastic_depth as sd
        >>> sd.is_applied(sd.apply(torchvision.models.resnet18(), 0.2))
        True
    """
    return any(_site(module) is not None for module in model.modules())


def sites(model: nn.Module) -> Iterator[Site]:
    """The blocks with branches in ``model``."""
    for module in model.modules():
        site = _site(module)
        if isinstance(site, Site) and site.block is module:
            yield site


def names_in(model: nn.Module) -> dict[Branch, str]:
    """What the branches are called in ``model``: by where their blocks are in it now.

    A branch's own name is the one in the module that was given to ``apply``, which may be a part of
    ``model``, or may have been changed since.
    """
    found: dict[Branch, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, StochasticDepth):
            found[module.branch] = name or "StochasticDepth"
        site = _site(module)
        if isinstance(site, Site) and site.block is module:
            found |= {branch: f"{name}:{label_of(branch)}" for branch in site.branches}
    return found


def owners(model: nn.Module) -> dict[Branch, Site | StochasticDepth]:
    """What knows the modules of each branch in ``model``: the site of its block, or its wrapper."""
    found: dict[Branch, Site | StochasticDepth] = {
        m.branch: m for m in model.modules() if isinstance(m, StochasticDepth)
    }
    return found | {branch: site for site in sites(model) for branch in site.branches}


def awaited(model: nn.Module) -> Iterator[Any]:
    """What stands in the slots of modules whose first training call settles their branches."""
    for module in model.modules():
        yield from (site for site in _standing(module) if hasattr(site, "factor"))


def draws_of(model: nn.Module) -> list[Draws]:
    """Where the decisions of ``model`` are drawn, or will be, each source once."""
    found: list[Draws] = []
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            found.append(module.draws)
        for site in _standing(module):
            if hasattr(site, "factor"):
                found.append(site.settings.draws)
            elif isinstance(site, Site):
                found.append(site.draws)
    return list(dict.fromkeys(found))


def _site(module: nn.Module) -> object:
    site = None
    for site in _standing(module):
        if isinstance(site, Site):
            break
    return site


def _standing(module: nn.Module) -> Iterator[Any]:
    """What a call of ``module`` meets: a site, or something that stands before it and so on."""
    slot = outer_slot(module) or slot_of(module)
    site = None if slot is None else slot.site
    while site is not None:
        yield site
        site = getattr(site, "under", None)
