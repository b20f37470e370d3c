"""Rates over training: the factors, what drives them, and what must not happen silently."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.rates import rate_factor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def build(p: float = 0.3, **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(*[Block() for _ in range(3)])
    return sd.apply(net, p=p, **{"example_inputs": torch.ones(2, 4), **options})


def rates(model: nn.Module) -> list[float]:
    return [branch.p for branch in sd.branches(model)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("early", [1, 0.75, 0.5, 0.25, 0, 0]),
        ("falling", [1, 2 / 3, 1 / 3, 0, 0, 0]),
        ("plateau", [1, 1, 1, 1, 0, 0]),
        ("late", [0, 0, 0, 0, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1]),
        ("exponential", [0, 1 - math.exp(-25), 1 - math.exp(-50), 1, 1, 1]),
    ],
)
def test_the_factors_are_those_of_the_papers(schedule, expected):
    found = [rate_factor(schedule, step, 4) for step in range(6)]
    assert found == pytest.approx(expected, rel=1e-14)
    assert found[0] == expected[0]  # ends are exact
    assert found[4:] == expected[4:]


def test_the_plateau_ends_with_full_depth():
    """400 steps at the full rate and 100 of falling, as in modded-nanogpt's pull request 348."""
    found = [rate_factor("plateau", step, 500) for step in range(510)]
    expected = 400 * [1.0] + [1 - step / 100 for step in range(100)] + 10 * [0.0]
    assert found == pytest.approx(expected, abs=1e-12)
    assert found[:400] == 400 * [1.0]
    assert found[500:] == 10 * [0.0]


def test_the_exponential_is_progressive_layer_dropping():
    """theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar, DeepSpeed's gamma being 0.001."""
    theta_bar, gamma = 0.5, 0.001
    for step in (0, 1, 10, 1_000, 20_000):
        theta = (1 - theta_bar) * math.exp(-gamma * step) + theta_bar
        factor = rate_factor("exponential", step, 100_000)
        assert 1 - factor * (1 - theta_bar) == pytest.approx(theta, rel=1e-14)


@pytest.mark.parametrize("schedule", ["late", "linear", "cosine", "exponential"])
@pytest.mark.parametrize("steps", [1, 3, 7, 49])
def test_the_target_is_reached_to_the_bit(schedule, steps):
    model = build()
    targets = rates(model)
    driven = sd.RateSchedule(model, schedule, steps=steps)
    assert rates(model) == [0, 0, 0]
    for _ in range(steps):
        assert rates(model) != targets or schedule == "exponential"
        driven.step()
    assert rates(model) == targets
    driven.step()
    assert rates(model) == targets


def test_early_goes_from_the_target_to_nothing():
    model = build()
    targets = rates(model)
    schedule = sd.RateSchedule(model, "early", steps=10)
    assert rates(model) == targets
    for _ in range(5):
        schedule.step()
    assert rates(model) == [0.5 * target for target in targets]
    for _ in range(5):
        schedule.step()
    assert rates(model) == [0, 0, 0]


def test_the_rates_are_those_that_the_coins_are_tossed_with():
    model = build(1.0, schedule="uniform", mode="row")
    schedule = sd.RateSchedule(model, lambda step: min(step / 4, 1.0))
    model.train()
    for step in range(5):
        before = schedule.metrics()
        model(torch.ones(3000, 4))
        after = schedule.metrics()
        decided, dropped = (after[key] - before[key] for key in ("decided", "dropped"))
        assert decided == (3 * 3000 if step else 0)  # a rate of 0 is not asked for
        # Six standard deviations of a binomial: a false alarm in 5e8 runs; 0 and 1 are exact.
        spread = math.sqrt(decided * (step / 4) * (1 - step / 4))
        assert abs(dropped - decided * step / 4) <= 6 * spread
        assert after["expected_depth"] == 3 * (1 - step / 4)
        schedule.step()


@pytest.mark.parametrize("schedule_first", [True, False])
def test_it_goes_on_from_its_state_and_the_models_in_either_order(schedule_first):
    model, other = build(), build(0.1)
    schedule = sd.RateSchedule(model, "cosine", steps=9)
    for _ in range(4):
        model.train()(torch.ones(2, 4))
        schedule.step()
    states = copy.deepcopy((sd.state_dict(model), schedule.state_dict()))
    resumed = sd.RateSchedule(other, "cosine", steps=9)
    if schedule_first:
        resumed.load_state_dict(states[1])
        sd.load_state_dict(other, states[0])
    else:
        sd.load_state_dict(other, states[0])
        resumed.load_state_dict(states[1])
    assert rates(other) == rates(model)
    assert resumed.metrics() == schedule.metrics()
    for _ in range(5):
        schedule.step(), resumed.step()
        assert rates(other) == rates(model)
    assert rates(other) == rates(build())


def test_it_goes_on_after_the_first_batch_has_settled_the_branches():
    torch.manual_seed(0)
    net = nn.Sequential(*[Block() for _ in range(3)])
    model = sd.apply(net, p=0.3)
    schedule = sd.RateSchedule(model, "linear", steps=2)
    schedule.step()
    model.train()(torch.ones(2, 4))
    assert rates(model) == [0.5 * p for p in rates(build())]
    schedule.step()
    assert rates(model) == rates(build())


def test_it_drives_a_model_that_is_wrapped_or_copied_with_it():
    model = build()
    wrapped = nn.DataParallel(model)
    schedule = sd.RateSchedule(wrapped, "linear", steps=2)
    schedule.step()
    assert rates(model) == [0.5 * p for p in rates(build())]
    twin, its_schedule = copy.deepcopy((model, schedule))
    its_schedule.step()
    assert rates(twin) == rates(build())
    assert rates(model) == [0.5 * p for p in rates(build())]


def test_a_model_that_was_applied_anew_is_noticed():
    model = build()
    schedule = sd.RateSchedule(model, "linear", steps=2)
    sd.apply(model, p=0.1)
    with pytest.raises(RuntimeError, match="applied anew"):
        schedule.step()
    schedule = sd.RateSchedule(model, "linear", steps=2)
    sd.remove(model)
    with pytest.raises(RuntimeError, match="removed"):
        schedule.step()


class Forks(nn.Module):
    """On inputs that are made up it goes another way than on the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(4, 4), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.a(x) if x.dim() == 2 else self.b(x)


def test_a_model_that_waits_for_its_first_batch_is_the_same_after_it_and_not_if_applied_anew():
    model = sd.apply(Forks(), p=0.3)
    schedule = sd.RateSchedule(model, "linear", steps=2)
    before = [branch.name for branch in sd.branches(model)]
    with pytest.warns(UserWarning, match="found branches on inputs that it made up"):
        model.train()(torch.ones(2, 3, 4))
    assert [branch.name for branch in sd.branches(model)] == ["b:linear"] != before
    schedule.step()
    assert rates(model) == [0.15]
    assert schedule.metrics()["expected_depth"] == 0.85
    model = sd.apply(Forks(), p=0.3)
    schedule = sd.RateSchedule(model, "linear", steps=2)
    sd.apply(model, p=0.2)
    with pytest.raises(RuntimeError, match="applied anew"):
        schedule.step()


def test_targets_are_the_rates_that_were_set_and_not_those_of_another_schedule():
    model = build()
    sd.RateSchedule(model, "late", steps=3)
    assert rates(model) == [0, 0, 0]
    copied = copy.deepcopy(model)
    sd.branches(copied)[0].p = 0.4  # where it had 0.1
    schedule = sd.RateSchedule(copied, "linear", steps=2)
    schedule.step()
    assert rates(copied) == [0.2, *(0.5 * p for p in rates(build())[1:])]
    sd.branches(copied)[0].p = 0.5
    schedule.step()
    assert rates(copied) == [0.5, *rates(build())[1:]]


@pytest.mark.parametrize(
    ("schedule", "steps", "error", "message"),
    [
        ("wavy", 3, ValueError, "schedule must be one of .*'early'.*got 'wavy'"),
        (3, 3, ValueError, "schedule must be one of"),
        ("early", None, TypeError, "steps must be the number"),
        ("early", 2.0, TypeError, "got 2.0"),
        ("early", True, TypeError, "got True"),
        ("early", 0, ValueError, "at least 1, got 0"),
        (lambda step: 0.5, 3, ValueError, "steps=3 and a schedule that is a function"),
        (lambda step: 1.5, None, ValueError, r"schedule\(0\).*got 1.5"),
        (lambda step: "a", None, TypeError, r"schedule\(0\)"),
    ],
)
def test_bad_arguments_are_refused(schedule, steps, error, message):
    model = build()
    with pytest.raises(error, match=message):
        sd.RateSchedule(model, schedule, steps=steps)
    assert rates(model) == rates(build())


def test_models_that_have_nothing_to_schedule_are_refused():
    with pytest.raises(ValueError, match="apply it first"):
        sd.RateSchedule(nn.Linear(2, 2), "early", steps=3)


class Counter:
    """A backend that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _):
        self.graphs += 1
        return graph


@pytest.mark.parametrize(
    ("mode", "example_inputs"),
    [("batch", torch.ones(2, 4)), ("row", torch.ones(2, 4)), ("subset", torch.ones(2, 4)),
     ("batch", None)],
    ids=["batch", "row", "subset", "inputs made up"],
)  # fmt: skip
def test_a_compiled_model_follows_the_rates_without_recompiling(mode, example_inputs):
    torch._dynamo.reset()
    counter = Counter()
    model = build(1.0, schedule="uniform", mode=mode, example_inputs=example_inputs)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    # Not 0 nor 1, which need no decision and have graphs of their own.
    schedule = sd.RateSchedule(model, lambda step: 0.2 + 0.05 * step)
    x = torch.randn(2000, 4)
    kept = []
    for step in range(13):
        torch.manual_seed(step)
        p = rates(model)[0]
        kept.append((compiled(x) != x).any(1).double().mean().item())  # by one branch or more
        if mode != "batch":
            # Five standard deviations of 2000 rows at most: less than one false alarm in 1e5 runs.
            expected = 1 - p**3
            assert abs(kept[-1] - expected) <= 5 * (expected * (1 - expected) / 2000) ** 0.5 + 1e-9
        schedule.step()
    # A subset's size is a part of the graph's shapes, which become dynamic once it changes.
    assert counter.graphs <= (3 if mode == "subset" else 1)
    if mode == "batch":
        # Each call follows its own rate: the same numbers, drawn as the graph draws them.
        for step in range(13):
            torch.manual_seed(step)
            numbers = [float(torch.rand(1)) for _ in range(3)]
            assert kept[step] == any(n >= 0.2 + 0.05 * step for n in numbers)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, as it looks at inputs
def test_blocks_compiled_one_by_one_follow_the_rates_without_recompiling():
    torch._dynamo.reset()
    counter = Counter()
    model = build(1.0, schedule="uniform")
    for block in model:
        block.compile(backend=counter)
    schedule = sd.RateSchedule(model, lambda step: 0.2 + 0.05 * step)
    model.train()
    torch.manual_seed(0)
    counts = []
    for _ in range(13):
        model(torch.randn(2, 4, requires_grad=True))
        schedule.step()
        counts.append(counter.graphs)
    dropped = sum(branch.dropped for branch in sd.branches(model))
    assert 0 < dropped < 39
    assert counter.graphs <= 2 * 3  # kept and dropped of each block, whatever the rate is
    for branch in sd.branches(model):
        branch.p = 1.0
    with torch.no_grad():
        x = torch.randn(2, 4)
        assert torch.equal(model(x), x)


@pytest.mark.parametrize("step", [-1, 2.5, "3", None, True])
def test_a_state_that_is_none_is_refused_and_changes_nothing(step: object) -> None:
    model = build(0.6)
    schedule = sd.RateSchedule(model, "linear", steps=10)
    schedule.step()
    before = rates(model)
    with pytest.raises(ValueError, match=f"step must be a number of .*, got {step!r}"):
        schedule.load_state_dict({"steps_done": step})
    with pytest.raises(ValueError, match="state has no 'steps_done'"):
        schedule.load_state_dict({"last_epoch": 3})
    assert (rates(model), schedule.steps_done) == (before, 1)


@pytest.mark.parametrize("step", [np.int64(5), torch.tensor(5)])
def test_a_state_may_hold_a_number_of_numpy_or_torch(step: Any) -> None:
    model = build(0.6)
    schedule = sd.RateSchedule(model, "linear", steps=10)
    schedule.load_state_dict({"steps_done": step})
    assert rates(model)[-1] == pytest.approx(0.3)
    assert type(schedule.state_dict()["steps_done"]) is int
    assert {type(rate) for rate in rates(model)} == {float}
    for _ in range(20):
        model(torch.randn(2, 4))
    assert 0 < sum(branch.dropped for branch in sd.branches(model)) < 60
