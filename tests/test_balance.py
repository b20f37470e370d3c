"""Balanced decisions: exact invariants first, then statistics with fixed seeds.

Every statistical test would fail by chance with the probability of at most ALARM over all that it
compares (Bonferroni), by bounds of Hoeffding or of the normal distribution.
"""

import copy
import io
import itertools
import math
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch
from benchmarks import balance as benchmark

from stochastic_depth.drop.balance import (
    Rounds,
    balanced_order,
    coins,
    cost_classes,
    simulated,
    slowest,
    stream,
)

ALARM = 1e-6
LINEAR = [0.5 * level / 12 for level in range(1, 13)]
RATES = {
    "linear": LINEAR,
    "uniform": [0.3] * 10,
    "some never, some always": [0.0, 1.0, 0.25, 0.0, 0.9, 1.0, 0.5, 1e-3],
    "less than one in all": [0.05] * 8,
}


def sigmas(comparisons: int) -> float:
    """So many standard deviations are two-sided ALARM over all comparisons."""
    return -NormalDist().inv_cdf(ALARM / comparisons / 2)


def hoeffding(draws: int, comparisons: int) -> float:
    """A mean of so many independent numbers in [0, 1] is off by more with ALARM over all."""
    return math.sqrt(math.log(2 * comparisons / ALARM) / (2 * draws))


class Deck:
    """A model's branches, called by their numbers: which ones are dropped."""

    def __init__(
        self,
        rates: Sequence[float],
        seed: int = 0,
        rank: int = 0,
        classes: Sequence[int] | None = None,
    ) -> None:
        self.rates = list(rates)
        self.rounds = Rounds(classes or [0] * len(rates))
        self.generator, self.rank = stream(seed), rank

    def take(self, key: int) -> bool:
        coin = self.rounds.take(key, lambda: self.rates, self.generator, self.rank)
        return coin < self.rates[key]

    def call(self, *keys: int) -> list[bool]:
        return [self.take(key) for key in keys or range(len(self.rates))]


def reference(rates: Sequence[float], order: Sequence[int], u: float) -> list[bool]:
    """Madow's own words in fractions: the intervals that contain some u + k."""
    dropped, start = [False] * len(rates), Fraction(0)
    for i in order:
        end = start + Fraction(rates[i])
        point = u + math.ceil(start - Fraction(u))
        dropped[i] = start <= point < end
        start = end
    return dropped


# One draw


def systematic(rates: Sequence[float], order: Sequence[int], u: float) -> list[bool]:
    """Which branches are dropped."""
    return [coin < p for coin, p in zip(coins(rates, order, u), rates, strict=True)]


def test_systematic_is_what_madow_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        # 20 bits, so that no sum needs rounding, in either
        rates = (torch.randint(1 << 20, (9,), generator=generator) / (1 << 20)).tolist()
        order = torch.randperm(9, generator=generator).tolist()
        u = torch.rand((), dtype=torch.float64, generator=generator).item()
        assert systematic(rates, order, u) == reference(rates, order, u)


@pytest.mark.parametrize("u", [0.0, 0.1, 0.5, 1.0 - 2.0**-53])
@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_never_and_always_are_exact_and_the_count_is_the_sum_rounded(
    rates: list[float], u: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = set()
    for _ in range(50):
        dropped = systematic(rates, balanced_order([0] * len(rates), generator), u)
        assert all(dropped[i] for i, p in enumerate(rates) if p == 1.0)
        assert not any(dropped[i] for i, p in enumerate(rates) if p == 0.0)
        counts.add(sum(dropped))
    (count,) = counts  # whatever the order
    total = Fraction(sum(math.ceil(p * 2**53) for p in rates), 2**53)  # rounded as u is
    assert count in (math.floor(total), math.ceil(total))


def test_nothing_drifts_over_thousands_of_branches() -> None:
    rates = [0.1, 1.0, 0.0] * 2000
    dropped = systematic(rates, range(6000), 0.55)
    assert dropped[1::3] == [True] * 2000
    assert dropped[2::3] == [False] * 2000
    assert sum(dropped[::3]) == 200
    assert [i for i, d in enumerate(dropped[::3]) if d] == list(range(5, 2000, 10))


def test_every_branch_has_exactly_its_own_rate_whatever_the_order() -> None:
    rates, grid = [0.25, 0.5, 0.125, 0.875, 0.0, 1.0], 64
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0], [2, 4, 0, 5, 3, 1]):
        draws = [systematic(rates, order, k / grid) for k in range(grid)]
        assert [sum(column) / grid for column in zip(*draws, strict=True)] == rates


def test_a_coin_is_uniform_so_any_rate_may_be_compared_with_it() -> None:
    drawn = [coins([0.3, 0.6, 0.9], [2, 0, 1], k / 64) for k in range(64)]
    for column in zip(*drawn, strict=True):
        assert all(0.0 <= coin < 1.0 for coin in column)
        assert sorted(int(coin * 64) for coin in column) == list(range(64))


# Classes


def test_costs_within_a_tenth_are_one_class_and_small_classes_are_filled_up() -> None:
    assert cost_classes([1.0, 2.0] * 4) == [1, 0] * 4
    assert cost_classes([100, 95, 91, 90, 89, 80]) == [0] * 6  # two alone are too few
    assert cost_classes([100, 95, 91, 90, 89, 85, 82, 81]) == [0] * 4 + [1] * 4
    assert cost_classes([100, 95, 93, 92, 91, 85, 84, 83, 82]) == [0] * 5 + [1] * 4
    assert cost_classes([5, 1, 9, 7]) == [0] * 4
    assert cost_classes([40, 1, 1, 1, 1, 1, 1, 1]) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert cost_classes([]) == []


def test_all_ranks_drop_equally_many_of_each_class() -> None:
    classes = [0, 1, 2] * 8
    rates = [0.6 * (i + 1) / 24 for i in range(24)]
    decks = [Deck(rates, rank=rank, classes=classes) for rank in range(8)]
    different = 0
    for _ in range(200):
        dropped = [deck.call() for deck in decks]
        different += len({tuple(d) for d in dropped}) > 1
        for number in range(3):
            members = [i for i in range(24) if classes[i] == number]
            (count,) = {sum(d[i] for i in members) for d in dropped}
            assert abs(count - sum(rates[i] for i in members)) < 1.0 + 1e-9
    assert different == 200


# Ranks


def test_ranks_that_share_u_drop_equally_many_and_different_branches() -> None:
    decks = [Deck(LINEAR, seed=3, rank=rank) for rank in range(16)]
    for _ in range(100):
        dropped = {tuple(deck.call()) for deck in decks}
        assert len({sum(d) for d in dropped}) == 1
        assert len(dropped) > 4


def test_the_orders_of_all_ranks_are_different() -> None:
    # By chance two would be the same in 1 of 500 seeds: orders are told by 32 bits
    rates, drawn = [0.01 * 1.17**i for i in range(20)], []
    for rank in range(4096):
        deck = Deck(rates, rank=rank)
        deck.call()
        drawn.append(tuple(deck.rounds.state()["rounds"][0]))
    assert len(set(drawn)) == 4096
    assert stream(7).initial_seed() != stream(8).initial_seed()


# Frequencies


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_every_branch_drops_at_its_rate(rates: list[float]) -> None:
    # ALARM, by Hoeffding's bound for each branch; and none that can be dropped never is
    draws, deck = 6000, Deck(rates, seed=1)
    dropped = torch.tensor([deck.call() for _ in range(draws)]).double().mean(0)
    assert (dropped - torch.tensor(rates)).abs().max() < hoeffding(draws, len(rates))
    starved = [i for i, p in enumerate(rates) if p >= 0.05 and dropped[i] == 0.0]
    assert starved == []  # .95 ** 6000 < 1e-130


def test_all_sets_of_branches_are_dropped_equally_often_where_all_rates_are_equal() -> None:
    # ALARM, by normal bounds for each of the 10 pairs of 5 branches at p = .4
    draws, deck = 6000, Deck([0.4] * 5, seed=2)
    seen = Counter(tuple(i for i, d in enumerate(deck.call()) if d) for _ in range(draws))
    assert sorted(seen) == list(itertools.combinations(range(5), 2))
    expected, spread = draws / 10, math.sqrt(draws * 0.1 * 0.9)
    assert max(abs(n - expected) for n in seen.values()) < sigmas(10) * spread


def test_two_branches_are_slightly_negatively_correlated() -> None:
    # ALARM, by normal bounds for each of 66 pairs
    draws, deck = 8000, Deck([0.25] * 12, seed=4)
    dropped = torch.tensor([deck.call() for _ in range(draws)]).double()
    pairs = dropped.T.corrcoef()[tuple(torch.triu_indices(12, 12, 1))]
    assert (pairs + 1 / 11).abs().max() < sigmas(66) / math.sqrt(draws)


def test_of_unequal_rates_no_two_branches_are_positively_correlated() -> None:
    # ALARM, by normal bounds for each of 66 pairs
    draws, deck = 8000, Deck(LINEAR, seed=4)
    dropped = torch.tensor([deck.call() for _ in range(draws)]).double()
    pairs = dropped.T.corrcoef()[tuple(torch.triu_indices(12, 12, 1))]
    assert pairs.max() < sigmas(66) / math.sqrt(draws)
    # ALARM, by Hoeffding's bound: the variance of the count is the least that there can be
    fraction = sum(LINEAR) % 1.0
    variance = ((dropped.sum(1) - sum(LINEAR)) ** 2).mean().item()
    assert variance == pytest.approx(fraction * (1 - fraction), abs=hoeffding(draws, 1))


def test_one_call_tells_nothing_of_the_next_pass() -> None:
    # ALARM, by normal bounds for each branch
    draws, deck = 6000, Deck(LINEAR, seed=5)
    dropped = torch.tensor([deck.call() for _ in range(draws)]).double()
    both = torch.corrcoef(torch.cat([dropped[:-1], dropped[1:]], 1).T)
    assert both[:12, 12:].abs().max() < sigmas(144) / math.sqrt(draws - 1)


# Rounds


def test_a_forward_that_runs_several_times_a_step_is_balanced_each_time() -> None:
    deck = Deck([0.5] * 6)
    for _ in range(100):
        assert sum(deck.call()) == 3
        assert len(deck.rounds.state()["rounds"]) == 1


@pytest.mark.parametrize("first", [(0, 1, 2), (3, 4, 5), (2, 3), (1, 1, 1)])
def test_a_part_that_is_called_by_itself_leaves_the_next_forward_balanced(
    first: tuple[int, ...],
) -> None:
    deck = Deck([0.5] * 6)
    for _ in range(50):
        deck.call(*first)
        assert sum(deck.call()) == 3
        deck.call(*first)
        deck.call(*first)
        assert sum(deck.call()) == 3


def test_branches_that_run_in_turns_are_balanced_with_the_others() -> None:
    # 3 and 4 belong to two tasks; whichever runs, it reads the round of the others
    deck = Deck([0.5] * 4 + [0.5], seed=6)
    for _ in range(50):
        assert 1 <= sum(deck.call(0, 1, 2, 3)) <= 3
        assert len(deck.rounds.state()["rounds"]) == 1
        assert 1 <= sum(deck.call(0, 1, 2, 4)) <= 3
        assert len(deck.rounds.state()["rounds"]) == 1


def test_a_block_that_runs_several_times_takes_from_further_rounds() -> None:
    # ALARM, by Hoeffding's bound for each call
    keys, draws = (0, 1, 2, 1, 3, 1, 4), 5000
    deck = Deck([0.4] * 5, seed=7)
    drawn = []
    for _ in range(draws):
        dropped = deck.call(*keys)
        assert sum(dropped[i] for i in (0, 1, 2, 4, 6)) == 2  # the first calls: one round
        drawn.append(dropped)
    rates = torch.tensor(drawn).double().mean(0)
    assert (rates - 0.4).abs().max() < hoeffding(draws, len(keys))
    assert len(deck.rounds.state()["rounds"]) == 3
    assert len({(d[1], d[3], d[5]) for d in drawn}) == 2**3  # its calls are decided each by itself


def test_the_rounds_of_a_pass_drop_more_and_fewer_by_turns() -> None:
    deck = Deck([0.5] * 5)  # 2.5 in all
    for _ in range(50):
        deck.call(0, *[1, 2, 3, 4] * 4)
        counts = [sum(coin < 0.5 for coin in drawn) for drawn in deck.rounds.state()["rounds"]]
        assert set(counts) == {2, 3}  # four steps of .618 reach both halves of [0, 1)


def test_a_model_of_one_block_that_runs_many_times() -> None:
    deck = Deck([0.5, 0.5], seed=8)
    for _ in range(100):
        assert sum(deck.call(0, 1)) == 1


def test_ranks_that_call_a_block_unequally_often_stay_together() -> None:
    decks = [Deck([0.45] * 6, seed=9, rank=rank) for rank in range(4)]
    for _ in range(100):
        counts = []
        for rank, deck in enumerate(decks):
            counts.append(sum(deck.call(0, 1, 2, 3, 4, 5)))
            deck.call(*[3] * (rank + 1))
        assert len(set(counts)) == 1


def test_a_branch_that_is_never_called_keeps_nothing() -> None:
    # ALARM, by Hoeffding's bound for each branch
    draws, deck = 5000, Deck(LINEAR, seed=10)
    dropped = torch.tensor([deck.call(1, 2, 5, 7) for _ in range(draws)]).double().mean(0)
    expected = torch.tensor([LINEAR[i] for i in (1, 2, 5, 7)])
    assert (dropped - expected).abs().max() < hoeffding(draws, 4)
    assert len(deck.rounds.state()["rounds"]) == 1


def test_where_the_first_branch_is_called_no_more_the_rounds_are_bounded() -> None:
    # ALARM, by Hoeffding's bound over both branches; every call of the two is one round
    deck = Deck([0.5] * 4, seed=11)
    deck.call()
    drawn, most = [], 0
    for _ in range(4000):
        before = deck.generator.get_state()
        drawn.append(deck.call(2, 3))
        most = max(most, len(deck.rounds.state()["rounds"]))
        began = not torch.equal(before, deck.generator.get_state())
    assert most == 64
    assert began  # with 2 from then on, one round a pass
    assert len(deck.rounds.state()["rounds"]) == 1
    means = torch.tensor(drawn).double().mean(0)
    assert (means - 0.5).abs().max() < hoeffding(4000, 2)


def test_a_rate_that_changes_is_exact_at_once_and_balanced_from_the_next_round() -> None:
    deck = Deck([0.5] * 6, seed=12)
    for _ in range(100):
        deck.rates = [0.5] * 6
        deck.call(0, 1)
        deck.rates = [0.5, 0.5, 0.0, 1.0, 0.0, 1.0]
        assert deck.call(2, 3, 4, 5) == [False, True, False, True]
        deck.rates = [0.25] * 4 + [1.0] * 2
        assert sum(deck.call()) == 3


def test_a_rate_that_changes_within_a_round_has_its_own_frequency() -> None:
    # ALARM, by Hoeffding's bound
    draws, deck, dropped = 6000, Deck([0.2] * 6, seed=13), 0
    for _ in range(draws):
        deck.rates = [0.2] * 6
        deck.call(0, 1, 2)
        deck.rates = [0.7] * 6
        dropped += deck.take(3)
    assert abs(dropped / draws - 0.7) < hoeffding(draws, 1)


def test_a_rate_that_falls_over_training_keeps_the_count_at_its_sum() -> None:
    deck = Deck(LINEAR)
    for step in range(200):
        deck.rates = [p * (1.0 - step / 200) for p in LINEAR]
        assert abs(sum(deck.call()) - sum(deck.rates)) < 1.0


# Copies, pickles, resuming, threads


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda deck: pickle.loads(pickle.dumps(deck))]
)
def test_a_copy_has_rounds_of_its_own(clone: Callable[[Rounds], Rounds]) -> None:
    deck, same = Deck(LINEAR), Deck(LINEAR)
    for each in (deck, same):
        each.call(0, 1, 2)
    deck.rounds.limit = 5
    copied = clone(deck.rounds)
    assert (copied.classes, copied.limit) == ([0] * 12, 5)
    assert copied.state() == {}
    other = Deck(LINEAR, seed=99)
    other.rounds = copied
    for _ in range(3):
        other.call()
    assert deck.call(*range(3, 12)) == same.call(*range(3, 12))  # it was not disturbed


@pytest.mark.parametrize("keys", [(), (0, 1, 2), (3, 4), (0, 1, 1, 1)])
def test_a_run_goes_on_bit_for_bit(keys: tuple[int, ...]) -> None:
    deck = Deck(LINEAR)
    deck.call()
    deck.call(*keys)
    file = io.BytesIO()
    torch.save((deck.rounds.state(), deck.generator.get_state()), file)
    expected = [deck.call(3, 4, 1), deck.call(), deck.call()]
    resumed = Deck(LINEAR, seed=5)
    resumed.call()
    state, generator = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed.rounds.set_state(state)
    resumed.generator.set_state(generator)
    assert [resumed.call(3, 4, 1), resumed.call(), resumed.call()] == expected
    unchanged, _ = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert state == unchanged  # what is given is not used up


def test_the_state_of_nothing_and_that_of_another_model() -> None:
    deck = Deck(LINEAR)
    assert deck.rounds.state() == {}
    deck.call(3)
    deck.rounds.set_state({})
    assert deck.rounds.state() == {}
    deck.call()
    with pytest.raises(ValueError, match="the state is of 12 branches, and here are 5"):
        Rounds([0] * 5).set_state(deck.rounds.state())


def test_each_thread_has_passes_of_its_own() -> None:
    deck, counts = Deck([0.5] * 10), []
    barrier = threading.Barrier(4)

    def run() -> None:
        for _ in range(200):
            barrier.wait()
            counts.append(sum(deck.call()))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [5] * 800
    assert deck.rounds.state() == {}


# The slowest rank


@pytest.mark.parametrize("costs", [[1.0] * 12, [1.0, 3.0] * 6, [float(i + 5) for i in range(12)]])
def test_the_slowest_of_independent_ranks_is_the_mean_of_a_simulation(costs: list[float]) -> None:
    # ALARM, by Hoeffding's bound; .002 for the rounding of costs
    ranks, steps = 8, 20_000
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(steps, ranks, 12, generator=generator) >= torch.tensor(LINEAR)
    shares = kept.float() @ torch.tensor(costs) / sum(costs)
    expected = shares.max(1).values.mean().item()
    assert slowest(LINEAR, costs, ranks) == pytest.approx(expected, abs=hoeffding(steps, 3) + 0.002)


def test_what_the_slowest_executes_in_the_issue() -> None:
    rates = [0.6 * level / 12 for level in range(1, 13)]
    ones = [1.0] * 12
    assert round(slowest(rates, ones, 1), 3) == 0.675
    assert round(slowest(rates, ones, 64), 2) == 0.94
    for draw in ("shared", "balanced"):
        assert slowest(rates, ones, 4096, draw) == pytest.approx(0.675)  # type: ignore[arg-type]
    assert slowest([], [], 8) == 1.0
    assert slowest([1.0, 1.0], [1.0, 2.0], 8) == 0.0


def test_the_slowest_of_balanced_ranks_where_costs_differ_is_simulated() -> None:
    costs = [float(i + 5) for i in range(12)]
    alone = slowest(LINEAR, costs, 1, "balanced")
    assert alone == slowest(LINEAR, costs, 1, "shared") == slowest(LINEAR, costs, 1)
    many = slowest(LINEAR, costs, 64, "balanced")
    assert many == slowest(LINEAR, costs, 64, "balanced")  # a fixed seed
    assert alone < many < slowest(LINEAR, costs, 64) - 0.1
    generator = torch.Generator().manual_seed(1)
    assert slowest(LINEAR, costs, 64, "balanced", generator=generator) == pytest.approx(
        many, abs=0.02
    )


def test_the_simulation_draws_as_the_rounds_do() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = [0, 1] * 6
    for dropped in simulated(LINEAR, classes, 50, 40, generator):
        for number in range(2):
            members = dropped[:, number::2].sum(1)
            assert members.unique().numel() == 1
            assert abs(members[0].item() - sum(LINEAR[number::2])) < 1.0
    # ALARM, by Hoeffding's bound for each branch, with the ranks of a step counted as one draw
    means = torch.stack(
        [d.double().mean(0) for d in simulated(LINEAR, classes, 8, 2000, generator)]
    )
    expected = torch.tensor(LINEAR, dtype=torch.float64)
    assert (means.mean(0) - expected).abs().max() < hoeffding(2000, 12)


def test_the_benchmark_prints_its_tables(monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "RANKS", (1, 8))
    monkeypatch.setattr(benchmark, "STEPS", 20)
    monkeypatch.setattr(benchmark, "REAL", ("resnet18",))
    monkeypatch.setattr("sys.argv", ["benchmark"])
    benchmark.main()
    printed = capsys.readouterr().out
    assert printed.count("| 12 whole blocks, linear .6 |") == 6
    assert "| 12 whole blocks, linear .6 | independent | 0.675 | 0.845 |" in printed
    assert "| 12 whole blocks, linear .6 | shared | 0.675 | 0.675 |" in printed
    assert printed.count("| resnet18 |") == 1
