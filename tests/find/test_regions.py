"""Which sums have a residual branch, and which only look like it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from find import small
from find.small import WIDTH
from stochastic_depth.find import find
from stochastic_depth.find.plan import Findings


def look(model: nn.Module, *shape: int) -> Findings:
    torch.manual_seed(0)
    return find(model, (torch.randn(*(shape or (3, WIDTH))),), {}, samples=None)


def modules(model: nn.Module, *shape: int) -> list[tuple[str, ...]]:
    return [b.modules for b in look(model, *shape).branches]


def test_branches_that_are_given_as_functions() -> None:
    assert modules(small.Lambdas()) == [("first.norm", "a"), ("second.norm", "b")]


def test_residuals_that_are_carried_to_the_next_layer() -> None:
    expected = [(f"layers.{i}.norm", f"layers.{i}.f") for i in range(3)]
    assert modules(small.Carried()) == expected


def test_sums_that_are_handed_down() -> None:
    assert modules(small.HandedDown()) == [("inner", "middle.output.f")]


def test_sums_by_siblings() -> None:
    assert modules(small.Siblings()) == [("layers.0.f",), ("layers.2.f",)]


SPELLINGS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "x - y": lambda x, y: x - y,
    "alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "alpha of x": lambda x, y: torch.add(y, x, alpha=0.5),
    "keywords": lambda x, y: torch.add(input=x, other=y),
    "in place": lambda x, y: y.add_(x),
    "stack": lambda x, y: torch.stack([x, y]).sum(0),
    "mean of a stack": lambda x, y: torch.stack([x, y]).mean(0),
    "addcmul": lambda x, y: torch.addcmul(x, y, torch.ones(WIDTH)),
    "addmm": lambda x, y: torch.addmm(x, y, torch.eye(WIDTH)),
    "index_add": lambda x, y: x.clone().index_add_(0, torch.arange(3), y),
    "scatter_add": lambda x, y: x.scatter_add(0, torch.arange(3)[:, None].expand(-1, WIDTH), y),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_sums_in_any_spelling(name: str) -> None:
    (branch,) = look(small.Spelled(SPELLINGS[name])).branches
    assert branch.modules == ("f",)
    plain = list(SPELLINGS).index(name) < 7
    assert (len(branch.sums), len(branch.joins)) == ((1, 0) if plain else (0, 1))


def test_the_terms_of_a_larger_stack_are_told() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = small.linear(), small.linear()

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, self.f(x), self.g(x)]).sum(0)

    found = look(Stacked())
    assert found.branches == []
    assert ["in a stack" in refused.reason for refused in found.refused] == [True, True]


def test_a_sum_of_slices() -> None:
    (branch,) = look(small.Slices()).branches
    assert (len(branch.sums), len(branch.joins)) == (1, 1)
    assert branch.kind == "identity"


def test_a_projection() -> None:
    class Projection(small.Block):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(small.linear(), nn.ReLU(), small.linear())
            self.project = small.linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.project(x) + self.f(x)

    (branch,) = look(nn.Sequential(Projection(), small.linear())).branches
    assert (branch.name, branch.kind) == ("0:f", "projection")


def test_a_light_path_beside_a_projection_block_is_no_shortcut() -> None:
    class Beside(small.Block):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.project = small.linear(), small.linear()

        def forward(self, x: Tensor) -> Tensor:
            y = self.project(x) + self.g(self.f(x).relu())
            return y + self.norm(x)

    (branch,) = look(nn.Sequential(Beside(), small.linear())).branches
    assert (branch.modules, branch.kind) == (("0.f", "0.g"), "projection")


def test_a_beginning_that_is_given_again_is_no_shortcut_of_the_whole() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.head = small.linear(), small.linear()
            self.f = nn.ModuleList(small.linear() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first = x = self.start(x)
            for f in self.f:
                x = x + f(x) + 0.1 * first
            return self.head(x)

    assert modules(Again()) == [("f.0",), ("f.1",), ("f.2",)]


class Sampled(small.Block):
    """The reparametrisation of a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.deviation, self.head = small.linear(), small.linear(), small.linear()

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean(x)
        deviation = self.deviation(self.f(x).relu()).exp()
        return self.head(mean + torch.randn_like(mean) * deviation)


def test_a_sample_of_a_distribution_is_no_branch_and_is_told() -> None:
    found = look(Sampled())
    assert found.branches == []
    assert [(r.name, "a sample of a distribution" in r.reason) for r in found.refused] == [
        (":f", True)
    ]


class Cell(small.Block):
    """The first step of a minimal gated recurrent unit, whose state is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = small.linear(), small.linear()

    def forward(self, x: Tensor) -> Tensor:
        z = self.gate(x).sigmoid()
        return self.head((1 - z) * torch.zeros_like(x) + z * self.f(x))


class Forgetting(small.Block):
    """The first step of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.forget, self.gate, self.head = small.linear(), small.linear(), small.linear()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.forget(x).sigmoid() * torch.zeros_like(x)
        return self.head(kept + x.sigmoid() * self.f(self.gate(x)).tanh())


class Scores(small.Block):
    """Attention's, to keys and to positions."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.g, self.head = small.linear(), small.linear(), nn.Linear(3, 3)
        self.positions = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query(x), self.g(self.f(x))
        return self.head(q @ k.mT / 2 + q @ self.positions.mT)


class Steps(small.Block):
    """Of a recurrent layer, which begins with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.head = small.linear(), small.linear()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norm(x).chunk(2)
        return self.head(self.f(second) + self.g(self.f(first).tanh()))


@pytest.mark.parametrize(
    "model",
    [small.Gates(), small.Noisy(), small.ParameterAsShortcut(), small.TokenShift(),
     small.WideAndDeep(), Cell(), Forgetting(), Scores()],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_no_branch_where_there_is_none(model: nn.Module) -> None:
    assert look(model).branches == []


def test_what_starts_from_another_part_is_no_branch() -> None:
    assert look(Steps(), 4, WIDTH).branches == []


def test_positional_convolutions_are_no_branch_and_are_told() -> None:
    found = look(small.PositionalConvolutions(), 2, 5, WIDTH)
    assert [b.name for b in found.branches] == ["block:f"]
    assert [(r.name, "positional" in r.reason) for r in found.refused] == [(":positions", True)]


class Beside(nn.Module):
    """Residual blocks beside each other, each of which has the value that all start from."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.blocks, self.turned = nn.ModuleList([small.Block(), small.Block()]), turned

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return first(x) + (second(x.flip(0)).flip(0) if self.turned else second(x))


class SumOfList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([small.Block(), small.Block()])

    def forward(self, x: Tensor) -> Tensor:
        return sum(block(x) for block in self.blocks)  # type: ignore[return-value]


class NormBeside(nn.Module):
    """The branch of MobileOne that is a normalisation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = small.linear(), nn.LayerNorm(small.WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x) + self.norm(x)


def test_a_branch_without_matrices_brings_no_sum_along() -> None:
    assert modules(NormBeside()) == [("f",), ("norm",)]


@pytest.mark.parametrize("model", [Beside(False), Beside(True), SumOfList()])
def test_of_two_blocks_beside_each_other_each_has_its_branch(model: nn.Module) -> None:
    assert modules(model) == [(f"blocks.{i}.norm", f"blocks.{i}.f") for i in range(2)]


def test_the_outer_of_two_branches_is_the_branch() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: int) -> None:
            super().__init__()
            self.body = nn.Sequential(*[small.Block() for _ in range(inner)], small.linear())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    assert [b.name for b in look(Outer(1)).branches] == [":body"]
    found = look(Outer(2))
    assert [b.name for b in found.branches] == ["body.0:f", "body.1:f"]
    assert "a long skip around 2" in found.refused[0].reason


@pytest.mark.parametrize("shortcut", [nn.Identity(), small.linear()])
def test_a_long_skip_around_blocks_with_weighed_or_projected_shortcuts(shortcut: nn.Module) -> None:
    class Weighed(small.Block):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.shortcut = small.linear(), copy.deepcopy(shortcut)

        def forward(self, x: Tensor) -> Tensor:
            return 0.7 * self.shortcut(x) + self.g(self.f(x).relu())

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(Weighed(), Weighed()), small.linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.body(x))

    found = look(Long())
    assert [b.name for b in found.branches] == ["body.0:f", "body.1:f"]
    assert "a long skip around 2" in found.refused[0].reason


def test_a_part_that_somebody_else_uses_is_no_part_of_the_branch() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = small.linear(), small.linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.f(x)
            return x + self.g(h), h

    assert modules(Leaky()) == [("g",)]


def test_a_module_that_also_returns_what_is_used_is_looked_into() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.scale = small.linear(), small.linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.f(x), self.scale(x)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.head = Two(), small.linear()

        def forward(self, x: Tensor) -> Tensor:
            y, scale = self.two(x)
            return self.head(x + y) * scale

    assert modules(Scaled()) == [("two.f",)]


def test_a_thousand_sums_one_after_the_other_take_no_recursion() -> None:
    assert len(look(nn.Sequential(*[small.Block() for _ in range(1000)])).branches) == 1000


NO_SUMS = {
    "a product": lambda x, y: (x[..., :3] + y[..., :3]) * y[..., 3:6],
    "a product of a stack": lambda x, y: torch.stack([x, y]).prod(0),
    "two activations": lambda x, y: torch.cat([x + y.relu(), y.tanh()], -1),
}


@pytest.mark.parametrize("use", NO_SUMS.values(), ids=NO_SUMS)
def test_what_becomes_of_a_branch_in_another_way_is_no_sum_with_it(use: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = small.linear()

        def forward(self, x: Tensor) -> Tensor:
            return use(x, self.f(x))

    assert look(Block()).branches == []


def test_what_another_branch_is_given_besides_is_no_shortcut() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = small.linear(), small.linear()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x + self.f(x * scale) + self.g(scale)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.block = small.linear(), Conditioned()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, self.scale(x))

    assert modules(Outer()) == [("block.f",)]


def test_a_layer_of_weights_that_its_block_is_given_is_refused() -> None:
    class Block(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return x + nn.functional.linear(x, weight)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.block = small.linear(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x, self.head.weight))

    found = look(Tied())
    assert found.branches == []
    assert "none of its modules is called by itself" in found.refused[0].reason
