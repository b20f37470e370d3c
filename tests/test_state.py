"""The state beside a checkpoint: a run that is killed ends as if it had not been."""

import copy
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stochastic_depth as sd
from models import small, small_batch
from resumable import checkpoints, read
from stochastic_depth.branch import choices

MODES = ["batch", "row", "subset"]
SCRIPT = Path(__file__).with_name("resumable.py")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model.train()(small_batch() + 0.1 * torch.randn(6, 3, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def counts(model: nn.Module) -> list[tuple[float, int, int]]:
    return [(b.p, b.decided, b.dropped) for b in sd.branches(model)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"seed": 3}, {"ranks": "shared"}, {"ranks": "separate", "seed": 3}]
)
def test_a_run_goes_on_bit_for_bit(options: dict, mode: str) -> None:
    options = {"schedule": "uniform", "mode": mode, "example_inputs": small_batch(), **options}
    torch.manual_seed(0)
    model = sd.apply(small(False), 0.5, **options)
    keys = list(model.state_dict())
    optimizer = sgd(model)
    train(model, optimizer, 3)
    sd.branches(model)[0].p = 0.25
    file = io.BytesIO()
    state = (model.state_dict(), optimizer.state_dict(), sd.state_dict(model))
    torch.save(state, file)
    expected = train(model, optimizer, 5)
    assert list(model.state_dict()) == keys

    torch.manual_seed(99)
    resumed = sd.apply(small(False, seed=5), 0.1, **options)
    weights, momenta, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = sgd(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(momenta)
    sd.load_state_dict(resumed, state)
    assert train(resumed, again, 5) == expected
    assert counts(resumed) == counts(model)


def test_the_layer_and_several_models_in_one_go_on_too() -> None:
    options = {"schedule": "uniform", "seed": 1, "example_inputs": small_batch()}
    parts = {
        "a": sd.apply(small(False), 0.5, **options),
        "b": sd.apply(small(False), 0.5, **options),
        "c": sd.StochasticDepth(nn.Linear(5, 5), p=0.5),
    }
    model, x = nn.ModuleDict(parts), small_batch()

    def run() -> torch.Tensor:
        return model["c"](model["a"](x) + 2 * model["b"](x))

    run()
    state = sd.state_dict(model)
    first = [run() for _ in range(8)]
    sd.load_state_dict(model, state)
    for out in first:
        assert torch.equal(run(), out)


@pytest.mark.parametrize("other", [{"exclude": "blocks.0:*"}, None])
def test_the_state_of_another_model_is_refused_and_changes_nothing(other: dict | None) -> None:
    state = sd.state_dict(sd.apply(small(), 0.2, seed=0))
    model = small() if other is None else sd.apply(small(), 0.2, **other)
    torch.manual_seed(5)
    before = copy.deepcopy(sd.state_dict(model))
    with pytest.raises(ValueError, match="apply stochastic depth as it was when the state was"):
        sd.load_state_dict(model, state)
    assert torch.equal(sd.state_dict(model)["torch"], before["torch"])


@pytest.mark.parametrize("mode", MODES)
def test_a_state_saved_before_the_first_batch_and_one_after_it_fit(mode: str) -> None:
    """Without example inputs the first batch settles the branches, which stay the same."""
    options = {"schedule": "uniform", "mode": mode, "seed": 4}
    model, other = (sd.apply(small(False), 0.5, **options) for _ in range(2))
    before = sd.state_dict(model)
    out = model(small_batch())
    sd.load_state_dict(other, before)
    assert torch.equal(other(small_batch()), out)
    third = sd.apply(small(False), 0.1, **options)
    sd.branches(model)[0].p = 0.7
    sd.load_state_dict(third, sd.state_dict(model))
    torch.manual_seed(0)
    outs = [third(small_batch()), model(small_batch())]
    assert torch.equal(*outs)
    assert counts(third) == counts(model)


class Told(nn.Module):
    """Its inputs cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([small(False)])

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.nets[0](given["x"])


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"draw": "balanced"}], ids=str)
def test_a_model_that_waits_for_its_first_batch_takes_a_state_then(options: dict) -> None:
    given, x = {"schedule": "uniform", **options}, {"x": small_batch()}
    model, other, third = (sd.apply(Told(), p, **given) for p in (0.5, 0.1, 0.1))
    model(x)
    sd.branches(model)[0].p = 0.7
    state = sd.state_dict(model)
    expected = [model(x) for _ in range(8)]
    sd.load_state_dict(other, state)
    assert sd.branches(other) == []
    assert all(torch.equal(other(x), out) for out in expected)
    assert counts(other) == counts(model)
    state["branches"].pop()
    sd.load_state_dict(third, state)
    for _ in range(2):
        with pytest.raises(ValueError, match="apply stochastic depth as it was when the state was"):
            third(x)


class Pair(nn.Module):
    """Networks that are called by themselves, of inputs that cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = Told(), Told()


def calls(pair: Pair, n: int) -> list[torch.Tensor]:
    return [net({"x": small_batch()}) for _ in range(n) for net in (pair.maker, pair.judge)]


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
def test_a_state_of_networks_that_are_found_one_by_one_waits_for_all_of_them() -> None:
    options = {"p": 0.5, "schedule": "uniform", "seed": 3}
    model, resumed, later = (sd.apply(Pair(), **options) for _ in range(3))
    calls(model, 2)
    state = sd.state_dict(model)
    expected = calls(model, 4)
    sd.load_state_dict(resumed, state)
    with pytest.raises(ValueError, match="load it when each has had a call in training"):
        calls(resumed, 1)
    calls(later, 1)
    sd.load_state_dict(later, state)
    assert all(map(torch.equal, calls(later, 4), expected))
    assert counts(later) == counts(model)


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
def test_a_state_that_was_loaded_is_restored_once() -> None:
    model, resumed = (sd.apply(Pair(), 0.5, schedule="uniform", seed=3) for _ in range(2))
    x = {"x": small_batch()}
    model.maker(x)
    sd.load_state_dict(resumed, sd.state_dict(model))
    for pair in (model, resumed):
        for _ in range(4):
            pair.maker(x)
        pair.judge(x)
    assert counts(resumed) == counts(model)


@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
def test_a_state_that_waits_for_the_first_batch_is_saved_again() -> None:
    model, resumed, again = (sd.apply(Told(), 0.5, seed=i) for i in range(3))
    x = {"x": small_batch()}
    model(x)
    sd.load_state_dict(resumed, sd.state_dict(model))
    sd.load_state_dict(again, sd.state_dict(resumed))
    assert all(torch.equal(model(x), again(x)) for _ in range(8))
    assert counts(again) == counts(model)


class Two(nn.Module):
    """Two networks of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = small(False), small(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def test_each_seed_goes_on_in_its_own_part_before_the_first_batch() -> None:
    """A model that waits is met before its parts, and with its branches after some of them."""

    def fresh(seed: int) -> nn.Module:
        options = {"p": 0.5, "schedule": "uniform"}
        model = sd.apply(Two(), seed=seed, **options)
        sd.apply(model.first, seed=seed + 1, example_inputs=small_batch(), **options)
        return model.train()

    model, resumed = fresh(1), fresh(5)
    model(small_batch())
    sd.load_state_dict(resumed, sd.state_dict(model))
    assert all(torch.equal(model(small_batch()), resumed(small_batch())) for _ in range(8))
    assert counts(resumed) == counts(model)


def test_what_was_set_of_branches_goes_on_too() -> None:
    x, options = small_batch(), {"schedule": "uniform", "mode": "row"}
    model, resumed = (sd.apply(small(), 0.5, example_inputs=x, **options) for _ in range(2))
    layer, other = (sd.StochasticDepth(nn.Linear(5, 5), p=0.5) for _ in range(2))
    sd.branches(model)[0].mode = "subset"
    sd.branches(model)[1].scale = "none"
    sd.branches(model)[2].dropped_grad = "zero"
    layer.mode, layer.scale = "row", "none"
    sd.load_state_dict(nn.Sequential(resumed, other), sd.state_dict(nn.Sequential(model, layer)))
    for mine, theirs in zip(sd.branches(resumed), sd.branches(model), strict=True):
        assert choices(mine) == choices(theirs)
    assert (other.mode, other.scale) == ("row", "none")


@pytest.mark.parametrize("other", [{"draw": "balanced"}, {"ranks": "shared"}, {"seed": 1}, {}])
def test_the_state_of_other_settings_is_refused(other: dict) -> None:
    options = {"example_inputs": small_batch()}
    model = sd.apply(small(), 0.5, **options, **other)
    mode = "batch" if other else "row"
    state = sd.state_dict(sd.apply(small(), 0.5, mode=mode, **options))
    before, random = counts(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"this one has|apply with mode='row'"):
        sd.load_state_dict(model, {**state, "torch": torch.zeros_like(random)})
    assert counts(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="state has no 'branches', 'draws', 'torch': give what"):
        sd.load_state_dict(sd.apply(small(), 0.5), {})


def test_rates_that_a_schedule_has_scaled_are_kept_with_their_targets() -> None:
    model, other = (sd.apply(small(), 0.4, example_inputs=small_batch()) for _ in range(2))
    sd.branches(model)[0].p = 0.2
    sd.RateSchedule(model, lambda step: 0.5)
    sd.load_state_dict(other, sd.state_dict(model))
    for ours, theirs in zip(sd.branches(other), sd.branches(model), strict=True):
        assert (ours.p, ours.target) == (theirs.p, theirs.target)
        assert theirs.p == 0.5 * theirs.target


@pytest.mark.parametrize("kind", [np.float64, torch.tensor])
def test_rates_in_a_state_may_be_numbers_of_numpy_or_torch(kind: Callable[[float], Any]) -> None:
    model = sd.apply(small(), 0.5, seed=0, example_inputs=small_batch())
    state = sd.state_dict(model)
    expected = [model(small_batch()) for _ in range(8)]
    for values in state["branches"]:
        values |= {name: kind(values[name]) for name in ("p", "target")}
    sd.load_state_dict(model, state)
    for out in expected:
        assert torch.equal(model(small_batch()), out)


@pytest.mark.parametrize("bad", [{"p": 2.0}, {"target": -1.0}, {"scale": "half"}])
def test_a_state_with_a_bad_value_changes_nothing(bad: dict[str, Any]) -> None:
    model = sd.apply(small(), 0.5, example_inputs=small_batch())
    state = copy.deepcopy(sd.state_dict(model))
    state["branches"][0]["p"] = 0.3
    state["branches"][-1] |= bad
    before = copy.deepcopy(sd.state_dict(model)["branches"])
    with pytest.raises(ValueError, match=f"must be .*{next(iter(bad.values()))}"):
        sd.load_state_dict(model, state)
    assert sd.state_dict(model)["branches"] == before


# --- kill and resume


class Run:
    """Processes of resumable.py, one a rank."""

    def __init__(self, folder: Path, steps: int, mode: str, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.given = [sys.executable, str(SCRIPT), str(folder), str(steps), mode]
        self.starts = 0
        self.processes: list[subprocess.Popen[str]] = []
        self.stderr = ""

    def start(self) -> None:
        self.starts += 1
        store = self.folder / f"store{self.starts}"
        # Damage is told of by a warning, which shall not end the run.
        environment = {**os.environ, "PYTHONWARNINGS": "default", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(self.ranks):
            group = [str(rank), str(self.ranks), str(store)] if self.ranks > 1 else []
            self.processes.append(
                subprocess.Popen(
                    [*self.given, *group],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )

    def kill(self, after_steps: int, delay: float, victim: int) -> bool:
        """Kill ``victim`` that long after it printed so many lines; False: it ended before."""
        process = self.processes[victim]
        assert process.stdout is not None
        lines = sum(1 for _ in zip(range(after_steps), process.stdout, strict=False))
        time.sleep(delay)
        process.kill()  # SIGKILL
        killed = process.wait() == -signal.SIGKILL
        if lines == after_steps and killed:
            for other in self.processes:
                other.kill()
        self.join()
        return killed

    def join(self) -> None:
        for process in self.processes:
            self.stderr += process.communicate(timeout=60)[1]
        self.processes = []

    def finals(self) -> list[Path]:
        return [self.folder / f"final.rank{rank}.pt" for rank in range(self.ranks)]


def damage(folder: Path, rank: int, dice: random.Random) -> Path:
    """Spoil the newest checkpoint of a rank."""
    newest = list(checkpoints(folder, rank).values())[-1]
    content = bytearray(newest.read_bytes())
    if dice.random() < 0.5:
        del content[dice.randrange(len(content)) :]
    else:
        content[dice.randrange(len(content))] ^= 1
    newest.write_bytes(content)
    return newest


def kill_and_resume(folder: Path, ranks: int, mode: str, steps: int, kills: int, seed: int) -> int:
    """How often a run was killed, and some of its checkpoints damaged, before it ended."""
    dice = random.Random(seed)
    runs = []
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
        runs.append(Run(folder / name, steps, mode, ranks))
    whole, killed = runs
    whole.start()
    whole.join()
    assert all(path.exists() for path in whole.finals()), whole.stderr
    done = 0
    while done < kills:
        killed.start()
        steps_of_this = dice.randint(1, max(1, 2 * (steps - 2) // (3 * kills)))
        victim = dice.randrange(ranks)
        done += killed.kill(steps_of_this, dice.uniform(0, 0.005), victim)
        assert not any(path.exists() for path in killed.finals()), killed.stderr
        if done % 3 == 2 and len(checkpoints(killed.folder, victim)) == 3:
            spoiled = damage(killed.folder, victim, dice)
            killed.stderr = ""
            killed.start()
            done += killed.kill(1, 0.0, victim)
            assert f"{spoiled} is cut short or corrupted" in killed.stderr
    killed.start()
    killed.join()
    for path, expected in zip(killed.finals(), whole.finals(), strict=True):
        assert path.exists(), killed.stderr
        (weights, *rest), (others, *others_rest) = read(path), read(expected)
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)
        assert rest[0] == others_rest[0]
        assert torch.equal(rest[1], others_rest[1])
    return done


@pytest.mark.parametrize(("ranks", "mode", "kills"), [(2, "batch", 1)])
def test_a_killed_run_ends_as_the_uninterrupted_one(
    ranks: int, mode: str, kills: int, tmp_path: Path
) -> None:
    assert kill_and_resume(tmp_path, ranks, mode, steps=12, kills=kills, seed=ranks) >= kills


@pytest.mark.zoo
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_many_times(ranks: int, mode: str, tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, ranks, mode, steps=60, kills=8, seed=ranks) >= 8


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    from resumable import write

    path = tmp_path / "step1.rank0.pt"
    write(path, {"x": torch.ones(100)})
    content = path.read_bytes()
    assert torch.equal(read(path)["x"], torch.ones(100))
    for damaged in (content[:-1], content[:70], b"", content[:80] + b"!" + content[81:]):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{path} is cut short or corrupted"):
            assert read(path) is None
