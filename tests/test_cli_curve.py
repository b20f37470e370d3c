"""The ranking on validation images, and the test error with fewer and fewer branches."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from stochastic_depth.cli.curve import POINTS, Watched, cost, counts, curve, rank
from stochastic_depth.cli.training import EVALUATION_COST, Variant

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x.tanh())


def variant(p: float = 0.0, depth: int = 5) -> Variant:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(depth)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), *blocks, nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the blocks change the classes
    if p:
        sd.apply(model, p=p, example_inputs=torch.zeros(2, 3, 3, 3))
    return Variant(p, model, (0.5,) * 3, (0.25,) * 3).eval()


def images(seed: int) -> DataLoader:
    source = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (60, 3, 3, 3), dtype=torch.uint8, generator=source)
    return DataLoader(TensorDataset(pixels, torch.randint(4, (60,), generator=source)), 20)


def without(gone: list[str], seed: int) -> tuple[float, float]:
    """The loss and the error without these branches, whose weights are zeroed instead."""
    model = variant()
    with torch.no_grad():
        for name in gone:
            for parameter in model.model[int(name.partition(":")[0])].parameters():
                parameter.zero_()
        batches = list(images(seed))
        logits = [model(pixels) for pixels, _ in batches]
    losses = [float(cross_entropy(a, b[1])) for a, b in zip(logits, batches, strict=True)]
    wrong = sum(int((a.argmax(1) != b[1]).sum()) for a, b in zip(logits, batches, strict=True))
    return sum(losses) / len(losses), wrong / 60


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_least_important_go_first_and_the_errors_are_those_without_them(p):
    ticks: list[float] = []
    val, test = (Watched(images(seed), CPU, ticks.append) for seed in (1, 2))
    trained = variant(p)
    ranking, unranked = rank(trained, val)
    names = [f"{i}:body" for i in range(2, 7)]
    assert ranking == sorted(names, key=lambda name: without([name], seed=1)[0])
    assert unranked == {}
    points = curve(trained, ranking, 5, test, torch.zeros(2, 3, 3, 3))
    assert points == [
        {"branches": left, "error": pytest.approx(without(ranking[: 5 - left], seed=2)[1])}
        for left in (4, 3, 2, 1)
    ]
    assert len({point["error"] for point in points}) > 2
    assert sum(ticks) == pytest.approx(cost(5, 3, 3) + EVALUATION_COST)  # and a first look


def test_what_cannot_be_ranked_is_said_and_stays():
    trained = variant()
    with torch.no_grad():
        trained.model[1].weight.fill_(float("nan"))
    val = Watched(images(1), CPU, lambda cost: None)
    ranking, unranked = rank(trained, val)
    assert ranking == []
    assert unranked == {"every branch": "the loss of the whole model is nan"}
    assert curve(trained, ranking, 5, val, torch.zeros(2, 3, 3, 3)) == []
    assert [
        p["branches"] for p in curve(variant(), ["2:body"], 5, val, torch.zeros(2, 3, 3, 3))
    ] == [4]


@pytest.mark.parametrize("depth", [1, 2, 5, 12, 13, 14, 48, 200])
def test_the_numbers_of_branches_go_down_to_one(depth):
    found = counts(depth)
    assert found == sorted(set(found), reverse=True)
    assert len(found) == min(depth - 1, POINTS)
    assert not found or (found[-1] == 1 and found[0] < depth)
