"""Taking rows out of a batch and putting them back, in the layout of the tensor."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_depth as sd
from stochastic_depth.drop.decide import choose_samples
from stochastic_depth.drop.force import forced
from stochastic_depth.drop.rows import add_rows, put_rows, split_rows, take_rows

LAYOUTS = {
    "rows first": lambda: torch.randn(5, 3, 4, 6),
    "channels last": lambda: torch.randn(5, 3, 4, 6).to(memory_format=torch.channels_last),
    "channels last 3d": lambda: torch.randn(5, 3, 4, 2, 6).to(memory_format=torch.channels_last_3d),
    "transposed tokens": lambda: torch.randn(7, 5, 8).transpose(0, 1),
}


@st.composite
def permuted(draw: st.DrawFn) -> tuple[Tensor, int, Tensor]:
    """A tensor in any dense layout, the dimension of its rows, and some of these."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    x = torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64).reshape(shape)
    x = x.permute(draw(st.permutations(range(len(shape)))))
    dim = draw(st.integers(0, x.dim() - 1))
    rows = draw(st.lists(st.integers(0, x.shape[dim] - 1), min_size=1, unique=True))
    return x, dim, torch.tensor(rows)


def indexed(dim: int, rows: Tensor) -> tuple[slice | Tensor, ...]:
    return (*[slice(None)] * dim, rows)


def memory_order(x: Tensor) -> list[int]:
    """The dimensions longer than 1 (the others may have any stride), outermost first."""
    dims = [d for d in range(x.dim()) if x.shape[d] > 1]
    return sorted(dims, key=lambda d: -x.stride(d))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(permuted())
def test_rows_are_taken_added_and_put_as_by_indexing(case: tuple[Tensor, int, Tensor]) -> None:
    x, dim, rows = case
    before, at = x.clone(), indexed(dim, rows)
    values = -1 - take_rows(x, rows, dim)
    assert torch.equal(-1 - values, x[at])

    added, put = x.clone(), x.clone()
    added[at] += 0.5 * values
    put[at] = values
    assert torch.equal(add_rows(x, rows, values, 0.5, dim), added)
    assert torch.equal(put_rows(x, rows, values, dim), put)
    assert torch.equal(x, before)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(permuted())
def test_the_result_is_dense_and_has_the_memory_order_of_the_tensor(
    case: tuple[Tensor, int, Tensor],
) -> None:
    x, dim, rows = case
    taken = take_rows(x, rows, dim)
    for result in (taken, add_rows(x, rows, taken, 2.0, dim), put_rows(x, rows, taken, dim)):
        order = memory_order(result)
        assert order == [d for d in memory_order(x) if result.shape[d] > 1]
        assert result.permute(*memory_order(x), *_short(x)).is_contiguous()
        assert result.data_ptr() != x.data_ptr()


def _short(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if x.shape[d] == 1]


def test_rows_of_an_expanded_tensor_are_taken_and_put() -> None:
    x = torch.arange(3.0).expand(4, 3)
    rows = torch.tensor([1, 3])
    assert torch.equal(take_rows(x, rows), x[rows])
    added = add_rows(x, rows, torch.ones(2, 3), 1.0)
    assert torch.equal(added, torch.tensor([[0.0, 1, 2], [1, 2, 3], [0, 1, 2], [1, 2, 3]]))


KEPT = {"dropped": 0, "kept": 5, "partly kept": 3}  # of five rows


def kept_rows(layer: Callable[[Tensor], Tensor], x: Tensor, seen: list[Tensor], n: int) -> Tensor:
    """What comes out of the first call in which the branch sees n rows."""
    for _ in range(1000):
        seen.clear()
        y = layer(x)
        if sum(map(len, seen)) == n:
            return y
    raise AssertionError(f"never {n} rows")


CASES = [
    (mode, kept)
    for mode in ("batch", "row", "subset")
    for kept in KEPT
    if (mode, kept) != ("batch", "partly kept")
]
RATES = {"dropped": 1.0, "kept": 1e-30, "partly kept": 0.4}


@pytest.mark.parametrize(("mode", "kept"), CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_has_the_strides_of_its_shortcut(layout: str, mode: str, kept: str) -> None:
    torch.manual_seed(0)
    x, seen = LAYOUTS[layout](), []

    def branch(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows * 2

    def layer(x: Tensor) -> Tensor:
        return sd.residual(x, branch, p=RATES[kept], mode=mode)

    y = kept_rows(layer, x, seen, KEPT[kept])
    assert y.stride() == x.stride()
    assert [memory_order(rows) for rows in seen] == [memory_order(x)] * len(seen)


@pytest.mark.parametrize(("mode", "kept"), CASES)
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3, 1, 1), (5, 1, 4, 4)])
def test_around_a_convolution_everything_stays_channels_last(
    shape: tuple[int, ...], mode: str, kept: str
) -> None:
    torch.manual_seed(0)
    x, seen = torch.randn(shape).to(memory_format=torch.channels_last), []
    conv = torch.nn.Conv2d(shape[1], shape[1], 3, 1, 1).to(memory_format=torch.channels_last)
    conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer = sd.StochasticDepth(conv, RATES[kept], mode=mode)
    y = kept_rows(layer, x, seen, KEPT[kept])
    for tensor in (y, *seen):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_and_second_gradients_are_those_of_the_function(layout: str) -> None:
    x = LAYOUTS[layout]().double()[:, :2, :2].requires_grad_()
    values = torch.randn_like(x[[3, 1]]).requires_grad_()
    rows = torch.tensor([3, 1])

    def squared(x: Tensor, values: Tensor) -> list[Tensor]:
        taken, whole = split_rows(x, rows)
        results = [take_rows(x, rows), taken, whole, add_rows(whole, rows, values, 0.5)]
        return [result.square() for result in results]

    assert torch.autograd.gradcheck(squared, (x, values))
    assert torch.autograd.gradgradcheck(squared, (x, values))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class LargeZeros(TorchDispatchMode):
    """Counts the tensors of zeros of a size that are made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "zero" in func.__name__ and result.numel() == self.size:
            self.count += 1
        return result


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_no_full_size_gradient_of_zeros_is_made(mode: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8, requires_grad=True)
    model = nn.Sequential(Residual(), Residual())
    sd.apply(model, 0.5, schedule="uniform", mode=mode, example_inputs=x.detach())
    loss = model(x).square().sum()
    with LargeZeros(x.numel()) as zeros:
        loss.backward()
    assert zeros.count == 0
    assert all(0 < branch.dropped < 6 for branch in sd.branches(model))


def test_results_are_no_views_since_autograd_copies_gradients_of_changed_views() -> None:
    x = torch.randn(5, 3, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    rows = torch.tensor([0, 2])
    assert take_rows(x, rows)._base is None
    assert split_rows(x, rows)[0]._base is None
    assert add_rows(x, rows, torch.ones(2, 3, 4, 6), 1.0)._base is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch's own forward mode
def test_transforms_and_forward_mode_see_the_same_functions() -> None:
    x, rows = torch.randn(5, 3), torch.tensor([4, 0])

    def f(x: Tensor) -> Tensor:
        taken, whole = split_rows(x, rows)
        return add_rows(whole, rows, taken.square(), 2.0).sum()

    expected = torch.autograd.functional.jacobian(f, x)
    torch.testing.assert_close(torch.func.grad(f)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(f)(x), expected)
    torch.testing.assert_close(
        torch.vmap(f)(torch.stack([x, 2 * x])), torch.stack([f(x), f(2 * x)])
    )


class Instance(nn.Module):
    """As in MONAI: normalised by sample, and the shortcut is added to the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return out.relu()


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_gradients_have_the_layout_that_they_have_in_the_plain_model(
    mode: str, samples: int
) -> None:
    # torch's instance_norm makes another gradient of a channels-last one of a single sample.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Instance()).double()
    x = torch.randn(2, 1, 5, 5).double().to(memory_format=torch.channels_last)
    h, weight = model[0](x).detach().to(memory_format=torch.channels_last), torch.randn(2, 4, 5, 5)
    plain = copy.deepcopy(model[1])
    branch = sd.branches(sd.apply(model[1], 0.5, mode=mode, schedule="uniform", example_inputs=h))
    for seed in range(6):
        torch.manual_seed(seed)
        before = branch[0].dropped
        model.zero_grad()
        out = model[1](h[:samples].clone().requires_grad_())
        (out * weight[:samples]).sum().backward()
        got = model[1].conv.weight.grad
        kept = torch.zeros(samples, dtype=torch.bool)
        for i in range(samples):  # a kept one is as if it were alone and counted twice
            full = (h[i : i + 1] + 2 * plain.norm(plain.conv(h[i : i + 1]))).relu()
            kept[i] = torch.allclose(out[i : i + 1], full)
        dropped = branch[0].dropped - before
        assert int((~kept).sum()) in (dropped, dropped * samples)
        plain.zero_grad()
        for i in kept.nonzero().flatten().tolist():
            y = plain.norm(plain.conv(h[i : i + 1])) * 2
            y += h[i : i + 1]
            (y.relu() * weight[i : i + 1]).sum().backward()
        want = plain.conv.weight.grad
        want = torch.zeros_like(plain.conv.weight) if want is None else want
        torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want)


class Attending(nn.Module):
    """Its attention gives the normalisation gradients of few strides, which torch takes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(self.query(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        y = nn.functional.scaled_dot_product_attention(q, q.detach(), q.detach())
        return y.transpose(-1, -2).reshape(x.shape)


@pytest.mark.parametrize("training", [False, True])
def test_a_single_image_is_not_normalised_alone(training: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Attending()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attend(x)

    torch.manual_seed(0)
    plain = Block().double()
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    model = sd.apply(copy.deepcopy(plain), 0.5, mode="row", scale="none", example_inputs=x)
    model.attend.norm.train(training)
    (branch,) = sd.branches(model)
    seed = next(n for n in range(100) if len(choose_samples(branch, n, 3, "cpu")[0]) == 1)
    kept = choose_samples(branch, seed, 3, "cpu")[0].item()
    with forced({branch: (seed, 1.0)}):
        model(x)[kept].square().sum().backward()
    # The plain one is given the same two samples: statistics are those of these.
    pair = x[[kept, (kept + 1) % 3]]
    plain.attend.norm.train(training)
    plain(pair)[0].square().sum().backward()
    torch.testing.assert_close(model.attend.query.weight.grad, plain.attend.query.weight.grad)
