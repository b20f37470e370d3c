"""One run of a model, recorded: its calls are met where ``nn.Module`` makes them."""

import threading
from collections import OrderedDict
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import is_compiler_loaded, without_parametrize_cache
from .flow import Flow
from .ranks import Listening, is_distributed
from .record import Recorder
from .spot import is_ours
from .state import Kept, copied, in_mode, untouched
from .unwritten import unwritten

__all__ = ["plainly", "record", "record_examples", "without_gradients"]

_one_at_a_time = threading.RLock()


@contextmanager
def _met(recorder: Any, model: nn.Module) -> Iterator[None]:
    """Meet every call of the model's modules where ``nn.Module`` makes it, hooks included."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            state = vars(module)
            before.append((state, {n: state[n] for n in _REPLACED if n in state}))
            state["_call_impl"] = _Met(recorder, module, state.get("_call_impl"))
            state["_compiled_call_impl"] = None
            # Without gradients these do nothing but put a Function around what they watch.
            state["_backward_hooks"] = state["_backward_pre_hooks"] = OrderedDict()
        yield
    finally:
        for state, own in before:
            for name in _REPLACED:
                if name not in own:
                    del state[name]
            state.update(own)  # in the order in which they were


_REPLACED = ("_call_impl", "_compiled_call_impl", "_backward_hooks", "_backward_pre_hooks")


class _Met:
    """Stands where ``nn.Module`` looks up what to call, while a run is recorded."""

    def __init__(self, recorder: Any, module: nn.Module, own: Any) -> None:
        self.recorder = recorder
        by_class = own is None or is_ours(own)
        self.through = type(module)._call_impl.__get__(module) if by_class else own
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = self.recorder
        if threading.get_ident() != recorder.thread:
            return self.through(*args, **kwargs)
        number = recorder.enter(self.module, args, kwargs)
        result = self.through(*args, **kwargs)
        recorder.leave(number, result)
        return result


@contextmanager
def without_gradients() -> Iterator[None]:
    """No gradients, and no cache in which weights without them would outlive it."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad(), without_parametrize_cache():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def plainly() -> Iterator[None]:
    """The same, and compiled code runs as it is written."""
    with without_gradients(), ExitStack() as stack:
        if is_compiler_loaded():  # else loading it takes a second, and nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool = False,
    recorder: Any = Recorder,
    constants: list[Tensor] | None = None,
    kept: Kept | None = None,
    frozen: Container[type] = frozenset(),
) -> Flow:
    """The flow of ``model(*args, **kwargs)``; everything is as before afterwards.

    Args:
        model: the root of the modules that are told apart.
        args: what it is called with.
        kwargs: the same.
        training: whether it runs as in training.
        recorder: a kind of Recorder.
        constants: tensors that are known to have been there before.
        kept: the model's state, where that is known.
        frozen: types of modules that run as in evaluation in any case.
    """

    def run() -> Flow:
        watch = recorder(model, constants or [])
        watch.keeps_unknown = constants is None
        given, named = copied((args, kwargs))
        with _one_at_a_time, ExitStack() as stack:
            stack.enter_context(untouched(model, kept))
            stack.enter_context(in_mode(model, training, frozen))
            watch.writes = stack.enter_context(unwritten(model, noted=True))
            stack.enter_context(plainly())
            stack.enter_context(_met(watch, model))
            watch.inputs(given, named)
            note = lambda: watch.flow.talks.add(watch.now)  # noqa: E731
            with Listening(note) if is_distributed() else nullcontext(), watch:
                result = model(*given, **named)
            flow: Flow = watch.finish(result)
            flow.watch, flow.constants = watch, constants or []
            flow.writes = watch.writes.any()
            del watch.flow, watch.written  # no cycle, in which all would wait for a collection
        return flow

    was_loaded = is_compiler_loaded()
    try:
        flow = run()
    except Exception:
        if is_compiler_loaded() == was_loaded:
            raise
    if is_compiler_loaded() != was_loaded:  # by the model, which has compiled something
        flow = run()
    if flow.unknown and constants is None:  # what a second run reads again was there before
        return record(model, args, kwargs, training, recorder, flow.unknown, kept, frozen)
    return flow


def record_examples(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flow:
    """The same, of what a user says that the model is called with.

    Raises:
        ValueError: the model fails on it.
    """
    try:
        return record(model, args, kwargs)
    except Exception as error:
        raise ValueError(
            "example_inputs must be what the model is called with (a tensor, a tuple of arguments "
            f"or a dict of keywords), but calling it failed: {error}"
        ) from error
