"""``prune`` and ``shallow``: a model with less depth, in place or beside the whole one."""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ..applied import names_in, sites
from ..branch import Branch, block_of, is_below
from ..drop.draws import ASIDE
from ..drop.force import forced
from ..drop.over import check_not_skipped
from ..drop.slot import keep_slots
from ..find import WHOLE
from ..install import remove
from .choose import Keep, Ranking, to_remove
from .compare import difference, is_handed_on, output_of
from .configs import follow, follow_branches, own_configs
from .fold import fold, is_close
from .looks import Look, Target, check_model, look_at, names_of
from .rebuilt import check_configs
from .record import Pruned, keep_record
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
    ``remove=config.pruned_branches`` before its weights are loaded. The pruned model gets a
    configuration of its own, as others may have the one from before.

    Stochastic depth is removed first; apply it again to go on training with it. What
    ``scale="eval"`` counts less in evaluation is multiplied into weights that the branch, or the
    whole block, is linear in; where there are none, that is an error. Before anything is final, the
    result is compared bit for bit, on ``example_inputs``, with the model that skips the same. If
    they differ, or anything else goes wrong, the model is left as it was.

    Args:
        model: the model.
        keep: how many blocks stay (or branches, if ``by`` ranks branches): the most important ones,
            or evenly spaced ones if there is no ranking. Or which ones: the numbers of blocks in
            order of execution, ``range(k)`` for the first k, or names.
        remove: what goes instead: names of blocks (``"layer3.1"``) or branches
            (``"layer3.1:conv1"``) in this model, globs, Branches of
            :func:`stochastic_depth.branches`, or what :func:`pruned` says of another model.
        by: a ranking for ``keep``: what :func:`importance` returned, or a list of names, the least
            important first.
        example_inputs: what the model is called with (a tensor, a tuple of arguments or a dict of
            keywords); made up where it is None.
        config: whether the configurations of transformers models, also inside of others, follow
            and are tried: a model made of one, with the pruned weights, has to give the same. False
            leaves them as they are.

    Returns:
        The model; :func:`pruned` says what was removed, and the new names.

    Raises:
        TypeError, ValueError: a name that stands for nothing or for what cannot be removed, more
            or less to keep than there is, a model in DistributedDataParallel or FSDP, a
            configuration that cannot follow, a weight in evaluation that cannot be folded, or that
            ``example_inputs`` do not reach.
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
    names = _names(model, keep, remove, by)
    check_not_skipped(model, "prune() is called")
    _prune(model, keep, names, by, example_inputs, config, is_shared=False)
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

    The model stays as it was, and training one trains the other. Only weights that ``scale="eval"``
    is folded into are copies, which are trained apart. With transformers, pass a view as
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
    names = _names(model, keep, remove, by)
    shared: dict[int, Any] = {ASIDE: None}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            shared[id(tensor)] = tensor
    view = copy.deepcopy(model, shared)
    _prune(view, keep, names, by, example_inputs, config, is_shared=True)
    return view


def _names(model: nn.Module, keep: Any, remove_: Any, by: Any) -> list[str]:
    """What is to go, by its names in the model; nothing where ``keep`` says it."""
    check_model(model)
    if (keep is None) == (remove_ is None):
        raise TypeError("give either keep= or remove=")
    if by is not None and keep is None:
        raise TypeError("by= ranks what to keep: give keep= with it, or remove= alone")
    if isinstance(remove_, Pruned):
        remove_ = remove_.removed
    return [] if remove_ is None else names_of(model, remove_)


def _prune(
    model: nn.Module, keep: Any, names: list[str], by: Any, example_inputs: Any, config: bool,
    is_shared: bool,
) -> None:  # fmt: skip
    put_back, undo = keep_slots(model), Undo()
    try:
        look = look_at(model, example_inputs, names)
        chosen = look.select(names if keep is None else to_remove(model, look, keep, by))
        _fold(model, look, chosen, undo, is_shared)
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
        keep_record(model, with_blocks, gone, cuts, undo)
    except BaseException:
        undo.put_back()
        put_back()
        raise


def _fold(model: nn.Module, look: Look, chosen: list[Branch], undo: Undo, is_shared: bool) -> None:
    """Remove stochastic depth; what evaluation counts less of what stays goes to the weights."""
    names, applied = names_in(model), [b for site in sites(model) for b in site.branches]
    counted = {names[b]: b for b in applied if b.scale == "eval" and b.is_active}
    found = {b.name: b for b in (*look.whole.branches, *look.found.branches)}
    gone = [block_of(b) for b in chosen if b.kind == "block"]
    weights: dict[Branch, float] = {}
    for name, branch in counted.items():
        if found.get(name) in chosen or any(is_below(name.partition(":")[0], g) for g in gone):
            continue
        if name not in found:
            raise ValueError(
                f"scale='eval' counts {name} {1.0 - branch.p:.3g} times in evaluation, and a run "
                "on these inputs does not show where: give example_inputs that reach it, set its "
                "p to 0, or train with scale='train'"
            )
        weights[found[name]] = 1.0 - branch.p
    if not weights:
        remove(model)
        return
    blocks = {n: n for n in look.blocks if f"{n}:{WHOLE}" not in counted}  # hooks are within those
    of_name = {branch.name: weight for branch, weight in weights.items()}
    with forced({b: (False, of_name.get(name, 1.0)) for name, b in counted.items()}):
        wanted = output_of(model, look, blocks=blocks)
    remove(model)
    fold(model, look, weights, undo, is_shared)
    if not is_close(output_of(model, look, blocks=blocks), wanted, 2**12):
        raise ValueError(
            "scale='eval' cannot become a part of the weights: the model computes something else "
            "in evaluation then; set the branches' p to 0, or train with scale='train'"
        )


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
        and _is_used_up(model, name, look.below(name))
    ]
    if not empty:
        return chosen
    same = is_handed_on(model, look, chosen, empty)
    return _outermost([*[look.wholes[n] for n in empty if n in same], *chosen])


def _is_used_up(model: nn.Module, block: str, branches: list[Branch]) -> bool:
    """Whether these branches have all the parameters of a block: no other input reaches more."""
    own = {
        id(parameter)
        for branch in branches
        for name in branch.modules
        for parameter in model.get_submodule(name).parameters()
    }
    for branch in branches:
        home = model.get_submodule(block_of(branch))
        own |= {id(home.get_parameter(name)) for name in branch.weights}
    return bool(branches) and all(id(p) in own for p in model.get_submodule(block).parameters())


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
        own_configs(model, undo)
        lists = follow(model, cuts, undo)
        follow_branches(model, cuts, gone, alone, undo)
    if blocks:
        _check(model, look, wanted, "blocks", names)
        if config:
            check_configs(model, look, map(cuts.name, cuts.kept), names, lists)
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
