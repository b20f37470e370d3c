import statistics
from dataclasses import replace

import pytest
import scipy.stats
from PIL import Image

from stochastic_depth.cli.figure import plot
from stochastic_depth.cli.results import Comparison, Result
from stochastic_depth.cli.statistics import half_width, middle_mean


def result(seed: int, p: float, error: float, seconds: float = 0.1) -> Result:
    scores = {"error": error, "nll": 2 * error, "calibration_error": error / 2}
    history = [{"val_error": 0.5, "train_loss": 2.0}, {"val_error": error, "train_loss": 1.0}]
    return Result(
        seed=seed,
        p=p,
        last=scores,
        chosen={**scores, "error": error - 0.01},
        chosen_epoch=2,
        step_seconds=seconds,
        flops=1 - p / 2,
        expected_flops=1 - p / 2,
        expected_depth=9 - p,
        realised_depth=9 - p,
        history=history,
        curve=[{"branches": n, "error": error + (9 - n) / 20} for n in (9, 6, 3, 1)],
    )


def comparison(changes: list[float]) -> Comparison:
    """Rates 0 and 0.5, with these changes of the error by seed, and seeds of different levels."""
    levels = [0.2 + 0.1 * seed for seed in range(len(changes))]
    without = [result(seed, 0.0, level) for seed, level in enumerate(levels)]
    with_ = [
        result(seed, 0.5, level + change, 0.08)
        for seed, (level, change) in enumerate(zip(levels, changes, strict=True))
    ]
    return Comparison([*with_, *without])


@pytest.mark.parametrize("count", [2, 3, 5, 31, 40, 200])
def test_the_interval_is_that_of_students_t(count):
    values = [float(index**2 % 7) for index in range(count)]
    low, high = scipy.stats.t.interval(
        0.95, count - 1, statistics.fmean(values), scipy.stats.sem(values)
    )
    assert half_width(values) == pytest.approx((high - low) / 2, rel=1e-3)


def test_one_value_has_no_interval():
    assert half_width([3.0]) is None


def test_steps_that_waited_for_a_core_do_not_move_the_time():
    assert middle_mean([1.0, 1.1, 0.9, 1.0, 50.0]) == pytest.approx(1.0, abs=0.05)
    assert middle_mean([3.0]) == 3.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            [-0.08, -0.09, -0.10],
            "lowered the test error after the last epoch from 30.0 to 21.0 %: −9.0 points (95 % "
            "interval −11.5 to −6.5, 3 paired seeds). At the epoch chosen on validation images "
            "the change is −9.0 points (95 % interval −11.5 to −6.5, 3 paired seeds). A training "
            "step took 0.80 ± 0.00 × the time, with 0.75 ± 0.00 × the FLOPs.",
        ),
        ([0.08, 0.09, 0.10], "raised the test error after the last epoch from 30.0 to 39.0 %"),
        ([-0.08, 0.09, 0.01], "made no difference to the test error after the last epoch that is"),
        ([-0.08], "with this one seed, which tells nothing of chance. A training step took 0.80 ×"),
    ],
)
def test_the_sentence_is_what_the_numbers_support(changes, expected):
    (sentence,) = comparison(changes).findings(0.4)
    assert sentence.startswith("With 40 % of the training labels wrong, stochastic depth at p = ")
    assert expected in sentence
    (clean,) = comparison(changes).findings(0.0)
    assert clean.startswith("Stochastic depth at p = 0.5 ")


def test_differences_are_paired_so_the_levels_of_the_seeds_do_not_count():
    row = comparison([-0.05, -0.05, -0.05]).summary()["test error, last epoch, %"]
    assert row["without"] == pytest.approx([20, 30, 40])
    change = row["p = 0.5 minus without"]
    assert change["by_seed"] == pytest.approx([-5, -5, -5])
    assert change["half_width_95"] == pytest.approx(0, abs=1e-9)


def test_the_errors_with_less_depth_are_rows_of_their_own():
    found = comparison([-0.05, -0.05, -0.05]).summary()
    row = found["test error, 6 of 9 branches left, %"]
    assert row["without"] == pytest.approx([35, 45, 55])
    assert row["p = 0.5 minus without"]["mean"] == pytest.approx(-5)
    assert list(found)[-1] == "test error, 1 of 9 branches left, %"
    some = [result(0, 0.0, 0.2), replace(result(0, 0.5, 0.2), curve=[])]
    assert not any("left" in name for name in Comparison(some).summary())


@pytest.mark.parametrize("seeds", [1, 5])
def test_nothing_in_the_figure_is_clipped(seeds, tmp_path):
    plot(comparison(seeds * [-0.05]), "Network on Data", 0.4, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        pixels = image.convert("L")
        assert pixels.size[0] == 1000
        width, height = pixels.size
        strips = [(0, 0, width, 2), (0, height - 2, width, height)]
        strips += [(0, 0, 2, height), (width - 2, 0, width, height)]
        edge = [pixels.crop(strip) for strip in strips]
        assert all(part.getextrema() == (255, 255) for part in edge)
