"""Rates over training: the factors, what drives them, and what must not happen silently."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.schedules import rate_factor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def build(p: float = 0.3, **options) -> nn.Module:
    torch.manual_seed(0)
    return sd.apply(nn.Sequential(*[Block() for _ in range(3)]), p=p, **options)


def rates(model: nn.Module) -> list[float]:
    return [branch.p for branch in sd.branches(model)]


@pytest.mark.parametrize(
    ("course", "expected"),
    [
        ("early", [1, 0.75, 0.5, 0.25, 0, 0]),
        ("late", [0, 0, 0, 0, 1, 1]),
        ("linear", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("cosine", [0, (1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1, 1]),
        ("exponential", [0, 1 - math.exp(-25), 1 - math.exp(-50), 1, 1, 1]),
    ],
)
def test_the_factors_are_those_of_the_papers(course, expected):
    found = [rate_factor(course, step, 4) for step in range(6)]
    assert found == pytest.approx(expected, rel=1e-14)
    assert found[0] == expected[0]  # ends are exact
    assert found[4:] == expected[4:]


def test_the_exponential_is_progressive_layer_dropping():
    """theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar, DeepSpeed's gamma being 0.001."""
    theta_bar, gamma = 0.5, 0.001
    for step in (0, 1, 10, 1_000, 20_000):
        theta = (1 - theta_bar) * math.exp(-gamma * step) + theta_bar
        factor = rate_factor("exponential", step, 100_000)
        assert 1 - factor * (1 - theta_bar) == pytest.approx(theta, rel=1e-14)


@pytest.mark.parametrize("course", ["late", "linear", "cosine", "exponential"])
@pytest.mark.parametrize("steps", [1, 3, 7, 49])
def test_the_target_is_reached_to_the_bit(course, steps):
    model = build()
    targets = rates(model)
    schedule = sd.RateSchedule(model, course, steps=steps)
    assert rates(model) == [0, 0, 0]
    for _ in range(steps):
        assert rates(model) != targets or course == "exponential"
        schedule.step()
    assert rates(model) == targets
    schedule.step()
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


def test_it_goes_on_from_its_state():
    model, other = build(), build()
    schedule = sd.RateSchedule(model, "cosine", steps=9)
    for _ in range(4):
        model.train()(torch.ones(2, 4))
        schedule.step()
    resumed = sd.RateSchedule(other, "cosine", steps=9)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert rates(other) == rates(model)
    assert resumed.metrics() == schedule.metrics()
    for _ in range(5):
        schedule.step(), resumed.step()
        assert rates(other) == rates(model)
    assert rates(other) == rates(build())


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
    ("course", "steps", "error", "message"),
    [
        ("wavy", 3, ValueError, "course must be one of .*'early'.*got 'wavy'"),
        (3, 3, ValueError, "course must be one of"),
        ("early", None, TypeError, "steps must be the number"),
        ("early", 2.0, TypeError, "got 2.0"),
        ("early", True, TypeError, "got True"),
        ("early", 0, ValueError, "at least 1, got 0"),
        (lambda step: 0.5, 3, ValueError, "steps=3 and a course that is a function"),
        (lambda step: 1.5, None, ValueError, r"course\(0\).*got 1.5"),
        (lambda step: "a", None, TypeError, r"course\(0\)"),
    ],
)
def test_bad_arguments_are_refused(course, steps, error, message):
    model = build()
    with pytest.raises(error, match=message):
        sd.RateSchedule(model, course, steps=steps)
    assert rates(model) == rates(build())


def test_models_that_have_nothing_to_schedule_are_refused():
    with pytest.raises(ValueError, match="apply it first"):
        sd.RateSchedule(nn.Linear(2, 2), "early", steps=3)
    schedule = sd.RateSchedule(build(), "late", steps=3)
    state = {**schedule.state_dict(), "targets": [0.1]}
    with pytest.raises(ValueError, match="1 branches, and this one has 3"):
        schedule.load_state_dict(state)


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_a_compiled_model_follows_the_rates(mode):
    """p becomes an input of the graph once it has changed: never a stale rate, few recompiles."""
    torch._dynamo.reset()
    compilations = []

    def count(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    model = build(1.0, schedule="uniform", mode=mode)
    compiled = torch.compile(model, backend=count, fullgraph=True)
    # Not 0 nor 1, which need no coin and have graphs of their own.
    schedule = sd.RateSchedule(model, lambda step: 0.2 + 0.05 * step)
    x = torch.randn(2000, 4)
    for _ in range(13):
        p = rates(model)[0]
        kept = (compiled(x) != x).any(1).double().mean()  # by one branch or more
        # Five standard deviations of 2000 rows at most: less than one false alarm in 1e5 runs.
        expected = 1 - p**3
        assert abs(kept - expected) <= 5 * math.sqrt(expected * (1 - expected) / 2000) + 1e-9
        schedule.step()
    assert len(compilations) <= 3


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, as it looks at inputs
def test_branches_compiled_by_themselves_follow_the_rates_without_recompiling():
    torch._dynamo.reset()
    compilations = []

    def count(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    model = build(1.0, schedule="uniform")
    for branch in sd.branches(model):
        branch.compile(backend=count)
    schedule = sd.RateSchedule(model, "linear", steps=12)
    model.train()
    for _ in range(13):
        model(torch.randn(2, 4, requires_grad=True))
        schedule.step()
    assert len(compilations) == 3  # one a branch
    with torch.no_grad():
        x = torch.randn(2, 4)
        assert torch.equal(model(x), x)


def test_a_rate_that_changes_in_a_compiled_model_in_batch_mode_is_an_error_not_stale():
    """torch.cond takes no changing number: the guide sends users to branch.compile()."""
    torch._dynamo.reset()
    model = build(0.9, schedule="uniform")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    schedule = sd.RateSchedule(model, lambda step: 0.5 + 0.1 * step)
    compiled(torch.randn(2, 4))
    schedule.step()
    with pytest.raises(Exception, match="cond"):
        compiled(torch.randn(2, 4))
