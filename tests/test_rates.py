"""How often is dropped, and which rate each block gets.

The coins are judged by exact two-sided binomial tests. The seeds are fixed, so a test gives the
same answer each time; for a right library and a fresh seed each would give a false alarm with
probability FALSE_ALARM.
"""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

import reference
import stochastic_depth as sd
from stochastic_depth.drop.decide import subset_size
from stochastic_depth.rates import depth_rates

FALSE_ALARM = 1e-3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RATES = [0.001, 0.01, 0.1, 0.5, 0.9, 0.999]


def agrees(count: int, number: int, p: float) -> bool:
    return bool(binomtest(count, number, p).pvalue >= FALSE_ALARM)


def dropped_rows(p: float, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Which rows are dropped, read off a branch that adds 1."""
    x = torch.zeros(rows, 1, dtype=dtype)
    y = sd.residual(x, torch.ones_like, p=p, mode="row", scale="none")
    assert y.dtype == dtype
    return y.squeeze(1) == 0


def dropped_calls(forward: Callable[[], Tensor], calls: int) -> list[bool]:
    """Which calls are dropped, read off a branch that adds 1 to 0."""
    return [forward().max().item() == 0 for _ in range(calls)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", RATES)
def test_rows_drop_at_their_rate(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    number = 400_000  # tells 0.01 from bfloat16's 0.0118
    assert agrees(int(dropped_rows(p, number, dtype).sum()), number, p)


@pytest.mark.parametrize(
    ("p", "dtype"),
    [*((p, torch.float32) for p in RATES), (0.001, torch.float16), (0.001, torch.bfloat16)],
)
def test_calls_drop_at_their_rate(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.zeros(1, 1, dtype=dtype)
    dropped = dropped_calls(lambda: sd.residual(x, torch.ones_like, p=p, scale="none"), 10_000)
    assert agrees(sum(dropped), len(dropped), p)


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_a_wrapped_module_drops_at_its_rate(p: float) -> None:
    torch.manual_seed(2)
    layer = sd.StochasticDepth(nn.Threshold(1.0, 1.0), p, scale="none")  # 0 becomes 1
    dropped = dropped_calls(lambda: layer(torch.zeros(1)), 5_000)
    assert agrees(sum(dropped), len(dropped), p)


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_a_private_generator_drops_at_the_rate(p: float) -> None:
    coins = torch.Generator().manual_seed(3)
    x = torch.zeros(1)
    dropped = dropped_calls(
        lambda: sd.residual(x, torch.ones_like, p=p, scale="none", generator=coins), 5_000
    )
    assert agrees(sum(dropped), len(dropped), p)


@pytest.mark.parametrize("lag", [1, 2, 7])
def test_rows_drop_independently_of_each_other(lag: int) -> None:
    torch.manual_seed(4)
    p, number = 0.3, 200_000
    dropped = dropped_rows(p, number)
    both = dropped[: number // lag // 2 * lag * 2].view(-1, 2, lag).all(1)  # pairs apart by lag
    assert agrees(int(both.sum()), both.numel(), p * p)


def test_calls_drop_independently_of_each_other() -> None:
    torch.manual_seed(5)
    p, x = 0.3, torch.zeros(1)
    dropped = dropped_calls(lambda: sd.residual(x, torch.ones_like, p=p, scale="none"), 20_000)
    both = [a and b for a, b in zip(dropped[::2], dropped[1::2], strict=True)]
    assert agrees(sum(both), len(both), p * p)


def test_two_calls_drop_different_rows() -> None:
    torch.manual_seed(6)
    p, number = 0.3, 100_000
    both = dropped_rows(p, number) & dropped_rows(p, number)
    assert agrees(int(both.sum()), number, p * p)


@pytest.mark.parametrize("rows", [3, 8])
def test_every_row_is_in_the_subset_equally_often(rows: int) -> None:
    torch.manual_seed(7)
    x, calls = torch.zeros(rows, 1), 4_000
    counts = sum(
        sd.residual(x, torch.ones_like, p=0.5, mode="subset", scale="none") for _ in range(calls)
    )
    share = reference.kept_rows_of_subset(rows, 0.5) / rows
    assert [agrees(int(n), calls, share) for n in counts] == [True] * rows


# --- the defects of others


@pytest.mark.parametrize("p", [0.001, 0.0019])
def test_bf16_small_p_never_drops(p: float) -> None:
    # floor(keep + rand(dtype=bfloat16)): 0 dropped, and about 0.4 % doubled.
    torch.manual_seed(8)
    x = torch.ones(100_000, 1, dtype=torch.bfloat16)
    y = sd.residual(x, torch.ones_like, p=p, mode="row", scale="none")
    assert set(y.unique().tolist()) == {1.0, 2.0}
    assert agrees(int((y == 1).sum()), len(y), p)


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_hugging_face_p_1_is_nan(mode: str) -> None:
    x = torch.randn(4, 3)
    assert torch.equal(sd.residual(x, torch.neg, p=1.0, mode=mode), x)


def test_torchlayers_float_truth_always_skips() -> None:
    torch.manual_seed(9)
    x, p = torch.zeros(1), 0.05
    layer = sd.StochasticDepth(nn.Threshold(1.0, 1.0), p)
    dropped = dropped_calls(lambda: layer(x), 1_000)
    assert agrees(sum(dropped), len(dropped), p)


def test_keras_hub_noise_instead_of_a_mask() -> None:
    torch.manual_seed(10)
    x, p = torch.full((1000, 1), 3.0), 0.2
    y = sd.residual(x, torch.ones_like, p=p, mode="row")
    assert sorted(y.unique().tolist()) == pytest.approx([3.0, 3.0 + 1 / 0.8], rel=1e-6)


def test_torchtune_manual_seed_has_no_effect() -> None:
    x = torch.zeros(64, 1)
    layer = sd.StochasticDepth(nn.Threshold(1.0, 1.0), 0.5, mode="row")

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(draw(11), draw(11))
    assert not torch.equal(draw(11), draw(12))


@pytest.mark.parametrize(
    ("rows", "p", "kept"),
    [
        (4, 0.1, 4),  # floor: 3, a rate of 25 %
        (20, 0.9, 2),  # int(20 * (1 - 0.9)) is 1
        (10, 0.7, 3),  # int(10 * (1 - 0.7)) is 3, and 1 - 0.7 is 0.30000000000000004
        (1, 0.4, 1),
        (1, 0.9, 1),  # at least one row
        (1000, 0.9999, 1),
        (1000, 1e-9, 1000),
        (64, 0.3, 45),
    ],
)
def test_dinov2_floor_of_the_rows(rows: int, p: float, kept: int) -> None:
    assert subset_size(rows, p) == kept
    seen: list[int] = []

    def branch(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x

    x = torch.ones(rows, 1, dtype=torch.float64)
    y = sd.residual(x, branch, p=p, mode="subset")
    assert seen == [kept]
    assert y.sum().item() == pytest.approx(2 * rows, rel=1e-12)  # B/k, not 1/(1-p)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 33])
def test_the_subset_is_the_nearest_whole_number_but_not_nothing(rows: int) -> None:
    for hundredth in range(100):
        p = hundredth / 100
        assert abs(subset_size(rows, p) - max(1, rows * (1 - p))) <= 0.5 + 1e-9
    assert subset_size(rows, 1.0) == 0


@pytest.mark.parametrize("shape", [(32,), (32, 2), (32, 2, 2, 2, 2)])
def test_dinov2_drops_from_3d_inputs_only_and_nothing_up_to_a_tenth(shape: tuple[int, ...]) -> None:
    y = sd.residual(torch.zeros(shape), torch.ones_like, p=1 / 16, mode="subset")
    assert int(y.reshape(32, -1).eq(0).all(1).sum()) == 2


# --- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.125, 0.25, 0.375, 0.5]),
        ("linear-timm", [0.0, 1 / 6, 2 / 6, 0.5]),
        ("linear-efficientnet", [0.0, 0.125, 0.25, 0.375]),
        ("uniform", [0.5, 0.5, 0.5, 0.5]),
        ("alternating", [0.0, 0.5, 0.0, 0.5]),
    ],
)
def test_named_schedules(schedule: str, expected: list[float]) -> None:
    assert depth_rates(schedule, 0.5, 4) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "linear-timm", "uniform"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("depth", [1, 2, 3, 7, 49, 1000])
def test_the_last_block_has_p_itself(schedule: str, p: float, depth: int) -> None:
    rates = depth_rates(schedule, p, depth)
    assert rates[-1] == p
    assert len(rates) == depth
    assert rates == sorted(rates)
    assert rates[0] >= 0.0


@pytest.mark.parametrize(("p", "kept"), [(0.5, 40.25), (0.8, 32.0)])
def test_the_expected_depth_of_110_layers_is_the_papers(p: float, kept: float) -> None:
    assert sum(1 - rate for rate in depth_rates("linear", p, 54)) == pytest.approx(kept, abs=1e-12)


def test_linear_timm_is_timms() -> None:
    layers = pytest.importorskip("timm.layers")
    theirs = layers.calculate_drop_path_rates(0.3, 9)
    assert depth_rates("linear-timm", 0.3, 9) == pytest.approx(theirs, abs=1e-6)  # float32


def test_linear_efficientnet_is_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.efficientnet_b0(stochastic_depth_prob=0.3)
    theirs = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    blocks = len(theirs)
    assert blocks == 16
    assert depth_rates("linear-efficientnet", 0.3, blocks) == pytest.approx(theirs, abs=1e-12)


def test_torchvision_efficientnet_never_reaches_p() -> None:
    assert max(depth_rates("linear-efficientnet", 0.3, 16)) < 0.3  # named after its defect
    assert max(depth_rates("linear", 0.3, 16)) == 0.3  # the default


@pytest.mark.parametrize("schedule", ["linear", "linear-timm", "linear-efficientnet", "uniform"])
def test_stochdepth_one_block_divides_by_zero(schedule: str) -> None:
    expected = 0.0 if schedule == "linear-efficientnet" else 0.4
    assert depth_rates(schedule, 0.4, 1) == [expected]


def test_a_function_sees_the_depths_from_1_to_the_number_of_blocks() -> None:
    seen: list[tuple[int, int]] = []

    def schedule(level: int, depth: int) -> float:
        seen.append((level, depth))
        return level / 10

    assert depth_rates(schedule, None, 3) == [0.1, 0.2, 0.3]
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("rates", [[0.0, 0.5, 1.0], (0.0, 0.5, 1.0), [0, 0.5, 1]])
def test_a_list_is_taken_as_it_is(rates: list[float]) -> None:
    assert depth_rates(rates, None, 3) == [0.0, 0.5, 1.0]


def test_a_named_schedule_needs_p() -> None:
    with pytest.raises(
        TypeError, match=r"p must be a number in .* for schedule='linear', got None"
    ):
        depth_rates("linear", None, 2)


@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.7])
def test_rates_are_finite_for_the_deepest_nets(p: float) -> None:
    rates = depth_rates("linear", p, 1202)
    assert math.fsum(rates) == pytest.approx(p * 1203 / 2, rel=1e-12)
