"""What ``apply`` tries on the examples before it believes what was found."""

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd

SIZES: list[int] = []


class Block(nn.Module):
    """Notes the sizes of its batches, and takes none that is smaller than ``least``."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        if len(x) < self.least:
            raise ValueError("too few samples")
        return x + self.f(x)


def sizes(least: int, n: int) -> list[int]:
    SIZES.clear()
    model = sd.apply(Block(least), 0.2, example_inputs=torch.randn(n, 4))
    assert len(sd.branches(model)) == 1
    return SIZES


def test_a_branch_is_counted_twice_on_one_sample() -> None:
    assert sizes(least=1, n=8)[-2:] == [1, 1]


def test_a_model_that_takes_no_single_sample_is_tried_on_all() -> None:
    assert sizes(least=2, n=8)[-3:] == [1, 8, 8]


class Picky(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 4:
            raise ValueError("too few samples")
        return super().forward(x)


def test_where_a_branch_takes_no_selected_samples_its_error_is_told() -> None:
    model = Block(least=1)
    model.f = Picky(4, 4)
    with pytest.warns(UserWarning, match="samples selected, the model fails: ValueError: too few"):
        sd.apply(model, 0.5, mode="row", example_inputs=torch.randn(4, 4))
    (branch,) = sd.branches(model)
    out = model(x := torch.ones(4, 4)) - x
    assert branch.decided == 4
    assert branch.dropped == int((out == 0).all(1).sum())


class Counting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / len(x)


class Few(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(least=1)
        self.block.f = Counting(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("blocks", [None, "block"])
@pytest.mark.parametrize("size", [2, 3])
def test_all_is_tried_with_a_part_of_the_samples(size: int, blocks: str | None) -> None:
    model = Few()
    with pytest.warns(UserWarning, match="its samples are not independent"):
        sd.apply(model, 0.5, mode="row", blocks=blocks, example_inputs=torch.randn(size, 4))
    plain = model.block.f(x := torch.ones(5, 4)) * 2.0
    for _ in range(8):
        added = model(x) - x
        assert all(torch.allclose(a, b) or not a.any() for a, b in zip(added, plain, strict=True))
    assert sd.branches(model)[0].dropped > 0
