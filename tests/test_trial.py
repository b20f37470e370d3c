"""What ``apply`` tries on the examples before it believes what was found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.find.zeros import without, zeros_in
from stochastic_depth.trial import _are_close

SIZES: list[int] = []
note = SIZES.append  # a list that a forward itself names is put back


class Block(nn.Module):
    """Notes the sizes of its batches, and takes none that is smaller than ``least``."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        note(len(x))
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
    torch.manual_seed(0)
    model = Few()
    with pytest.warns(UserWarning, match="its samples are not independent"):
        sd.apply(model, 0.5, mode="row", blocks=blocks, example_inputs=torch.randn(size, 4))
    plain = model.block.f(x := torch.ones(5, 4)) * 2.0
    for _ in range(8):
        added = model(x) - x  # which rounds what was added to ones
        assert all(
            torch.allclose(a, b, atol=1e-6) or not a.any()
            for a, b in zip(added, plain, strict=True)
        )
    assert sd.branches(model)[0].dropped > 0


def test_complex_outputs_are_compared() -> None:
    x = torch.randn(4, dtype=torch.complex64)
    assert _are_close(x, x.clone())
    assert not _are_close(x, x + 0.5j)


def test_parameters_that_are_zero_are_others_for_a_while() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.zeros_(model[0].weight)
    before = [(p.data_ptr(), p._version) for p in model.parameters()]
    zeros = zeros_in(model)
    assert [id(p) for p in zeros] == [id(model[0].weight)]  # and no bias
    with without(zeros):
        assert model[0].weight.any()
    assert [(p.data_ptr(), p._version) for p in model.parameters()] == before
    assert not model[0].weight.any()


class AcrossTheBatch(nn.Module):
    """Attention between samples whose last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.o.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) @ self.q(x).T).softmax(-1) @ x)


def test_samples_that_will_depend_on_each_other_are_not_selected() -> None:
    model = Block(least=1)
    model.f = AcrossTheBatch()
    with pytest.warns(UserWarning, match="samples depend on each other"):
        sd.apply(model, 0.5, mode="row", example_inputs=torch.randn(6, 4))
    assert sd.branches(model)[0].place is None


class ByList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Listed(), Listed()])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        known = weights.tolist()
        for block in self.blocks:
            x = block(x, known)
        return x


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = Weighs()

    def forward(self, x: Tensor, weights: list[float]) -> Tensor:
        return x + self.f(x, weights)


class Weighs(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, weights: list[float]) -> Tensor:
        rows = zip(super().forward(x), weights, strict=False)
        return torch.stack([row * weight for row, weight in rows])


@pytest.mark.parametrize("size", [2, 4, 6])
def test_what_each_sample_is_given_in_a_list_is_not_mixed_up(size: int) -> None:
    model, weights = ByList(), torch.arange(1.0, size + 1)
    with pytest.warns(UserWarning, match="its samples are not independent"):
        sd.apply(model, 0.5, mode="row", example_inputs=(torch.randn(size, 4), weights))
    assert [branch.place for branch in sd.branches(model)] == [None, None]


class CountingLinear(nn.Linear):
    """Does something besides computing that others depend on, of which tensors say nothing."""

    def __init__(self, do: Callable[[dict[str, float], Tensor], None]) -> None:
        super().__init__(4, 4)
        self.do = do

    def forward(self, x: Tensor, told: dict[str, float]) -> Tensor:
        y = super().forward(x)
        self.do(told, y)
        return y


class Numbered(nn.Module):
    """Its layers tell each other their number, or a size, in a dict."""

    def __init__(self, do: Callable[[dict[str, float], Tensor], None]) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(4, 4), nn.ModuleList(CountingLinear(do) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        told = {"n": 0.0}
        x = x + self.first(x)
        for layer in self.layers:
            x = torch.tanh(x + layer(x, told)) + told["n"]
        return x


def count(told: dict[str, float], y: Tensor) -> None:
    told["n"] += 1


def measure(told: dict[str, float], y: Tensor) -> None:
    told["n"] = float(y.abs().max())


@pytest.mark.parametrize("do", [count, measure])
def test_a_branch_that_tells_others_a_number_is_not_dropped(do: Callable) -> None:
    model = sd.apply(Numbered(do), 0.5, example_inputs=torch.randn(2, 4))
    assert [b.name for b in sd.branches(model)] == [":first"]
    text = str(sd.summary(model))
    assert text.count("left out it does not change the model's output as its sum says") == 2


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


def test_a_branch_with_noise_in_evaluation_is_dropped() -> None:
    block = Block(least=1)
    block.f = Noisy(4, 4)
    model = sd.apply(nn.Sequential(block, Noisy(4, 4)), 0.5, example_inputs=torch.randn(2, 4))
    assert len(sd.branches(model)) == 1


class Memory(nn.Module):
    """Adds a branch to a buffer, and writes another sum there."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("memory", torch.ones(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.memory.add_(x.mean().detach())
        out = self.memory.add(self.f(x * self.memory))
        return out.add(self.g(out))


def test_a_buffer_may_be_a_shortcut() -> None:
    x = torch.randn(2, 4)
    model = sd.apply(Memory(), 1.0, schedule="uniform", example_inputs=x)
    assert [b.name for b in sd.branches(model)] == [":f", ":g"]
    assert torch.equal(model(x), torch.ones(2, 4) + x.mean())


class AlwaysDrops(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Permutes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, torch.randperm(4)]


GENERATOR = torch.Generator()


class PermutesByItsOwn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, torch.randperm(4, generator=GENERATOR)]


@pytest.mark.parametrize("kind", [AlwaysDrops, Permutes, PermutesByItsOwn])
def test_a_branch_with_dropout_in_evaluation_is_dropped(kind: type[nn.Linear]) -> None:
    torch.manual_seed(0)
    block = Block(least=1)
    block.f = kind(4, 4)
    model = sd.apply(nn.Sequential(block, kind(4, 4)), 0.5, example_inputs=torch.randn(2, 4))
    assert len(sd.branches(model)) == 1


class Routed(nn.Module):
    """Comes to its second block where its first is kept, alone."""

    def __init__(self, do: Callable[[dict[str, float], Tensor], None]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), CountingLinear(do)
        nn.init.constant_(self.first.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        told = {"n": 0.0}
        x = x + self.third(x, told)
        x = x + self.first(x) + told["n"]
        if x.mean() > 2:
            x = x + self.second(x)
        return x


@pytest.mark.parametrize("does", [None, count])
def test_a_model_that_goes_another_way_without_a_branch(does: Callable | None) -> None:
    torch.manual_seed(0)
    do = does or (lambda told, y: None)
    model = sd.apply(Routed(do), 0.5, example_inputs=torch.randn(2, 4))
    names = {b.name for b in sd.branches(model)}
    assert names == {":first", ":second"} | (set() if does else {":third"})
