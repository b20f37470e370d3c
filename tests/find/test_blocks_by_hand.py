"""Which residual branches are found in hand-written blocks, and what is left when they drop."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth as TorchvisionDepth
from torchvision.ops import stochastic_depth as torchvision_depth

import stochastic_depth as sd

KEPT = 1e-30  # no branch is ever dropped at this rate, but everything runs as if it could be


class Base(nn.Module):
    """A block on vectors of 8; ``dropped`` is what it computes without its branches."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)
        self.g = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.start = nn.Linear(8, 8)
        self.end = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.3))
        self.register_buffer("offset", torch.arange(8.0))
        self.relu = nn.ReLU(inplace=True)

    def dropped(self, x: Tensor) -> Tensor:
        return x


class ShortcutFirst(Base):
    def forward(self, x):
        return x + self.f(x)


class BranchFirst(Base):
    def forward(self, x):
        return self.f(x) + x


class ReluAfterTheSum(Base):
    def forward(self, x):
        return self.relu(x + self.f(x))

    def dropped(self, x):
        return x.relu()


class FunctionalReluAfterTheSum(Base):
    def forward(self, x):
        return F.relu(x + self.f(x), inplace=True)

    def dropped(self, x):
        return x.relu()


class ShortcutUsedAgain(Base):
    def forward(self, x):
        x = self.start(x)
        return (x + self.f(x)).relu_() * x

    def dropped(self, x):
        x = self.start(x)
        return x.relu() * x


class AddedIntoTheBranch(Base):
    def forward(self, x):
        out = self.f(x)
        out += x
        return out


class AddedIntoTheShortcut(Base):
    def forward(self, x):
        x = self.start(x)
        x += self.f(F.relu(x))  # a sum into what the layer needs for its gradient would fail
        return x

    def dropped(self, x):
        return self.start(x)


class AddFunction(Base):
    def forward(self, x):
        return torch.add(x, self.f(x))


class AddMethod(Base):
    def forward(self, x):
        return x.add(self.f(x))


class AddMethodInPlace(Base):
    def forward(self, x):
        h = self.start(x)
        return h.add_(self.f(F.relu(h)))

    def dropped(self, x):
        return self.start(x)


class Subtraction(Base):
    def forward(self, x):
        return x - self.f(x)


class SubtractionInPlace(Base):
    def forward(self, x):
        x = x.clone()
        x -= self.f(F.relu(x))
        return x


class PreActivation(Base):
    def forward(self, x):
        return x + self.f(F.relu(self.norm(x)))


class Scaled(Base):
    def forward(self, x):
        return x + 0.5 * self.f(x)


class ParametersAndBuffers(Base):
    def forward(self, x):
        return x + self.scale * self.f(x + self.offset)


class FunctionsOnly(Base):
    def forward(self, x):
        return x + F.relu(F.linear(x, self.f.weight, self.scale))


class Reshaping(Base):
    def forward(self, x):
        batch, width = x.shape
        return x + self.f(x.view(batch, 1, width)).view(batch, width)


class Expanding(Base):
    def forward(self, x):
        return x + self.f(x + self.scale.expand(x.size(0), -1))


class Sequence(Base):
    def forward(self, x):
        x = x + self.f(self.norm(x))
        return x + self.g(x)


class Parallel(Base):
    def forward(self, x):
        n = self.norm(x)
        return x + self.f(n) + self.g(n)


class Projection(Base):
    """Something follows: two ways from a model's input to its output are no shortcut and branch."""

    def forward(self, x):
        return self.end(self.start(x) + self.g(F.relu(self.f(x))))

    def dropped(self, x):
        return self.end(self.start(x))


class PreActivationProjection(Base):
    def forward(self, x):
        h = F.relu(self.norm(x))
        return self.end(self.g(F.relu(self.f(h))) + self.start(h))

    def dropped(self, x):
        return self.end(self.start(F.relu(self.norm(x))))


class SharedLayer(Base):
    def forward(self, x):
        x = x + self.f(x)
        return x + self.f(x)


class BranchInABranch(Base):
    def forward(self, x):
        h = self.f(x)
        return x + (h + self.g(h))


class InPlaceFirst(Base):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))

    def forward(self, x):
        x = self.start(x)
        return x + self.seq(x)

    def dropped(self, x):
        return self.start(x).relu()


class TupleOutput(Base):
    def forward(self, x):
        return (x + self.f(x), None)[0]


class ManyReturned(Base):
    def forward(self, x):
        y = x + self.f(x)
        return {"out": y, "before": x}["out"]


class AsksForTheType(Base):
    def forward(self, x):
        if not isinstance(x, Tensor):
            raise TypeError("not a tensor")
        return x + self.f(x)


class Asserts(Base):
    def forward(self, x):
        torch._assert(x.shape[-1] == 8, "eight wide")
        return x + self.f(x)


class UnusedWeights(Base):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        n = self.norm(x).unsqueeze(1)
        out, _ = self.attention(n, n, n)
        return x + out.squeeze(1)


class ExistingModule(Base):
    def __init__(self):
        super().__init__()
        self.drop = TorchvisionDepth(0.7, "row")

    def forward(self, x):
        return x + self.drop(self.f(x))


class TwoOfAWeighedShortcut(Base):
    def forward(self, x):
        y = 2 * x + self.g(x).relu()
        return y + self.f(x)

    def dropped(self, x):
        return 2 * x


class ShiftedBeside(Base):
    def forward(self, x):
        y = self.scale * x + self.f(x)
        return y + x.roll(1, -1)

    def dropped(self, x):
        return self.scale * x + x.roll(1, -1)


class Cascade(Base):
    """What the branch works on is added, too."""

    def forward(self, x):
        h = self.start(x)
        y = x + self.f(h)
        return y + h

    def dropped(self, x):
        return x + self.start(x)


class JoinedWithItsInput(Base):
    def forward(self, x):
        y = self.start(x)
        return torch.cat([x + self.f(y), y], -1)[:, 4:12]

    def dropped(self, x):
        return torch.cat([x, self.start(x)], -1)[:, 4:12]


class Coupled(Base):
    """NICE."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.f(F.pad(a, (4, 0)))[:, 4:], a], -1)

    def dropped(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([b, a], -1)


class Gated(Base):
    def forward(self, x):
        return torch.addcmul(x, self.start(x).sigmoid(), self.f(x))

    def dropped(self, x):
        return torch.addcmul(x, self.start(x).sigmoid(), torch.zeros_like(x))


class Modulated(Base):
    """adaLN."""

    def forward(self, x):
        a, b = self.start(x).chunk(2, -1)
        x = x + a.repeat(1, 2) * self.f(x)
        return x + b.repeat(1, 2) * self.g(x)


class ComplexNumbers(Base):
    def forward(self, x):
        z, y = (torch.view_as_complex(t.unflatten(-1, (4, 2))) for t in (x, self.f(x)))
        return torch.view_as_real(z + y).flatten(1)


class ThreeTerms(Base):
    def forward(self, x):
        return self.f(x) + self.offset[: x.shape[1]] + x


F_ONLY = [("identity", ("f",))]

FOUND: list[tuple[type[Base], list[tuple[str, tuple[str, ...]]]]] = [
    (ShortcutFirst, F_ONLY),
    (BranchFirst, F_ONLY),
    (ReluAfterTheSum, F_ONLY),
    (FunctionalReluAfterTheSum, F_ONLY),
    (ShortcutUsedAgain, F_ONLY),
    (AddedIntoTheBranch, F_ONLY),
    (AddedIntoTheShortcut, F_ONLY),
    (AddFunction, F_ONLY),
    (AddMethod, F_ONLY),
    (AddMethodInPlace, F_ONLY),
    (Subtraction, F_ONLY),
    (SubtractionInPlace, F_ONLY),
    (PreActivation, [("identity", ("norm", "f"))]),
    (Scaled, F_ONLY),
    (ParametersAndBuffers, F_ONLY),
    (FunctionsOnly, [("identity", ())]),
    (Reshaping, F_ONLY),
    (Expanding, F_ONLY),
    (Sequence, [("identity", ("norm", "f")), ("identity", ("g",))]),
    (Parallel, [("identity", ("f",)), ("identity", ("g",))]),
    (Projection, [("projection", ("f", "g"))]),
    (PreActivationProjection, [("projection", ("f", "g"))]),
    (SharedLayer, [("identity", ("f",)), ("identity", ("f",))]),
    (BranchInABranch, [("identity", ("f", "g"))]),
    (InPlaceFirst, [("identity", ("seq.1",))]),
    (TupleOutput, F_ONLY),
    (ManyReturned, F_ONLY),
    (AsksForTheType, F_ONLY),
    (Asserts, F_ONLY),
    (UnusedWeights, [("identity", ("norm", "attention"))]),
    (ExistingModule, [("identity", ("f", "drop"))]),
    (TwoOfAWeighedShortcut, [("projection", ("g",)), ("projection", ("f",))]),
    (ShiftedBeside, [("projection", ("f",))]),
    (Cascade, F_ONLY),
    (JoinedWithItsInput, F_ONLY),
    (Coupled, [("projection", ("f",))]),
    (Gated, F_ONLY),
    (Modulated, [("identity", ("f",)), ("identity", ("g",))]),
    (ComplexNumbers, [("projection", ("f",))]),
    (ThreeTerms, F_ONLY),
]
BLOCKS = [block for block, _ in FOUND]


def applied(model: nn.Module, p: float = 0.2, **options: Any) -> Any:
    """``sd.apply`` with a batch as the example."""
    x = batch().detach().to(next(model.parameters()).dtype)
    return sd.apply(model, p, **{"example_inputs": x, **options})


def make(block: type[Base]) -> Base:
    torch.manual_seed(0)
    return block()


def batch(rows: int = 4) -> Tensor:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_()


def undropped(block: Base) -> Base:
    """A plain copy whose own stochastic depth is off."""
    plain = copy.deepcopy(block)
    if isinstance(plain, ExistingModule):
        plain.drop.p = 0.0
    return plain


def gradients(block: Base, x: Tensor) -> dict[str, Tensor | None]:
    return {"x": x.grad} | {name: p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize(("block", "branches"), FOUND)
def test_branches_are_found(block: type[Base], branches: list[tuple[str, tuple[str, ...]]]) -> None:
    model = applied(make(block))
    assert [(branch.kind, branch.modules) for branch in sd.branches(model)] == branches


@pytest.mark.parametrize("block", BLOCKS)
def test_at_p_1_the_shortcut_alone_is_left(block: type[Base]) -> None:
    model, x = make(block), batch()
    expected = model.dropped(x.detach().clone())
    applied(model, p=1.0, schedule="uniform")
    for shared in (x, x.detach().clone()):  # also where nothing needs a gradient
        before = shared.detach().clone()
        assert torch.equal(model(shared), expected)
        assert torch.equal(shared, before), "the caller's tensor was overwritten"


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_at_p_1_are_those_of_the_shortcut(block: type[Base]) -> None:
    model, x, y = make(block), batch(), batch()
    plain = copy.deepcopy(model)
    plain.dropped(y).square().sum().backward()
    applied(model, p=1.0, schedule="uniform")
    model(x).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    expected = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None, name
        else:
            assert torch.equal(p.grad, expected[name]), name


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("p", [0.0, KEPT])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_kept_is_bit_identical(block: type[Base], p: float, mode: str) -> None:
    model, x, y = make(block), batch(), batch()
    plain = undropped(model)
    applied(model, p=p, schedule="uniform", mode=mode, scale="none")
    out, expected = model(x), plain(y)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    ours, theirs = gradients(model, x), gradients(plain, y)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert ours[name] is gradient is None or torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("block", [b for b, branches in FOUND if len(branches) == 1])
def test_row_mode_mixes_the_rows_of_the_dropped_and_the_whole_block(block: type[Base]) -> None:
    model, x = make(block), batch(16).detach()
    whole, shortcut = undropped(model)(x.clone()), model.dropped(x.clone())
    applied(model, p=0.5, schedule="uniform", mode="row", scale="none", seed=0)
    (branch,) = sd.branches(model)
    out = model(x.clone())
    kept = (out - whole).abs().amax(1) < 1e-5  # another number of rows, another order of sums
    dropped = (out - shortcut).abs().amax(1) == 0
    assert torch.equal(kept, ~dropped)
    assert (branch.decided, branch.dropped) == (16, int(dropped.sum()))
    assert 0 < branch.dropped < 16


# After a ReLU what the branch weighs is not to be seen from outside.
RELU_AFTER = {ReluAfterTheSum, FunctionalReluAfterTheSum, ShortcutUsedAgain}
LINEAR = [b for b, branches in FOUND if len(branches) == 1 and b not in RELU_AFTER]


@pytest.mark.parametrize("scale", ["train", "eval"])
@pytest.mark.parametrize("block", LINEAR)
def test_the_weight_of_the_branch_is_that_of_the_scaling(block: type[Base], scale: str) -> None:
    model = make(block).double()
    x = batch().detach().double()
    whole, shortcut = undropped(model)(x.clone()), model.dropped(x.clone())
    applied(model, p=0.25, schedule="uniform", scale=scale, seed=0)
    if scale == "eval":
        weight, out = 0.75, model.eval()(x.clone())
    else:
        weight, out = 1 / 0.75, when_kept(model, x)
    torch.testing.assert_close(out, shortcut + weight * (whole - shortcut), rtol=0, atol=1e-12)


def when_kept(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the first training call in which the only branch is not dropped."""
    (branch,) = sd.branches(model)
    for _ in range(100):
        dropped = branch.dropped
        out: Tensor = model(x.clone())
        if branch.dropped == dropped:
            return out
    raise AssertionError("dropped 100 times in a row")


class Routed(Base):
    """Mixture of depths."""

    def forward(self, x):
        weight, index = self.start(x).sum(1).topk(2)
        return x.index_add(0, index, weight.sigmoid()[:, None] * self.f(x[index]))


def test_positions_that_a_router_chooses_are_no_part_of_the_branch() -> None:
    model, x = applied(make(Routed), p=1.0, schedule="uniform"), batch()
    assert [branch.modules for branch in sd.branches(model)] == [("f",)]
    assert torch.equal(model(x), x)
    sd.branches(model)[0].p = 0.0
    assert torch.equal(model(x), make(Routed)(x))


class ExistingFunction(Base):
    def forward(self, x):
        return x + torchvision_depth(self.f(x), 1.0, "row", self.training)


def test_a_branch_that_a_function_drops_is_left_to_it_with_the_reason() -> None:
    with pytest.raises(ValueError, match="the model drops it by itself, in stochastic_depth"):
        applied(make(ExistingFunction))


def test_branches_are_named_after_the_block_and_their_largest_child() -> None:
    model = nn.Sequential(OrderedDict(a=make(Sequence), b=nn.Sequential(make(SharedLayer))))
    applied(model)
    assert [branch.name for branch in sd.branches(model)] == ["a:f", "a:g", "b.0:f", "b.0:f#2"]
    assert sd.branches(applied(make(FunctionsOnly)))[0].name == ":branch"


def test_a_branch_follows_its_parameters_and_buffers_after_apply() -> None:
    model, x = make(ParametersAndBuffers), batch()
    applied(model, p=KEPT)
    model(x)
    with torch.no_grad():
        model.scale.fill_(2.0)
        model.offset.fill_(-1.0)
    model.f = nn.Linear(8, 8)
    assert torch.equal(model(x), x + 2.0 * model.f(x - 1.0))


# --- what is around and inside of branches


class Stack(Base):
    """A skip around two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(make(ShortcutFirst), make(ShortcutFirst))

    def forward(self, x):
        return x + self.blocks(x)


class OneBlockInside(Base):
    """A branch of which one part has a branch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), make(ShortcutFirst))

    def forward(self, x):
        return x + self.inner(x)


def test_a_long_skip_gives_way_to_the_branches_that_it_spans() -> None:
    model = applied(Stack(), p=1.0, schedule="uniform")
    assert [branch.name for branch in sd.branches(model)] == ["blocks.0:f", "blocks.1:f"]
    refused = dict(sd.summary(model).refused)
    assert "long skip around 2 residual branches" in refused[":blocks"]
    x = batch()
    assert torch.equal(model(x), x + x)


class StackThatItsModelDrops(Stack):
    """csatv2 of timm: a small transformer weighs what a branch computes, and is a part of it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_path = TorchvisionDepth(rate, "row") if rate else nn.Identity()

    def forward(self, x):
        return x + self.drop_path(self.blocks(x))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_branch_that_its_model_drops_is_no_long_skip(rate: float) -> None:
    model = applied(StackThatItsModelDrops(rate), p=1.0, schedule="uniform")
    assert [branch.name for branch in sd.branches(model)] == [":blocks"]
    x = batch()
    assert torch.equal(model(x), x)
    assert sd.verify(model, x).passed


def test_a_branch_inside_a_branch_is_a_part_of_it() -> None:
    model = applied(OneBlockInside(), p=1.0, schedule="uniform")
    assert [branch.name for branch in sd.branches(model)] == [":inner"]
    x = batch()
    assert torch.equal(model(x), x)


def test_a_module_that_is_used_twice_has_its_branches_once_and_decides_each_time() -> None:
    block = make(ShortcutFirst)
    model = applied(nn.Sequential(block, nn.Tanh(), block), p=0.5, schedule="uniform")
    (branch,) = sd.branches(model)
    assert branch.name == "0:f"
    model(batch())
    assert branch.decided == 2


def test_our_own_wrapper_is_a_branch_and_not_looked_into() -> None:
    model = nn.Sequential(sd.StochasticDepth(make(ShortcutFirst), 0.3), make(ShortcutFirst))
    applied(model)
    assert [branch.name for branch in sd.branches(model)] == ["0", "1:f"]


# --- what has no residual branch


class NoShortcut(Base):
    def forward(self, x):
        return self.g(self.f(x))


class Concatenation(Base):
    def forward(self, x):
        return torch.cat([x, self.f(x)], 1)


class Gate(Base):
    def forward(self, x):
        gate = self.g(x).sigmoid()
        return gate * self.f(x) + (1 - gate) * x


class PositionParameter(Base):
    def forward(self, x):
        return x + self.scale


class PositionTable(Base):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, x):
        return self.f(x) + self.table(self.offset.long())[0]


class TwoBranchesOnly(Base):
    def forward(self, x):
        return self.f(x) + self.g(x)


class ShortcutSubtracted(Base):
    def forward(self, x):
        return self.f(x) - x


class SumOfNumbers(Base):
    def forward(self, x):
        return self.f(x) + x.shape[0]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x, y):
        return x + self.f(y)


@pytest.mark.parametrize(
    "block",
    [
        NoShortcut,
        Concatenation,
        Gate,
        PositionParameter,
        PositionTable,
        TwoBranchesOnly,
        ShortcutSubtracted,
        SumOfNumbers,
        TwoInputs,
    ],
)
def test_what_is_no_residual_sum_gives_no_branch(block: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="no residual branch found") as error:
        applied(block(), example_inputs=tuple(torch.randn(1 + (block is TwoInputs), 4, 8)))
    assert "Skipped" not in str(error.value)


# --- what is refused, and why


class DependsOnAValue(Base):
    def forward(self, x):
        return x + self.f(x) if x.sum() > 0 else x


class LoopsOverAValue(Base):
    def forward(self, x):
        return torch.stack([row + self.f(row) for row in x])


class DrawsWhatItDoes(Base):
    def forward(self, x):
        return x + self.f(x) if torch.rand(()) < 0.5 else x


class ComputesWithoutGradient(Base):
    def forward(self, x):
        with torch.no_grad():
            n = self.norm(x)
        return x + self.f(n)


class ComputesUnderAutocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            n = self.f(x)
        return x + n


class CountsItsCalls(Base):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.f(x)


class MakesAConstant(Base):
    def forward(self, x):
        return x + self.f(x) * torch.ones(8)


class KeepsAnIntermediateValue(Base):
    def forward(self, x):
        self.last = self.f(x)
        return x + self.last


class ReturnsTheBranchToo(Base):
    def forward(self, x):
        y = self.f(x)
        return x + y, y


class ProjectsAndReturnsAPartOfTheBranchToo(Base):
    """timm's DPN: what the last layer reads also goes into a concatenation."""

    def forward(self, x):
        y = self.norm(self.f(x))
        return self.start(x) + self.g(y), y


class OverwritesAPart(Base):
    def forward(self, x):
        h = self.start(x)
        h[:, :4].relu_()
        return h + self.f(h)


class NotInPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forward_ = torch.nn.functional.relu


REFUSED = [
    (ReturnsTheBranchToo, "also used outside"),
    (KeepsAnIntermediateValue, "kept in an attribute"),
]


@pytest.mark.parametrize(("block", "reason"), REFUSED)
def test_what_cannot_be_dropped_is_refused_with_the_reason(block: type[Base], reason: str) -> None:
    model = nn.Sequential(make(ShortcutFirst), make(block))
    state = copy.deepcopy(model[1].__dict__)
    random = torch.get_rng_state()
    applied(model)
    assert [branch.name for branch in sd.branches(model)] == ["0:f"]
    ((name, why),) = sd.summary(model).refused
    assert name.startswith("1")
    assert reason in why
    assert model[1].__dict__.keys() == state.keys(), "watching left something behind"
    assert torch.equal(torch.get_rng_state(), random)

    with pytest.raises(ValueError, match=reason):  # the error of apply names it too
        applied(make(block))


def test_of_a_branch_whose_start_is_also_returned_the_rest_is_dropped() -> None:
    model, x = nn.Sequential(make(ProjectsAndReturnsAPartOfTheBranchToo), First()), batch().detach()
    assert names(applied(model, p=1.0)) == ["0:g"]
    block = model[0]
    torch.testing.assert_close(model(x), model[1].f(block.start(x)) * block.norm(block.f(x)))


class First(Base):
    def forward(self, both):
        return self.f(both[0]) * both[1]


def test_a_forward_that_decides_by_itself_whether_a_branch_runs_is_told() -> None:
    with pytest.warns(UserWarning, match="stochastic depth of its own"):
        model = applied(make(DrawsWhatItDoes))
    ((name, why),) = sd.summary(model).refused
    assert name == ""
    assert "tosses a coin of its own (layerdrop, say), in DrawsWhatItDoes.forward" in why


ANYTHING = [
    LoopsOverAValue,
    ComputesWithoutGradient,
    ComputesUnderAutocast,
    CountsItsCalls,
    MakesAConstant,
    OverwritesAPart,
]


@pytest.mark.parametrize("block", ANYTHING)
def test_whatever_else_a_forward_does_its_branch_is_dropped(block: type[Base]) -> None:
    model, x = make(block), batch().detach()
    expected = model(x.clone())
    assert names(applied(model, p=KEPT, scale="none")) == [":f"]
    assert torch.equal(model(x.clone()), expected)
    ran: list[object] = []
    model.f.register_forward_hook(lambda *_: ran.append(1))
    sd.branches(model)[0].p = 1.0
    model(x.clone())
    assert ran == []


def test_a_branch_behind_a_condition_on_a_value_is_dropped_where_it_runs() -> None:
    model, x = make(DependsOnAValue), torch.ones(4, 8)
    assert names(applied(model, p=1.0, example_inputs=x)) == [":f"]
    assert torch.equal(model(x), x)
    with pytest.warns(UserWarning, match="f was not called in a call of its block"):
        assert torch.equal(model(-x), -x)


def test_a_block_whose_forward_was_replaced_by_someone_else_keeps_it() -> None:
    model = nn.Sequential(make(ShortcutFirst), make(ShortcutFirst))
    theirs: Callable[[Tensor], Tensor] = lambda x: 2 * x  # noqa: E731
    model[0].forward = theirs
    applied(model, p=1.0, schedule="uniform")
    assert [branch.name for branch in sd.branches(model)] == ["1:f"]
    x = batch()
    assert torch.equal(model(x), 2 * x)
    sd.remove(model)
    assert model[0].forward is theirs


class Overwriting(nn.Module):
    """Overwrites its input."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return self.f(x.relu_())


class BranchOverwritesItsShortcut(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Overwriting()

    def forward(self, x):
        x = x.clone()
        return x + self.inner(x)


def test_a_branch_that_overwrites_its_shortcut_starts_after_that() -> None:
    x = batch()
    model = applied(make(BranchOverwritesItsShortcut), p=1.0, schedule="uniform")
    assert [branch.modules for branch in sd.branches(model)] == [("inner.f",)]
    assert torch.equal(model(x), x.relu())


def test_hooks_on_a_layer_in_which_a_branch_starts_fire_also_where_it_is_dropped() -> None:
    model = make(InPlaceFirst)
    fired: list[int] = []
    model.seq.register_forward_hook(lambda *_: fired.append(1))
    applied(model, p=1.0, schedule="uniform")
    model.seq.register_forward_hook(lambda *_: fired.append(2))
    fired.clear()
    model(batch())
    assert fired == [1, 2]


# --- arguments


class Keywords(Base):
    def forward(self, x, *, mask, extra=None):
        y = self.f(x) * mask
        if extra is not None:
            y = y + extra
        return x + y


class OptionalInput(Base):
    def forward(self, x, memory=None):
        x = x + self.f(x)
        if memory is not None:
            x = x + self.g(x * memory)
        return x


class Flag(Base):
    def forward(self, x, residual=False):
        return x + self.f(x) if residual else self.f(x)


def names(model: nn.Module) -> list[str]:
    return [branch.name for branch in sd.branches(model)]


class AsksForTraining(Base):
    def forward(self, x):
        return x + F.dropout(self.f(x), 0.5, self.training)


def test_a_block_that_asks_whether_it_trains_is_told_so_in_either_order() -> None:
    model, x = applied(make(AsksForTraining), p=0.25, schedule="uniform", scale="eval"), batch()
    for training in (True, False, True, False):
        model.train(training)
        out = (model(x) - x) / model.f(x)
        if not training:
            torch.testing.assert_close(out, torch.full_like(out, 0.75))


def test_keyword_only_arguments_are_passed_on() -> None:
    model, x, mask = make(Keywords), batch(), torch.rand(4, 8)
    expected, more = model(x, mask=mask), model(x, mask=mask, extra=mask)
    applied(model, p=KEPT, example_inputs={"x": x.detach(), "mask": mask})
    assert torch.equal(model(x, mask=mask), expected)
    assert torch.equal(model(x, mask=mask, extra=mask), more)
    assert torch.equal(model.eval()(x, mask=mask, extra=mask), more)
    sd.branches(model)[0].p = 0.0
    assert torch.equal(model.train()(x, mask=mask, extra=mask), more)
    sd.branches(model)[0].p = 1.0
    assert torch.equal(model(x, mask=mask, extra=mask), x)


@pytest.mark.parametrize(
    "example",
    [(batch(), batch()), {"x": batch(), "memory": batch()}, [batch(), batch()]],
    ids=["tuple", "dict", "list"],
)
def test_branches_that_need_an_optional_argument_are_found_with_example_inputs(
    example: Any,
) -> None:
    assert names(applied(make(OptionalInput))) == [":f"]
    model = applied(make(OptionalInput), p=1.0, schedule="uniform", example_inputs=example)
    assert names(model) == [":f", ":g"]
    x = batch()
    assert torch.equal(model(x, x), x)
    assert torch.equal(model(x), x)


def test_branches_that_only_a_new_form_of_call_has_are_dropped_too() -> None:
    model, x = applied(make(OptionalInput), p=1.0, schedule="uniform"), batch()
    assert torch.equal(model(x, x), x)
    assert {":f", ":g"} == set(names(model))


def test_a_call_with_branches_that_were_not_asked_for_keeps_them_and_says_so() -> None:
    model, x = applied(make(OptionalInput), p=1.0, schedule="uniform", include="*"), batch()
    with pytest.warns(UserWarning, match=r":g.* example_inputs"):
        out = model(x, x)
    assert torch.equal(out, x + model.g(x * x))


def test_a_tensor_is_enough_as_example_inputs_and_flags_are_seen() -> None:
    assert names(applied(make(ShortcutFirst), example_inputs=batch())) == [":f"]
    assert names(applied(make(Flag), example_inputs=(batch(), True))) == [":f"]
    with pytest.raises(ValueError, match="no residual branch"):
        applied(make(Flag))


class AlwaysNoisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


def test_running_the_example_changes_nothing() -> None:
    model = nn.Sequential(make(ShortcutFirst), nn.BatchNorm1d(8), AlwaysNoisy())
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    applied(model, example_inputs=batch())
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.grad is None for p in model.parameters())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == [0] * len(list(model.modules()))


class SecondInput(Base):
    def forward(self, x, other):
        return x + self.f(x) * other


@pytest.mark.parametrize("other", [torch.rand(16, 8), torch.rand(1, 8), torch.rand(8)])
def test_row_mode_is_right_whether_or_not_a_further_input_has_the_samples(other: Tensor) -> None:
    model, x = make(SecondInput), batch(16).detach()
    whole = model(x, other)
    applied(
        model,
        p=0.5,
        schedule="uniform",
        mode="row",
        scale="none",
        seed=0,
        example_inputs=(x, other),
    )
    out = model(x, other)
    dropped = (out == x).all(1)
    torch.testing.assert_close(out[~dropped], whole[~dropped])
    assert 0 < int(dropped.sum()) < 16


# --- shapes of blocks that zoos have


class SliceSum(nn.Module):
    """RexNet: the shortcut has fewer channels than the branch."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.conv, self.order = nn.Conv2d(3, 5, 1), order

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        first = out[:, 0:3] + x if self.order else x + out[:, :3]
        return torch.cat([first, out[:, 3:]], dim=1)


@pytest.mark.parametrize("order", [0, 1])
def test_a_sum_with_the_first_channels_is_a_sum_with_a_padded_shortcut(order: int) -> None:
    x = torch.randn(2, 3, 4, 4)
    model = applied(SliceSum(order), p=1.0, example_inputs=x)
    assert torch.equal(model(x), F.pad(x, (0, 0, 0, 0, 0, 2)))
    assert sd.verify(model, x).passed


class ShortcutToTheDevice(Base):
    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        return out + x.to(out.device)


def test_a_shortcut_that_is_moved_to_the_branch_s_device_is_one() -> None:
    x = batch()
    model = applied(make(ShortcutToTheDevice), p=1.0, example_inputs=x)
    assert torch.equal(model(x), x)


IMAGES = torch.randn(2, 4, 6, 6)


class DepthwiseShortcut(nn.Module):
    """GhostNet: the projection is a depthwise and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.Conv2d(4, 6, 1))
        self.branch = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class ParallelDepthwise(nn.Module):
    """LCNet before its kernels are folded into one: nobody's shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, k, 1, k // 2, groups=4) for k in (5, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


def test_depthwise_filters_count_less_than_matrices() -> None:
    (branch,) = sd.branches(
        applied(nn.Sequential(DepthwiseShortcut(), nn.Conv2d(6, 2, 1)), example_inputs=IMAGES)
    )
    assert (branch.kind, branch.modules) == ("projection", ("0.branch",))
    with pytest.raises(ValueError, match="no residual branch"):
        applied(ParallelDepthwise(), example_inputs=IMAGES)


class Gain(nn.Conv2d):
    """NFNet's convolution has a gain of four dimensions beside its weight."""

    def __init__(self, width: int) -> None:
        super().__init__(4, width, 1)
        self.gain = nn.Parameter(torch.ones(width, 1, 1, 1))


class GainShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.f, self.g = Gain(4), Gain(4), Gain(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.f(x)) + self.shortcut(x)


def test_a_gain_for_each_channel_is_no_weight_matrix() -> None:
    (branch,) = sd.branches(
        applied(nn.Sequential(GainShortcut(), nn.Conv2d(4, 2, 1)), example_inputs=IMAGES)
    )
    assert branch.kind == "projection"


def test_mvit_s_attention_says_what_size_it_leaves() -> None:
    model = timm.create_model("mvitv2_tiny", img_size=64, num_classes=2)
    applied(model, example_inputs=torch.randn(2, 3, 64, 64))
    assert len(sd.branches(model)) == 2 * 10


SPELLINGS: dict[str, tuple[float, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "alpha": (0.5, lambda x, f, g: torch.add(x, f, alpha=0.5)),
    "minus alpha": (-0.5, lambda x, f, g: torch.sub(x, f, alpha=0.5)),
    "method": (2.0, lambda x, f, g: x.add(f, alpha=2)),
    "keywords": (1.0, lambda x, f, g: torch.add(input=x, other=f)),
    "stack": (1.0, lambda x, f, g: torch.stack([x, f]).sum(0)),
    "stack the other way": (1.0, lambda x, f, g: torch.sum(torch.stack((f, x), dim=0), dim=0)),
    "addcmul": (1.0, lambda x, f, g: torch.addcmul(x, g, f)),
    "addcmul with a value": (0.5, lambda x, f, g: torch.addcmul(x, f, g, value=0.5)),
}


class Spelled(nn.Module):
    def __init__(self, sum_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.gate, self.sum_of = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), sum_of

    def forward(self, x: Tensor) -> Tensor:
        return self.sum_of(x, self.f(x), self.gate)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_sum_is_found_however_it_is_written(name: str) -> None:
    factor, sum_of = SPELLINGS[name]
    model, x = nn.Sequential(Spelled(sum_of), Spelled(sum_of)).double(), batch().double()
    plain = copy.deepcopy(model)
    applied(model, None, schedule=[0.5, 1.0], example_inputs=x.detach())
    kept = x + 2 * factor * plain[0].f(x)
    torch.testing.assert_close(when_any_kept(model, x), kept)
    assert sd.verify(model, x).passed
    applied(model, p=KEPT, include="0:*", example_inputs=x.detach())
    torch.testing.assert_close(model(x), plain(x))


def when_any_kept(model: nn.Module, x: Tensor) -> Tensor:
    """The output of the first training call in which the first branch is kept."""
    first = sd.branches(model)[0]
    while True:
        before = first.dropped
        out: Tensor = model(x)
        if first.dropped == before:
            return out


def test_scaled_sums_with_other_factors_live_in_one_block() -> None:
    class Two(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.add(x, self.f(x), alpha=0.5)
            return torch.add(x, self.g(x), alpha=0.25)

    model, x = make(Two), batch()
    expected = model(x)
    applied(model, p=KEPT, include=":f")
    torch.testing.assert_close(model(x), expected)
    assert not torch.equal(applied(model, p=1.0, include=":g")(x), expected)


class Rearranging(nn.Module):
    """The shortcut puts two values together; the branch is computed from both."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.f, self.gate = nn.Linear(8, 8), gate

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.tanh(), x.sin()
        both = torch.cat((a.sigmoid() * b, b), 1) if self.gate else torch.cat((a, b), 1)
        return both + self.f(torch.cat((b, a), 1))


def test_a_shortcut_may_rearrange_what_the_branch_starts_from() -> None:
    model, x = Rearranging(gate=False), torch.randn(3, 4)
    assert [b.kind for b in sd.branches(applied(model, p=1.0, example_inputs=x))] == ["projection"]
    assert torch.equal(model(x), torch.cat((x.tanh(), x.sin()), 1))
    assert sd.verify(model, x).passed


def test_a_shortcut_that_mixes_values_is_none() -> None:
    with pytest.raises(ValueError, match="no residual branch"):
        applied(Rearranging(gate=True), example_inputs=torch.randn(3, 4))


class Magnitude(nn.Module):
    """DoRA's correction, which reads what the layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.magnitude = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        scale = self.magnitude / (base + self.up.weight @ self.down.weight).norm(dim=1)
        return (scale - 1) * y + scale * self.up(self.down(x))


class Corrected(nn.Module):
    """DoRA: a layer, and a correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.correct = Magnitude()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.correct(x, y, self.base.weight)

    def layer(self, x: Tensor) -> Tensor:
        return self.base(x)


class CorrectedInRows(Corrected):
    """The same where the layer works on rows, as quantized ones do."""

    def layer(self, x: Tensor) -> Tensor:
        return self.base(x.reshape(-1, 8)).reshape(x.shape)


class Adapted(nn.Module):
    """LoRA: a correction beside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class WithCorrections(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.f, self.g = layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(torch.tanh(self.f(x)))


@pytest.mark.parametrize("layer", [Corrected, CorrectedInRows, Adapted])
def test_corrections_of_layers_are_no_blocks(layer: type[nn.Module]) -> None:
    model = nn.Sequential(WithCorrections(layer), WithCorrections(layer))
    sd.apply(model, 0.5, example_inputs=torch.randn(3, 8))
    assert [branch.name for branch in sd.branches(model)] == ["0:f", "1:f"]
