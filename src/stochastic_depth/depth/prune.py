"""``prune`` and ``shallow``: a model with less depth, in place or beside the whole one."""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ..applied import branches as applied_branches
from ..branch import Branch, block_of, is_below
from ..drop.draws import ASIDE
from ..drop.slot import keep_slots
from ..find import WHOLE
from ..install import remove
from .choose import Keep, Ranking, to_remove
from .compare import difference, is_handed_on, output_of
from .configs import configured, follow, rebuilt
from .fold import fold
from .looks import Look, Target, check_model, items_of, look_at
from .record import CONFIG_KEY, KEY, Pruned, pruned
from .surgery import Cuts, Undo, cut_blocks, cut_branches, cut_parameters, held_by

__all__ = ["prune", "shallow"]

M = TypeVar("M", bound=nn.Module)


def prune(
    model: M,
    keep: Keep | None = None,
    *,
    remove: Target | Iterable[Target] | Pruned | None = None,
    by: Ranking | None = None,
    example_inputs: Any = None,
    config: bool = True,
) -> M:
    """Take blocks or branches out of a model for good, in place.

    Blocks leave their ModuleList or Sequential, and those after them move up. In transformers'
    models the layers' numbers and the configuration follow, so ``save_pretrained``,
    ``from_pretrained`` and generation work as always, without this library. If only a branch is
    removed, its modules and parameters go and its block stays. A transformers configuration lists
    such branches as ``pruned_branches``; a model made from it has to be pruned with
    ``remove=config.pruned_branches`` before its weights are loaded.

    Stochastic depth is removed first (``scale="eval"`` is folded into the weights); apply it again
    to go on training with it. Before anything is final, the result is compared bit for bit, on
    ``example_inputs``, with the model that skips the same. If they differ, or anything else goes
    wrong, the model is left as it was.

    Args:
        model: the model.
        keep: how many blocks stay (or branches, if ``by`` ranks branches): the most important ones,
            or evenly spaced ones if there is no ranking. Or which ones: the numbers of blocks in
            order of execution, ``range(k)`` for the first k, or names.
        remove: what goes instead: names of blocks (``"layer3.1"``) or branches
            (``"layer3.1:conv1"``), globs, Branches, or what :func:`pruned` says of another model.
        by: a ranking for ``keep``: what :func:`importance` returned, or a list of names, the least
            important first.
        example_inputs: what the model is called with (a tensor, a tuple of arguments or a dict of
            keywords); made up where it is None.
        config: whether a transformers configuration follows, and is tried: a model made of it,
            with the pruned weights, has to give the same. False leaves it as it is.

    Returns:
        The model; :func:`pruned` says what was removed, and the new names.

    Raises:
        TypeError, ValueError: a name that stands for nothing or for what cannot be removed, more
            or less to keep than there is, a model in DistributedDataParallel or FSDP, a
            configuration that cannot follow.
        RuntimeError: the pruned model computes something else than the one that skips.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = torchvision.models.resnet50()
        >>> before = sum(p.numel() for p in model.parameters())
        >>> model = sd.prune(model, keep=10)
        >>> sum(p.numel() for p in model.parameters()) < 0.7 * before
        True

    Reference:
        Fan et al., Reducing Transformer Depth on Demand with Structured Dropout, ICLR 2020
        (arXiv:1909.11556): every other layer left out after training.
    """
    check_model(model)
    _prune(model, keep, remove, by, example_inputs, config, is_shared=False)
    return model


def shallow(
    model: M,
    keep: Keep | None = None,
    *,
    remove: Target | Iterable[Target] | Pruned | None = None,
    by: Ranking | None = None,
    example_inputs: Any = None,
    config: bool = True,
) -> M:
    """A shallower view of a model: the same parameters and buffers, less depth.

    The model stays as it was, and training one trains the other. With transformers, pass a view as
    ``model.generate(..., assistant_model=view)``: the tokens are those of the model alone.
    ``range(k)`` keeps the first k blocks: an early exit.

    Args:
        model: the model.
        keep: which blocks stay, or how many; this and the others as in :func:`prune`.
        remove: what goes instead.
        by: a ranking for ``keep``.
        example_inputs: what the model is called with.
        config: whether a transformers configuration follows.

    Returns:
        A model of the same type.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`prune`.

    Example:
        >>> import torch, torchvision, stochastic_depth as sd
        >>> model = torchvision.models.vit_b_16(image_size=32)
        >>> view = sd.shallow(model, keep=range(4), example_inputs=torch.randn(1, 3, 32, 32))
        >>> len(model.encoder.layers), len(view.encoder.layers)
        (12, 4)
        >>> view.conv_proj.weight is model.conv_proj.weight
        True

    Reference:
        Elhoushi et al., LayerSkip, ACL 2024 (arXiv:2404.16710), for a model that drafts for itself.
    """
    check_model(model)
    shared: dict[int, Any] = {ASIDE: None}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            shared[id(tensor)] = tensor
    view = copy.deepcopy(model, shared)
    _prune(view, keep, remove, by, example_inputs, config, is_shared=True)
    return view


def _prune(
    model: nn.Module, keep: Any, remove_: Any, by: Any, example_inputs: Any, config: bool,
    is_shared: bool,
) -> None:  # fmt: skip
    if (keep is None) == (remove_ is None):
        raise TypeError("give either keep= or remove=")
    if by is not None and keep is None:
        raise TypeError("by= ranks what to keep: give keep= with it, or remove= alone")
    if isinstance(remove_, Pruned):
        remove_ = remove_.removed
    weights = {
        b.name: 1.0 - b.p for b in applied_branches(model) if b.scale == "eval" and b.p > 0.0
    }
    put_back, undo = keep_slots(model), Undo()
    remove(model)
    try:
        names = _names(remove_)
        look = look_at(model, example_inputs, names)
        chosen = look.select(remove_ if keep is None else to_remove(model, look, keep, by))
        fold(model, look, weights, undo, is_shared)
        chosen = _outermost(chosen)
        _check_rest(look, chosen)
        with_blocks = _with_empty_blocks(model, look, chosen)
        attempt = Undo()
        try:
            gone, cuts = _cut(model, look, with_blocks, attempt, config)
        except Exception:
            attempt.put_back()
            if with_blocks == chosen:
                raise
            with_blocks = chosen  # the empty blocks have to stay
            gone, cuts = _cut(model, look, chosen, undo, config)
        undo.add(attempt)
        _keep_record(model, with_blocks, gone, cuts, undo)
    except BaseException:
        undo.put_back()
        put_back()
        raise


def _names(what: Any) -> list[str]:
    items = [] if what is None else items_of(what)
    names = [item.name if isinstance(item, Branch) else item for item in items]
    return [name.removesuffix(f":{WHOLE}") for name in names if isinstance(name, str)]


def _outermost(chosen: list[Branch]) -> list[Branch]:
    """Without what is in a block that goes as a whole."""
    blocks = [block_of(b) for b in chosen if b.kind == "block"]
    return [
        b
        for b in chosen
        if not any(
            block_of(b).startswith(f"{block}.") or (block_of(b) == block and b.kind != "block")
            for block in blocks
        )
    ]


def _check_rest(look: Look, chosen: list[Branch]) -> None:
    """Raise where no branch would be left."""
    blocks = [block_of(b) for b in chosen if b.kind == "block"]
    rest = [
        b
        for b in look.found.branches
        if b not in chosen and not any(is_below(block_of(b), block) for block in blocks)
    ]
    if not rest:
        raise ValueError(
            f"nothing would be left: the model has {len(look.found.branches)} branches, and at "
            "least one has to stay"
        )


def _with_empty_blocks(model: nn.Module, look: Look, chosen: list[Branch]) -> list[Branch]:
    """The same, with blocks that lose all of their branches, and hand on their input then."""
    empty = [
        name
        for name in look.blocks
        if name in look.wholes
        and held_by(model, name) is not None
        and not look.refused_below(name)
        and set(look.below(name)) <= set(chosen)
        and look.below(name)
    ]
    if not empty:
        return chosen
    same = is_handed_on(model, look, chosen, empty)
    return _outermost([*[look.wholes[n] for n in empty if n in same], *chosen])


def _cut(
    model: nn.Module, look: Look, chosen: list[Branch], undo: Undo, config: bool
) -> tuple[list[str], Cuts]:
    """Cut, compare with skipping the same at every step; the old names of what went."""
    blocks = [b for b in chosen if b.kind == "block"]
    alone = [b for b in chosen if b.kind != "block"]
    gone = [block_of(b) for b in blocks]
    wanted = output_of(model, look, blocks) if blocks else None
    wanted_alone = output_of(model, look, chosen) if alone else None
    cuts = cut_blocks(model, gone, undo)
    left = [n for n in look.blocks if not any(is_below(n, block) for block in gone)]
    names = {name: cuts.name(name) for name in left}
    if config:
        follow(model, cuts, undo)
    if blocks:
        _check(model, look, wanted, "blocks", names)
        if config and configured(model) is model and not _has_adapters(model):
            again = rebuilt(model)
            given = [output_of(m, look, blocks=names) for m in (again, model)]
            problem = difference(*given)
            if problem:
                raise ValueError(
                    f"a {type(model).__name__} made of the configuration of the pruned one gives "
                    f"something else ({problem}): its layers differ in a way that the "
                    "configuration cannot say of these; remove others, or branches, or give "
                    "config=False"
                )
    if alone:
        gone += cut_branches(model, alone, look.found, cuts, undo)
        of_parameters = Undo()
        parameters = cut_parameters(model, alone, cuts, of_parameters)
        try:
            _check(model, look, wanted_alone, "branches", names)
        except RuntimeError:
            of_parameters.put_back()
            if not parameters:
                raise
            # Something else looks at them: they stay.
            _check(model, look, wanted_alone, "branches", names)
        else:
            undo.add(of_parameters)
            gone += parameters
        if config and configured(model) is model:  # saved with it, for whoever loads it
            own = undo.keep(vars(model.config))
            now = [cuts.name(block_of(b)) + ":" + b.name.partition(":")[2] for b in alone]
            own[CONFIG_KEY] = [*own.get(CONFIG_KEY, ()), *now]
    return gone, cuts


def _check(model: nn.Module, look: Look, wanted: Any, what: str, names: dict[str, str]) -> None:
    try:
        problem = difference(output_of(model, look, blocks=names), wanted)
    except Exception as error:
        raise RuntimeError(
            f"the model fails without these {what}, and is as it was: {type(error).__name__}: "
            f"{error}"
        ) from error
    if problem:
        raise RuntimeError(
            f"without these {what} the model computes something else than when it skips them "
            f"({problem}), so it is as it was: something else depends on them"
        )


def _has_adapters(model: nn.Module) -> bool:
    return any(type(m).__module__.startswith("peft.") for m in model.modules())


def _keep_record(
    model: nn.Module, chosen: list[Branch], gone: list[str], cuts: Cuts, undo: Undo
) -> None:
    before = pruned(model)
    steps: list[Any] = list(vars(model).get(KEY, {}).get("steps", ()))
    removed = [b.name.removesuffix(f":{WHOLE}") for b in chosen]
    for step in reversed(steps):
        removed = [_old_name(name, Cuts(step)) for name in removed]
    names = {name: name for name in _all_names(model, cuts)} if before is None else before.names
    kept = {
        first: cuts.name(now)
        for first, now in names.items()
        if not any(now == name or now.startswith(f"{name}.") for name in gone)
    }
    undo.keep(vars(model))[KEY] = {
        "removed": [*(before.removed if before else ()), *removed],
        "names": kept,
        "steps": [*steps, cuts.keys],
    }


def _old_name(name: str, cuts: Cuts) -> str:
    block, colon, label = name.partition(":")
    return cuts.old_name(block) + colon + label


def _all_names(model: nn.Module, cuts: Cuts) -> list[str]:
    """The old names of what is left."""
    named = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    return [cuts.old_name(name) for values in named for name, _ in values]
