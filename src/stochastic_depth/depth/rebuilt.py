"""A transformers model made of its changed configuration has to be the changed model."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..branch import is_below, name_in_model
from .compare import difference, output_of
from .configs import PerLayer, configured
from .looks import Look
from .removed import Removed

__all__ = ["check_configs"]


def check_configs(
    model: nn.Module,
    look: Look,
    homes: Iterable[str],
    names: Mapping[str, str],
    lists: list[PerLayer],
) -> None:
    """Try configurations that were changed, and cut of their lists what has to be cut.

    Args:
        model: the model, already cut.
        look: at it, before.
        homes: what the lists that blocks were taken out of are called now.
        names: of the blocks now, by what they were called.
        lists: of the configurations, as :func:`follow` left them.

    Raises:
        ValueError: the configuration makes another model.
    """
    homes = list(homes)
    touched = {
        name: inner
        for name, inner in configured(model).items()
        if any(is_below(home, name) for home in homes) and not _has_adapters(inner)
    }
    if not touched:
        return
    wanted = output_of(model, look, blocks=names)
    problem: ValueError | None = None
    works: tuple[PerLayer, ...] | None = None
    # What a list's name says is tried first, then the other way for one of them, for two, ...
    ways = (way for n in range(len(lists) + 1) for way in combinations(lists, n))
    for others in islice(ways, 64):
        _cut(lists, others)
        try:
            is_like = all([_is_like(model, look, wanted, names, at) for at in touched.items()])
        except ValueError as error:
            problem = problem or error
            continue
        if is_like or not lists:
            return
        works = others if works is None else works
    if works is not None:
        _cut(lists, works)
    elif problem is not None:
        raise problem


def _cut(lists: list[PerLayer], others: tuple[PerLayer, ...]) -> None:
    for one in lists:
        one.cut(one.says_so != (one in others))


def _is_like(
    model: nn.Module, look: Look, wanted: Any, names: Mapping[str, str], at: tuple[str, nn.Module]
) -> bool:
    """Whether the modules of one made of the configuration have the same settings, too.

    Raises:
        ValueError: it gives something else, or there is none.
    """
    name, inner = at
    again = _rebuilt(inner)
    with _in_place(model, name, again) as whole:
        problem = difference(output_of(whole, look, blocks=names), wanted)
    if problem:
        raise ValueError(
            f"a {type(inner).__name__} made of the configuration of the pruned one gives something "
            f"else ({problem}): its layers differ in a way that the configuration cannot say of "
            "these; remove others, or branches, or give config=False"
        )
    return _settings(again) == _settings(inner)


@contextmanager
def _in_place(model: nn.Module, name: str, other: nn.Module) -> Iterator[nn.Module]:
    """The model with another in the place of a part."""
    if not name:
        yield other
        return
    parent, _, key = name.rpartition(".")
    children = model.get_submodule(parent)._modules
    before, children[key] = children[key], other
    try:
        yield model
    finally:
        children[key] = before


def _settings(model: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, str | int | float) and key[0] != "_" and key != "training"
    }


def _has_adapters(model: nn.Module) -> bool:
    return any(type(m).__module__.startswith("peft.") for m in model.modules())


def _rebuilt(model: nn.Module) -> nn.Module:
    """A model made of the configuration as it would be saved, with the weights of ``model``.

    Branches that were removed alone are removed from it, too.

    Raises:
        ValueError: the configuration makes another model.
    """
    name = type(model).__name__
    config: Any = model.config
    how = (
        "; remove other layers, or branches, or give config=False to leave the configuration as it "
        "is, and prune again after from_pretrained"
    )
    try:
        again = type(config).from_dict(copy.deepcopy(config.to_dict()))
    except Exception as error:
        raise ValueError(
            f"the configuration of {name} would not load again: {error}{how}"
        ) from error
    if (attention := getattr(config, "_attn_implementation", None)) is not None:
        again._attn_implementation = attention
    state = model.state_dict()
    with torch.random.fork_rng(devices=[]):
        fresh = _made(lambda: _without(type(model)(copy.deepcopy(again)), model), state, model)
        if isinstance(fresh, Exception):
            raise ValueError(
                f"the configuration of {name} makes another model than the pruned one: {fresh}{how}"
            ) from fresh
    return fresh.train(model.training)


def _without(fresh: nn.Module, like: nn.Module) -> nn.Module:
    """Take out of a fresh model what was removed alone from another."""
    for name, module in like.named_modules():
        if isinstance(module, Removed):
            fresh.set_submodule(name, copy.deepcopy(module), strict=True)
        for key in [key for key, value in module._parameters.items() if value is None]:
            fresh.get_submodule(name).register_parameter(key, None)
    return fresh


def _made(
    make: Callable[[], nn.Module], state: dict[str, Tensor], like: nn.Module
) -> nn.Module | Exception:
    """Made without memory of its own, where its class can be."""
    problem: Exception
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                fresh = make()
            fresh.load_state_dict(state, strict=True, assign=True)
            buffers = dict(like.named_buffers())
            for name, module in fresh.named_modules():
                for key, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_meta:
                        module._buffers[key] = buffers[name_in_model(key, name)]
            tie: Any = getattr(fresh, "tie_weights", None)
            if callable(tie):
                tie()
            return fresh
        except Exception as error:
            problem = error
            if "size mismatch" in str(error) or "key(s) in state_dict" in str(error):
                return RuntimeError(" ".join(str(error).split())[:300])
    return problem
