"""``skip``: leave branches or blocks out for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..applied import names_in
from ..branch import Branch
from ..drop.force import left_out
from ..find import WHOLE
from .looks import Target, check_model, look_at, names_of, opened

__all__ = ["skip"]


@contextmanager
def skip(
    model: nn.Module, what: Target | Iterable[Target], example_inputs: Any = None
) -> Iterator[None]:
    """Leave branches or whole blocks out, in training and in evaluation, on this thread.

    A branch that is left out isn't computed; a block passes on its input. Everything else goes on
    as always, stochastic depth and the model's own DropPath included, and afterwards everything is
    as before. May be nested. Other threads see the whole model.

    Args:
        model: a model; stochastic depth need not be applied to it.
        what: names in this model of branches (``"layer3.1:conv1"``), globs on them, Branches, names
            of blocks (``"layer3.1"``), or a list of these. A block that returns a tensor of its
            input's shape is left out as a whole; of any other block, all branches are. (These
            differ where something follows the last sum, as the norm of a post-norm block does.)
        example_inputs: what the model is called with (a tensor, a tuple of arguments or a dict of
            keywords), to find what is named; made up where it is None. Not needed for branches of
            :func:`stochastic_depth.branches`.

    Raises:
        TypeError, ValueError: a name that stands for nothing, or for what cannot be left out.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
        >>> with sd.skip(model, "layer3.1"):
        ...     shallow = model(x)
        >>> torch.equal(model(x), shallow)
        False

    Note:
        Finding takes some forwards of the model, once for each ``with``, during which no other
        thread may run it: put it around the loop, or apply stochastic depth first (``p=0`` will
        do) and name its branches. In generation with a cache, which attention would not write, use
        :func:`stochastic_depth.shallow`.
    """
    check_model(model)
    names = names_of(model, what)
    known = _known(model, names)
    if known is not None:
        with left_out(known):
            yield
        return
    look = look_at(model, example_inputs, names)
    with opened(model, look, look.select(names)) as stands, left_out(stands.values()):
        yield


def _known(model: nn.Module, names: list[str]) -> list[Branch] | None:
    """The applied branches that are named, if all that is named is such."""
    named = {name: branch for branch, name in names_in(model).items()}
    found = [named.get(name, named.get(f"{name}:{WHOLE}")) for name in names]
    known = [branch for branch in found if branch is not None]
    return known if known and len(known) == len(found) else None
