"""Context managers and caches of a forward work as in the plain model."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import stochastic_depth as sd

from .twins import MODES, assert_same, assert_weighed, data, net, outcome, twins

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # a branch may be left in place

ENTERED: list[str] = []


@contextmanager
def timer() -> Iterator[None]:
    ENTERED.append("in")
    try:
        yield
    finally:
        ENTERED.append("out")


class Halving(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result / 2 if func is torch.tanh else result


@contextmanager
def scaled_when_saved() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x * 2):
        yield


CONTEXTS: dict[str, Callable[[], Any]] = {
    "timer": timer,
    "record_function": lambda: torch.profiler.record_function("a part of the user's"),
    "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "saved_tensors_hooks": scaled_when_saved,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    "torch function mode": Halving,
    "catch_warnings": warnings.catch_warnings,
    "fork_rng": lambda: torch.random.fork_rng(devices=[]),
}


class Within(nn.Module):
    def __init__(self, context: Callable) -> None:
        super().__init__()
        self.f, self.g, self.context = nn.Linear(4, 4), nn.Linear(4, 4), context

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        with self.context():
            h = torch.tanh(h) * torch.rand(1, dtype=h.dtype).item() + self.f(h)
        return x + self.g(h)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_manager_of_the_forward_is_entered(context: str, mode: str) -> None:
    ours, plain = twins(net(Within, CONTEXTS[context]), data(), mode=mode)
    for step in range(2):
        assert_same(ours, plain, data(), seed=step)
    without = net(Within, lambda: timer())
    different = {"no_grad", "torch function mode", "saved_tensors_hooks", "fork_rng"}
    try:
        assert_same(ours, without, data())
        same = True
    except AssertionError:
        same = False
    assert same == (context not in different)  # else this test could not fail


class FrozenPart(nn.Module):
    """A call without gradients, and then something that is not linear in it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.f(x)
        return x + torch.tanh(self.scale * h)


@pytest.mark.parametrize("mode", MODES)
def test_a_child_may_run_without_gradients(mode: str) -> None:
    ours, plain = twins(net(FrozenPart), data(), mode=mode, p=0.5)
    assert_weighed(ours, plain, data())


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with Halving():
            return self.model(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_torch_function_mode_around_the_model_sees_the_same(mode: str) -> None:
    ours, plain = twins(net(Within, timer), data(), mode=mode, p=0.5)
    assert_weighed(Around(ours), Around(plain), data())


def test_a_context_manager_is_entered_and_left_also_where_the_branch_is_dropped() -> None:
    ours, _ = twins(net(Within, timer), data(), p=0.5)
    ENTERED.clear()
    for step in range(10):
        outcome(ours, data(), seed=step)
    assert ENTERED == ["in", "out"] * 10
    (branch,) = sd.branches(ours)
    assert 0 < branch.dropped < 10


def test_a_profiler_sees_what_the_forward_records() -> None:
    ours, _ = twins(net(Within, CONTEXTS["record_function"]), data())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ours(data())
    assert "a part of the user's" in {event.name for event in profile.events()}


# --- what a forward caches


@functools.lru_cache(None)
def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.float64).tril().log()


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.cache = nn.Linear(4, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1]
        if size not in self.cache:
            self.cache[size] = torch.linspace(0, 1, size, dtype=x.dtype, device=x.device)[:, None]
        q = self.q(x) + self.cache[size]
        return x + nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=causal(size))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("options", [{"mode": m} for m in MODES] + [{"blocks": Cached}])
def test_a_mask_that_is_cached_is_a_real_one(options: dict[str, Any], given: bool) -> None:
    causal.cache_clear()
    ours, plain = twins(net(Cached), data(2, 6, 4), given=given, **options)
    for size in (6, 5, 6):
        assert_same(ours, plain, data(2, size, 4))
    for mask in (causal(6), causal(5), ours.cache[6], ours.cache[5]):
        assert type(mask) is Tensor
        assert mask.device.type == "cpu"
        assert mask.isfinite().any()
