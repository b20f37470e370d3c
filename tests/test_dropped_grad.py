"""None or zero: what the optimizer does to a branch in a step that dropped it."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import stochastic_depth as sd

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.mask = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.linear(x) * self.mask


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(4, 4), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()


def snapshot(model: Net, optimizer: torch.optim.Optimizer) -> list:
    parameters = list(model.block.parameters())
    return copy.deepcopy([parameters, [optimizer.state[p] for p in parameters]])


def train(kind: str, dropped_grad: str | None) -> tuple[list, list]:
    """The branch before and after a step that leaves it out; by a mask for None."""
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    if dropped_grad is not None:
        sd.apply(model, p=0.0, dropped_grad=dropped_grad, example_inputs=torch.ones(2, 4))
    step(model, optimizer)  # with the branch, so that the optimizer has a state
    before = snapshot(model, optimizer)
    if dropped_grad is None:
        model.block.mask = 0.0
    else:
        (branch,) = sd.branches(model)
        branch.p = 1.0
    step(model, optimizer)
    return before, snapshot(model, optimizer)


def same(a: list, b: list) -> bool:
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_none_leaves_weights_and_optimizer_state_alone(kind):
    before, after = train(kind, "none")
    assert same(before, after)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zero_does_what_a_mask_does(kind):
    before, after = train(kind, "zero")
    _, masked = train(kind, None)
    assert same(after, masked)
    assert not torch.equal(before[0][0], after[0][0])  # it coasts


class Joined(nn.Module):
    """Adds its branch in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.linear, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.linear(x.roll(1, -1))
        if self.way == "in place":
            x.add_(y)
        elif self.way == "in place, by another name":
            z = x
            z += y
            x = x + 2 * z
        elif self.way == "into a view":
            x.view(-1, 2).add_(y.view(-1, 2))
        elif self.way == "stack":
            return torch.stack([x, y]).sum(0)
        elif self.way == "addcmul":
            return torch.addcmul(x, y, torch.ones(4))
        elif self.way == "cat":
            return x + torch.cat([y, y])[: len(x)]
        return x


@pytest.mark.filterwarnings("ignore:samples are taken to be as many neighbouring rows")
@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize(
    "way",
    ["in place", "in place, by another name", "into a view", "stack", "addcmul", "cat"],
)
def test_zeros_come_however_the_branch_is_added(way: str, mode: str) -> None:
    torch.manual_seed(0)
    model, x = Joined(way), torch.randn(2, 4)
    given = {}
    for kind in ("none", "zero"):
        applied = copy.deepcopy(model)
        sd.apply(applied, p=1.0, mode=mode, dropped_grad=kind, example_inputs=x)
        out = applied(x)
        out.square().sum().backward()
        given[kind] = out.detach(), applied.stem.weight.grad
        grads = [p.grad for p in applied.linear.parameters()]
        assert all(g is None if kind == "none" else not g.any() for g in grads)
    assert same(given["none"], given["zero"])


@pytest.mark.parametrize("wrong", ["zeros", None, 0])
def test_an_unknown_choice_is_refused(wrong):
    with pytest.raises(ValueError, match=r"dropped_grad must be one of .*'none', 'zero'"):
        sd.apply(Net(), p=0.2, dropped_grad=wrong)


class Parallel(nn.Module):
    """Two branches read one norm, and another module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shift = nn.LayerNorm(4), nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, shift = self.norm(x), self.shift(torch.ones(4))
        return x + self.a(h + shift) + self.b(h) * shift


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("blocks", [None, "1"])
def test_what_only_dropped_branches_read_gets_zeros_too(mode: str, blocks: str | None) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Parallel(), nn.Linear(4, 4)), torch.randn(3, 4)
    sd.apply(model, p=0.5, mode=mode, dropped_grad="zero", blocks=blocks, example_inputs=x)
    branches = sd.branches(model)
    for rates in itertools.product([0.0, 1.0], repeat=len(branches)):
        for branch, p in zip(branches, rates, strict=True):
            branch.p = p
        model.zero_grad()
        model(x).square().sum().backward()
        read = blocks is None and rates != (1.0, 1.0)
        for name, p in model[1].named_parameters():
            assert p.grad is not None, (rates, name)
            if name.startswith("norm"):
                assert bool(p.grad.any()) is (read or rates == (0.0,))


def test_what_is_given_to_a_dropped_block_and_to_no_other_gets_zeros() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            self.layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.layer(x, self.encoder(x)))

    model, x = Decoder(), torch.randn(2, 3, 4)
    sd.apply(model, p=1.0, blocks="layer", dropped_grad="zero", example_inputs=x)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not model.encoder.weight.grad.any()


def test_parameters_that_a_functional_call_puts_in_place_get_zeros() -> None:
    model, x = Net(), torch.randn(3, 4)
    sd.apply(model, p=1.0, dropped_grad="zero", example_inputs=x)
    put = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, put, x).square().sum().backward()
    assert {name for name, p in put.items() if p.grad is None} == set()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch's own forward mode
def test_zeros_let_tangents_through() -> None:
    model, x, tangent = Net(), torch.randn(3, 4), torch.randn(3, 4)
    sd.apply(model, p=1.0, dropped_grad="zero", example_inputs=x)
    with forward_ad.dual_level():
        given = forward_ad.make_dual(x, tangent)
        ours, theirs = (forward_ad.unpack_dual(m(given)) for m in (model, model.stem))
        torch.testing.assert_close(ours.primal, theirs.primal)
        torch.testing.assert_close(ours.tangent, theirs.tangent)
