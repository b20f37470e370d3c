"""How the modules of a model are called, from a call of the model on example inputs."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .detect import prefixes
from .detect.batches import batch_dim, row_dims
from .detect.capture import Call, read_call
from .detect.examples import outline

__all__ = ["call_model", "run_example", "watch_calls"]


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` of a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def run_example(model: nn.Module, example_inputs: Any) -> None:
    """Call ``model`` on ``example_inputs`` in evaluation, without gradients or random effects.

    Raises:
        ValueError: the model fails on them.
    """
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()
            call_model(model, example_inputs)
    except Exception as error:
        raise ValueError(
            "example_inputs must be what the model is called with (a tensor, a tuple of arguments "
            f"or a dict of keywords), but calling it failed: {error}"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def watch_calls(model: nn.Module, example_inputs: Any) -> dict[str, Call]:
    """How each module is called, by name, when ``model`` runs on ``example_inputs``.

    Where modules are given several tensors, the model runs again with one row more, which shows
    which of them have the batch's rows, and whether these stay apart.

    Raises:
        ValueError: the model fails on ``example_inputs``.
    """
    calls, _ = _watch(model, example_inputs)
    dims = {name: batch_dim(model.get_submodule(name)) for name in calls}
    for dim in sorted(set(dims.values()) | {0}):
        open_ones = [n for n, call in calls.items() if not _is_settled(call, dims[n])]
        larger = _watch_larger(model, example_inputs, dim) if open_ones else {}
        for name in open_ones:
            if name in larger and larger[name].key == calls[name].key:
                given, more = calls[name].examples, larger[name].examples
                calls[name] = replace(calls[name], row_dims=row_dims(given or (), more or ()))
    return calls


def _watch(
    model: nn.Module, inputs: Any, rows: int | None = None
) -> tuple[dict[str, Call], dict[str, list["_Sample"]]]:
    """How each module is called first, and samples of what it is given and returns."""
    calls: dict[str, Call] = {}
    samples: dict[str, list[_Sample]] = {}

    def read(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls:
            call, values = read_call(args, kwargs)
            calls[name] = call.like(map(outline, values))

    def take(name: str, values: Any, rows: int) -> None:
        if name not in samples:
            tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
            samples[name] = [_Sample.of(x, rows) for x in tensors]

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: read(name, args, kwargs), with_kwargs=True
            )
        )
        if rows is not None:
            handles.append(
                module.register_forward_hook(
                    lambda _, *values, name=name: take(name, values, rows), with_kwargs=True
                )
            )
    try:
        run_example(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, samples


def _is_settled(call: Call, dim: int) -> bool:
    """Whether there is nothing to ask, or the first tensor has its rows where it should."""
    tensors = [i for i, kind in enumerate(call.types) if issubclass(kind, Tensor)]
    if len(tensors) < 2:
        return True
    return call.row_dims is not None and call.row_dims[tensors[0]] == dim


def _watch_larger(model: nn.Module, example_inputs: Any, dim: int) -> dict[str, Call]:
    """The calls with one row more, of modules in which rows stay apart.

    None where it is not certain which tensors have rows. All that have the size of the first
    tensor's ``dim`` there (or in dimension 0) are taken to be batched. The model has to run with
    one row more in all of them, and to fail where one is left as it was: else what merely has that
    size could be taken for a part of the batch.
    """
    given = dict(example_inputs) if isinstance(example_inputs, Mapping) else example_inputs
    leaves, structure = tree_flatten(given)
    tensors = [(i, x) for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    if not tensors or tensors[0][1].dim() <= dim:
        return {}
    rows = tensors[0][1].shape[dim]
    batched = {i: d for i, x in tensors for d in [_find(x, rows, dim)] if d is not None}

    def larger(but: int | None = None) -> Any:
        more = [
            _with_one_more(x, batched[i]) if i in batched and i != but else x
            for i, x in enumerate(leaves)
        ]
        return tree_unflatten(more, structure)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls, after = _watch(model, larger(), rows + 1)
            if any(_runs(model, larger(but=i)) for i in list(batched)[1:]):
                return {}
            _, before = _watch(model, given, rows)
    except ValueError:
        return {}
    mixing = {name for name in after if not _are_alike(before.get(name, []), after[name])}
    mixing = {prefix for name in mixing for prefix in prefixes(name)}
    return {name: call for name, call in calls.items() if name not in mixing}


def _find(x: Tensor, rows: int, dim: int) -> int | None:
    """In which dimension ``x`` has ``rows`` rows: ``dim``, 0, or in none."""
    return next((d for d in (dim, 0) if x.dim() > d and x.shape[d] == rows), None)


def _with_one_more(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x, x.narrow(dim, 0, 1)], dim)


_MOST = 64  # numbers of a row in a sample


@dataclass(frozen=True)
class _Sample:
    """Some numbers of each row of a tensor, by the dimension in which the rows may be.

    Numbers of Python: a small tensor that stays between the large ones that come and go keeps
    malloc from using that memory again (20 GB for a ViT on images of 768 pixels).
    """

    shape: torch.Size
    rows: dict[int, list[list[float]]]

    @staticmethod
    def of(x: Tensor, rows: int) -> "_Sample":
        taken = {}
        for d in range(min(2, x.dim())):
            if x.is_meta or x.numel() == 0:  # no numbers to compare
                continue
            if x.shape[d] % rows == 0:  # as many rows, or each cut in pieces
                each = x.detach().movedim(d, 0).reshape(rows, -1)
                each = each[:, :: -(-each.shape[1] // _MOST)]
                taken[d] = (each.abs() if x.is_complex() else each).tolist()
        return _Sample(x.shape, taken)

    def is_like(self, larger: "_Sample") -> bool:
        """Whether the rows have the same numbers beside one row more.

        To a tenth of their mean size: what another batch size rounds is less, another row is more.
        """
        if self.shape == larger.shape:
            return True  # no rows
        if len(self.shape) != len(larger.shape):
            return False
        apart = [d for d, size in enumerate(self.shape) if size != larger.shape[d]]
        if len(apart) != 1:
            return False
        if any(apart[0] not in sample.rows for sample in (self, larger)):
            return False
        a, b = (torch.tensor(x.rows[apart[0]], dtype=torch.float) for x in (self, larger))
        if a.shape[1] != b.shape[1]:
            return False
        a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
        tolerance = 0.1 * a.abs().mean(1, keepdim=True)
        return bool(((a - b[: len(a)]).abs() <= tolerance).all())


def _are_alike(before: list[_Sample], after: list[_Sample]) -> bool:
    return len(before) == len(after) and all(map(_Sample.is_like, before, after))


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        run_example(model, inputs)
    except ValueError:
        return False
    return True
