"""Networks that a symbolic trace could not follow, against their own explanation."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor

import stochastic_depth as sd

from .unseen import WIDTH, Network, build

KEPT = 1e-30  # drops never, while everything that could drop is in place
KNOWN = 24  # networks that are always tried


def batch(seed: int, samples: int = 5, positive: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, WIDTH, dtype=torch.float64, generator=generator)
    x = x - x.mean() + (0.1 if positive else -0.1)
    return x.requires_grad_()


def step(output: Tensor, x: Tensor, model: Network) -> dict[str, Tensor]:
    """The output and all gradients."""
    model.zero_grad()
    x.grad = None
    output.square().sum().backward()
    seen = {"output": output.detach(), "input": x.grad}
    for name, p in model.named_parameters():
        seen[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    return seen


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-9, atol=1e-9, msg=lambda t, name=name: f"{name}: {t}"
        )


def applied(seed: int, mode: str) -> tuple[Network, Network, dict[str, list[sd.Branch]]]:
    """A network with stochastic depth, a plain copy, and the branches by their mark."""
    ours, plain = build(seed), build(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that samples are masked
        options = {} if mode == "batch" else {"samples": 0}  # of some, times stay apart, too
        sd.apply(
            ours, KEPT, mode=mode, schedule="uniform", seed=seed, example_inputs=batch(0), **options
        )
        ours(batch(1, positive=False))  # the other form of call
    found: dict[str, list[sd.Branch]] = {}
    for branch in sd.branches(ours):
        (mark,) = [m for m in plain.marks if any(inside(n, m) for n in branch.modules)]
        found.setdefault(mark, []).append(branch)
    assert set(found) == set(plain.marks)
    for model in (ours, plain):
        for block in model.blocks:
            block.log.clear()
            block.settings.pop("calls", None)
    return ours, plain, found


def inside(name: str, mark: str) -> bool:
    return name == mark or name.startswith(mark + ".") or mark.startswith(name + ".")


def ones(model: Network, x: Tensor) -> dict[str, Tensor]:
    return dict.fromkeys(model.marks, torch.ones(len(x), dtype=x.dtype))


def check_explanation(seed: int) -> None:
    plain = build(seed)
    for turn, positive in itertools.product(range(3), (True, False)):
        plain.turn(turn)
        x = batch(turn, positive=positive)
        assert_same(step(plain.explain(x, ones(plain, x)), x, plain), step(plain(x), x, plain))


def check_kept(seed: int, mode: str) -> None:
    ours, plain, _ = applied(seed, mode)
    for turn in range(4):
        ours.turn(turn)
        plain.turn(turn)
        x = batch(turn, samples=3 + turn, positive=turn != 1)
        assert_same(step(ours(x), x, ours), step(plain(x), x, plain))
        assert ours.noted() == plain.noted()


def check_each_alone(seed: int, mode: str) -> None:
    ours, plain, found = applied(seed, mode)
    for i, mark in enumerate(plain.marks):
        for name, branches in found.items():
            for branch in branches:
                branch.p = float(name == mark)
        for positive in (True, False):
            x = batch(i, positive=positive)
            weights = ones(plain, x) | {mark: torch.zeros(len(x), dtype=x.dtype)}
            assert_same(step(ours(x), x, ours), step(plain.explain(x, weights), x, plain))


def used_marks(model: Network, x: Tensor) -> list[str]:
    """The marks that a step on ``x`` runs."""
    ran, handles = set(), []
    for mark in model.marks:
        child = model.get_submodule(mark)
        handles.append(child.register_forward_hook(lambda *_, mark=mark: ran.add(mark)))
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [mark for mark in model.marks if mark in ran]


def check_random(seed: int, mode: str) -> None:
    """Decisions read off the result: of all paths, each sample's is one that explains it."""
    ours, plain, found = applied(seed, mode)
    if mode == "row" and any(block.mixes for block in plain.blocks):
        return  # a sample's result depends on what is decided for others: check_one_at_random
    for branches in found.values():
        for branch in branches:
            branch.p = 0.5
    for turn in range(3):
        x = batch(turn, positive=turn != 1)
        used = used_marks(plain, x)
        before = {m: counts(found[m]) for m in used}
        output = ours(x)
        paths = list(itertools.product((0.0, 2.0), repeat=len(used)))
        with torch.no_grad():
            results = torch.stack([plain.explain(x, weigh(plain, x, used, p)) for p in paths])
        fits = (results - output.detach()).abs().amax((2, 3)) < 1e-9
        assert fits.any(0).all()
        chosen = torch.tensor(paths, dtype=x.dtype).view(len(paths), -1)[fits.int().argmax(0)]
        weights = ones(plain, x) | {m: chosen[:, i] for i, m in enumerate(used)}
        assert_same(step(output, x, ours), step(plain.explain(x, weights), x, plain))
        assert int(fits.sum()) == len(x)
        for i, mark in enumerate(used):
            dropped = chosen[:, i] == 0
            decided, lost = (a - b for a, b in zip(counts(found[mark]), before[mark], strict=True))
            if mode == "batch":
                assert dropped.all() or not dropped.any()
                assert (decided, lost) == (1, int(dropped.all()))
            else:
                assert (decided, lost) == (len(x), int(dropped.sum()))


def check_one_at_random(seed: int) -> None:
    """One branch decides for each sample, which explains the whole batch: also where it mixes."""
    ours, plain, found = applied(seed, "row")
    paths = list(itertools.product((0.0, 2.0), repeat=3))
    for i, mark in enumerate(plain.marks):
        for name, branches in found.items():
            for branch in branches:
                branch.p = 0.5 if name == mark else KEPT
        for positive in (True, False):
            x = batch(i, samples=3, positive=positive)
            if mark not in used_marks(plain, x):
                continue
            output = ours(x)
            with torch.no_grad():
                given = [ones(plain, x) | {mark: torch.tensor(p, dtype=x.dtype)} for p in paths]
                fits = [(plain.explain(x, w) - output).abs().max() < 1e-9 for w in given]
            (fit,) = [w for w, explains in zip(given, fits, strict=True) if explains]
            assert_same(step(output, x, ours), step(plain.explain(x, fit), x, plain))


def counts(branches: list[sd.Branch]) -> tuple[int, int]:
    return sum(b.decided for b in branches), sum(b.dropped for b in branches)


def weigh(model: Network, x: Tensor, used: list[str], path: tuple[float, ...]) -> dict[str, Tensor]:
    given = {m: torch.full((len(x),), w, dtype=x.dtype) for m, w in zip(used, path, strict=True)}
    return ones(model, x) | given


# Torch's, of a reentrant checkpoint whose example inputs need no gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning"),
    # Some branches are behind conditions on values.
    pytest.mark.filterwarnings("ignore:.* was not called in a call of its block:UserWarning"),
]


@pytest.mark.parametrize("seed", range(KNOWN))
def test_explanations_are_right(seed: int) -> None:
    check_explanation(seed)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("seed", range(KNOWN))
def test_where_nothing_drops_networks_train_as_plain_ones(seed: int, mode: str) -> None:
    check_kept(seed, mode)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("seed", range(KNOWN))
def test_each_branch_of_a_network_can_be_dropped_alone(seed: int, mode: str) -> None:
    check_each_alone(seed, mode)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("seed", range(KNOWN))
def test_random_decisions_of_a_network_are_explained_by_one_path_each(seed: int, mode: str) -> None:
    check_random(seed, mode)


@pytest.mark.parametrize("seed", [*range(KNOWN), 1286, 2223, 2744])  # the last failed once
def test_one_branch_decides_for_each_sample(seed: int) -> None:
    check_one_at_random(seed)


@pytest.mark.zoo
@pytest.mark.timeout(3600)
def test_ten_thousand_networks_select_the_right_samples_or_mask() -> None:
    for seed in range(KNOWN, KNOWN + 10_000):
        try:
            check_one_at_random(seed)
        except BaseException as error:
            error.add_note(f"network {seed}: {[type(b).__name__ for b in build(seed).blocks]}")
            raise


@pytest.mark.zoo
@pytest.mark.timeout(3600)
def test_three_thousand_networks() -> None:
    for seed in range(KNOWN, KNOWN + 3000):
        try:
            check_explanation(seed)
            for mode in ("batch", "row"):
                check_kept(seed, mode)
                check_each_alone(seed, mode)
                check_random(seed, mode)
        except BaseException as error:
            error.add_note(f"network {seed}: {[type(b).__name__ for b in build(seed).blocks]}")
            raise
