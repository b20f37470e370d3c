"""Copies have a life of their own; threads, recursion and interrupts disturb nothing."""

import copy
import importlib.util
import io
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

from .twins import MODES, assert_same, assert_weighed, data, net, outcome, twins


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(self.f(self.norm(x)).relu())


def blocks(count: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), *[Block() for _ in range(count)], nn.Linear(4, 4))


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_file]


SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.g(self.f(x).relu())
"""


def imported(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``its_blocks``, which has this source and is in this folder."""
    folder.mkdir(exist_ok=True)
    (folder / "its_blocks.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("its_blocks", folder / "its_blocks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "its_blocks", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", MODES)
def test_a_pickled_model_may_be_loaded_where_its_code_is_in_another_folder(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*[imported(SOURCE, tmp_path / "here", monkeypatch).Block()] * 2).double()
    sd.apply(model, 0.5, schedule="uniform", mode=mode, seed=0, example_inputs=data())
    saved = pickle.dumps(model)
    imported(SOURCE, tmp_path / "there", monkeypatch)
    loaded = pickle.loads(saved)
    for seed in range(6):
        assert torch.equal(loaded(data(seed=seed)), model(data(seed=seed)))


def test_a_pickled_model_whose_code_has_changed_has_to_be_applied_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = imported(SOURCE, tmp_path, monkeypatch).Block().double()
    saved = pickle.dumps(sd.apply(model, 1.0, example_inputs=data()))
    imported("# one line more\n" + SOURCE, tmp_path, monkeypatch)
    loaded = pickle.loads(saved)
    with pytest.raises(RuntimeError, match="call it again if the code of the model has changed"):
        loaded(data())
    assert torch.equal(sd.apply(loaded, 1.0, example_inputs=data())(data()), data())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_made_while_training_is_whole(copied: Callable, mode: str) -> None:
    ours, plain = twins(net(blocks), data(), mode=mode)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (ours, plain)]
    for step in range(2):
        assert_same(ours, plain, data(seed=step))
        for optimizer in optimizers:
            optimizer.step()
    twin = copied(ours)
    assert_same(twin, plain, data(seed=5))
    assert type(twin) is type(ours)
    assert [b.name for b in sd.branches(twin)] == [b.name for b in sd.branches(ours)]
    assert len(sd.branches(twin)) == 3
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert_same(ours, plain, data(seed=6))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    assert_same(twin, plain, data(seed=6))
    for branch in sd.branches(twin):
        branch.p = 1.0
    assert all(branch.p != 1.0 for branch in sd.branches(ours))
    assert outcome(twin, data())["gradient of 1.f.weight"].any() == False  # noqa: E712
    assert outcome(ours, data())["gradient of 1.f.weight"].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_drops_and_counts_by_itself(copied: Callable, mode: str) -> None:
    ours, plain = twins(net(Block), data(), mode=mode, p=0.5)
    assert_weighed(ours, plain, data())
    twin = copied(ours)
    (mine,), (other,) = sd.branches(ours), sd.branches(twin)
    assert (other.decided, other.dropped) == (mine.decided, mine.dropped)
    before = mine.decided, mine.dropped
    assert_weighed(twin, plain, data())
    assert (mine.decided, mine.dropped) == before


def test_a_copy_of_a_seeded_model_draws_of_its_own() -> None:
    ours, _ = twins(net(Block), data(), p=0.5, seed=3)
    twin = copy.deepcopy(ours)
    decisions = []
    for model in (ours, twin):
        (branch,) = sd.branches(model)
        decisions.append([])
        for _ in range(40):
            before = branch.dropped
            model(data())
            decisions[-1].append(branch.dropped - before)
    # Forty independent fair decisions agree throughout once in 2 ** 40 runs.
    assert decisions[0] != decisions[1]


def replica_of(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """What torch.nn.parallel.replicate makes for each further device."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
    for path, value in parameters.items():
        owner, _, name = path.rpartition(".")
        setattr(copies[model.get_submodule(owner)], name, value)
    return copies[model]


@pytest.mark.parametrize("mode", MODES)
def test_a_replica_computes_with_its_own_parameters(mode: str) -> None:
    ours, plain = twins(net(blocks), data(), mode=mode)
    ours(data())
    doubled = {name: 2 * p for name, p in ours.named_parameters()}
    replica = replica_of(ours, doubled)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(replica(data()), plain(data()), rtol=1e-11, atol=1e-11)
    replica(data()).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())  # through the replica's


def test_replicas_drop() -> None:
    ours, _ = twins(net(Block), data(), p=1.0)
    replica = replica_of(ours, {name: p * 1 for name, p in ours.named_parameters()})
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda m: m(data()), [replica, ours]))
    for result in results:
        torch.testing.assert_close(result, data())


def test_replicas_are_refused_what_does_not_hold_on_their_threads() -> None:
    ours, _ = twins(net(blocks), data())
    for asked in (sd.skip(ours, "1"), sd.sampling(ours)):
        with asked, pytest.raises(RuntimeError, match=r"nn\.DataParallel runs replicas"):
            replica_of(ours, {})
    waiting = sd.apply(net(blocks), 0.5)
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel runs replicas"):
        replica_of(waiting, {})


def test_another_model_s_replicas_are_not_refused() -> None:
    ours, _ = twins(net(blocks), data())
    other = sd.apply(net(blocks), 0.5, example_inputs=data())
    with sd.sampling(other):
        replica_of(ours, {})


def test_replicas_of_wrappers_are_refused_what_does_not_hold_on_their_threads() -> None:
    wrapper = sd.StochasticDepth(nn.Linear(8, 8), 0.5)
    for asked in (sd.skip(wrapper, sd.branches(wrapper)), sd.sampling(wrapper)):
        with asked, pytest.raises(RuntimeError, match=r"nn\.DataParallel runs replicas"):
            replica_of(wrapper, {})


def test_a_replica_does_not_make_the_projection_of_a_wrapper() -> None:
    # The first layer does not tell the shape of what all of it is given.
    module = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 4), nn.Flatten())
    wrapper = sd.StochasticDepth(module, 0.5, projection="new")
    assert wrapper.projection is None
    with pytest.raises(RuntimeError, match="would lose it"):
        replica_of(wrapper, {})
    wrapper(torch.randn(5, 6))
    replica_of(wrapper, {})


# --- threads


def together(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return, all started at the same moment."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, f) for f in functions]]


@pytest.mark.parametrize("mode", MODES)
def test_two_threads_may_run_one_model(mode: str) -> None:
    ours, plain = twins(net(blocks), data(), mode=mode)

    def steps(first: int) -> list[Tensor]:
        return [ours(data(3 + (first + i) % 4, 4, seed=first + i)).detach() for i in range(30)]

    for first, results in zip(
        (0, 100), together(lambda: steps(0), lambda: steps(100)), strict=True
    ):
        for i, result in enumerate(results):
            expected = plain(data(3 + (first + i) % 4, 4, seed=first + i))
            torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_threads_decide_each_for_itself(mode: str) -> None:
    ours, plain = twins(net(Block), data(), mode=mode, p=0.5)

    def steps(first: int) -> list[Tensor]:
        return [ours(data(seed=first + i)).detach() for i in range(30)]

    seen = set()
    for first, results in zip(
        (0, 100), together(lambda: steps(0), lambda: steps(100)), strict=True
    ):
        for i, result in enumerate(results):
            x = data(seed=first + i)
            kept = (result != x).any(1)
            assert mode == "row" or len(set(kept.tolist())) == 1
            added = torch.where(kept[:, None], 2 * (plain(x) - x), torch.zeros_like(x))
            torch.testing.assert_close(result, x + added, rtol=1e-11, atol=1e-11)
            seen |= set(kept.tolist())
    assert seen == {True, False}
    (branch,) = sd.branches(ours)
    assert branch.decided == 60 * (6 if mode == "row" else 1)


def test_a_plain_model_in_another_thread_is_not_disturbed() -> None:
    class Drawing(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.noise(x)

        def noise(self, x: Tensor) -> Tensor:
            return torch.rand(len(x), 1, generator=self.own, dtype=x.dtype)

    plain, done = net(Drawing), threading.Event()
    plain.own = torch.Generator().manual_seed(1)

    def disturb() -> int:
        for i in range(8):
            model = net(blocks, 2)
            sd.apply(model, 0.5, mode=MODES[i % 2], example_inputs=data())
            for rows in range(2, 8):
                model(data(rows, 4)).sum().backward()
        done.set()
        return i

    def run() -> list[Tensor]:
        results = [plain(data())]
        while not done.is_set():
            results.append(plain(data()))
        return results

    results, last = together(run, disturb)
    assert last == 7
    plain.own.manual_seed(1)
    assert len(results) > 10
    for result in results:
        assert torch.equal(result, plain(data()))


# --- recursion and calls within calls


@pytest.mark.parametrize("mode", MODES)
def test_a_block_may_call_itself(mode: str) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            if depth:
                x = self(x, depth - 1)
            return x + self.f(x)

    ours, plain = twins(net(Recursive), data(), mode=mode)
    assert_same(ours, plain, data())
    assert_same(ours, plain, data(), 1)
    for branch in sd.branches(ours):
        branch.p = 1.0
    torch.testing.assert_close(ours(data()), data())


@pytest.mark.parametrize("p", [1e-30, 1.0])
def test_a_model_may_be_called_within_its_own_call(p: float) -> None:
    ours, plain = twins(net(blocks), data(), p=p)
    seen = []

    def call_again(module: nn.Module, args: Any, output: Tensor) -> None:
        if not seen:
            seen.append(None)
            seen[0] = model(data(4, 4, seed=9)).detach()

    results = []
    for model in (ours, plain):
        seen.clear()
        handle = model[2].register_forward_hook(call_again)
        results.append((model(data()).detach(), seen[0]))
        handle.remove()
    if p == 1.0:
        ends = nn.Sequential(plain[0], plain[4])
        results[1] = ends(data()), ends(data(4, 4, seed=9))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_may_contain_blocks_with_branches(mode: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.f = Block(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(self.inner(x))

    ours, plain = twins(net(Outer), data(), mode=mode)
    assert_same(ours, plain, data())
    for branch in sd.branches(ours):
        branch.p = 1.0
    torch.testing.assert_close(ours(data()), data())


# --- exceptions


@pytest.mark.parametrize("p", [1e-30, 0.5])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError, SystemExit])
def test_after_an_exception_everything_is_as_before(
    kind: type[BaseException], mode: str, p: float
) -> None:
    ours, plain = twins(net(Block), data(), mode=mode, p=p)
    failing = [True]

    def fail(*_: Any) -> None:
        if failing:
            raise kind("from within")

    handle = ours.f.register_forward_hook(fail)
    raised = 0
    for _ in range(12):
        try:
            ours(data())
        except kind:
            raised += 1
    assert raised > 0
    failing.clear()
    h = data(6, 4)
    for name, x in (("norm", h), ("f", h), ("g", data(6, 8))):
        result = getattr(ours, name)(x)
        assert type(result) is Tensor
        torch.testing.assert_close(result, getattr(plain, name)(x))
    handle.remove()
    if p == 0.5:
        assert_weighed(ours, plain, data())
    else:
        assert_same(ours, plain, data())


def test_children_run_by_themselves_are_never_dropped() -> None:
    ours, plain = twins(net(Block), data(), p=1.0)
    ours(data())
    torch.testing.assert_close(ours.f(data()), plain.f(data()))
    torch.testing.assert_close(ours.f.forward(data()), plain.f(data()))
    assert outcome(ours.f, data())["gradient of weight"].any()
