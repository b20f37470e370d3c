"""The mean over all paths of a net, weighted with their probabilities, against its evaluation.

Each net runs in training until every path was taken. Which path that was is read off the rows
that the branches were called with: every row carries its number in column 0, where no branch
adds anything. So nothing here depends on how the library draws its decisions.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import reference
import stochastic_depth as sd

WIDTH = 4
SCALES = ["train", "eval", "none"]


def linear(identity: float, seed: int) -> nn.Linear:
    """A linear branch (identity 0) or block (1) that leaves the row's number in column 0 alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[0] = torch.eye(WIDTH)[0] * identity
        layer.bias[0] = 0.0
    return layer


class Residual(nn.Module):
    """A net of residual sums by the function."""

    def __init__(self, rates: list[float], mode: str, scale: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(0.0, i) for i in range(len(rates)))
        self.rates, self.options = rates, {"mode": mode, "scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        for layer, p in zip(self.layers, self.rates, strict=True):
            x = sd.residual(x, layer, p=p, training=self.training, **self.options)
        return x

    def branches(self) -> reference.Net:
        return list(self.layers)


class Wrapped(nn.Module):
    """A net of wrapped blocks, whose branches are what the blocks add to their input."""

    def __init__(self, rates: list[float], mode: str, scale: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(1.0, i) for i in range(len(rates)))
        self.blocks = nn.Sequential(
            *(
                sd.StochasticDepth(layer, p, mode=mode, scale=scale)
                for layer, p in zip(self.layers, rates, strict=True)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def branches(self) -> reference.Net:
        return [lambda x, f=layer: f(x) - x for layer in self.layers]


class Block(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class Applied(nn.Module):
    """A plain net to which stochastic depth was applied."""

    def __init__(self, rates: list[float], mode: str, scale: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(0.0, i) for i in range(len(rates)))
        self.blocks = nn.Sequential(*map(Block, self.layers))
        sd.apply(
            self, None, schedule=rates, mode=mode, scale=scale, example_inputs=batch(len(rates) + 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    def branches(self) -> reference.Net:
        return list(self.layers)


@dataclass
class Means:
    """Of the output and of its gradient, over all paths."""

    output: Tensor
    gradient: Tensor


def batch(rows: int) -> Tensor:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x[:, 0] = torch.arange(rows)
    return x


def output_and_gradient(net: Callable[[Tensor], Tensor], rows: int) -> tuple[Tensor, Tensor]:
    x = batch(rows).requires_grad_()
    output = net(x)
    (gradient,) = torch.autograd.grad((output * torch.arange(1.0, WIDTH + 1)).sum(), x)
    return output.detach(), gradient


def all_paths(net: nn.Module, rows: int, number: int) -> dict[reference.Path, tuple[Tensor, ...]]:
    """Train until ``number`` different paths were taken; what came out on each."""
    seen: list[set[int]] = [set() for _ in net.layers]
    for layer, tags in zip(net.layers, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, x, t=tags: t.update(x[0][:, 0].int().tolist()))
    taken: dict[reference.Path, tuple[Tensor, ...]] = {}
    torch.manual_seed(0)
    for _ in range(100 * number):
        for tags in seen:
            tags.clear()
        results = output_and_gradient(net.train(), rows)
        path = tuple(tuple(row in tags for row in range(rows)) for tags in seen)
        before = taken.setdefault(path, results)
        # The order of the rows may differ in "subset" mode, and with it the last digit.
        torch.testing.assert_close(results, before, rtol=0, atol=1e-12)
        if len(taken) == number:
            return taken
    raise AssertionError(f"only {len(taken)} of {number} paths were taken")


CASES = {
    "batch, two rates": ("batch", 2, [0.25, 0.6, 0.5]),
    "row": ("row", 2, [0.3, 0.5]),
    "row, three rows": ("row", 3, [0.4, 0.5]),
    "subset, k/B = 1-p": ("subset", 3, [1 / 3, 2 / 3]),
    "subset, k/B is not 1-p": ("subset", 3, [0.5, 0.25]),
}


@functools.cache
def measure(
    form: type[nn.Module], case: str, scale: str
) -> tuple[nn.Module, dict[reference.Path, tuple[Tensor, ...]], Means]:
    mode, rows, rates = CASES[case]
    net = form(rates, mode, scale)
    expected = reference.paths(rows, rates, mode)
    taken = all_paths(net, rows, len(expected))
    assert taken.keys() == expected.keys()
    mean = [sum(q * taken[path][i] for path, q in expected.items()) for i in range(2)]
    return net, taken, Means(*mean)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


FORMS = [Residual, Wrapped, Applied]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_path_is_the_masked_net(form: type[nn.Module], case: str, scale: str) -> None:
    mode, rows, rates = CASES[case]
    net, taken, _ = measure(form, case, scale)
    weights = [reference.training_weight(rows, p, mode, scale) for p in rates]
    for path, (output, gradient) in taken.items():
        plain = functools.partial(reference.along_path, net.branches(), path=path, weights=weights)
        expected, expected_gradient = output_and_gradient(plain, rows)
        close(output, expected)
        close(gradient, expected_gradient)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_scale_train_has_the_mean_of_evaluation(form: type[nn.Module], case: str) -> None:
    net, _, mean = measure(form, case, "train")
    output, gradient = output_and_gradient(net.eval(), CASES[case][1])
    close(mean.output, output)
    close(mean.gradient, gradient)


@pytest.mark.parametrize("case", [case for case in CASES if "is not" not in case])
@pytest.mark.parametrize("form", FORMS)
def test_scale_eval_has_the_mean_of_evaluation(form: type[nn.Module], case: str) -> None:
    net, _, mean = measure(form, case, "eval")
    output, gradient = output_and_gradient(net.eval(), CASES[case][1])
    close(mean.output, output)
    close(mean.gradient, gradient)


@pytest.mark.parametrize("scale", ["eval", "none"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_without_a_weight_in_training_the_mean_has_the_survival_rates_as_weights(
    form: type[nn.Module], case: str, scale: str
) -> None:
    mode, rows, rates = CASES[case]
    net, _, mean = measure(form, case, scale)
    weights = [reference.survival(rows, p, mode) for p in rates]
    close(mean.output, reference.whole(net.branches(), batch(rows), weights).detach())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_evaluation_weighs_branches_by_1_minus_p_in_scale_eval_alone(
    form: type[nn.Module], case: str, scale: str
) -> None:
    _, rows, rates = CASES[case]
    net, _, _ = measure(form, case, scale)
    output, _ = output_and_gradient(net.eval(), rows)
    weights = [1 - p if scale == "eval" else 1.0 for p in rates]
    close(output, reference.whole(net.branches(), batch(rows), weights).detach())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_scale_none_differs_from_its_evaluation(form: type[nn.Module], case: str) -> None:
    net, _, mean = measure(form, case, "none")
    output, _ = output_and_gradient(net.eval(), CASES[case][1])
    assert (mean.output - output).abs().max() > 0.1


def test_the_mean_around_a_projection_is_the_evaluation() -> None:
    torch.manual_seed(0)
    block = nn.Linear(WIDTH, 2, dtype=torch.float64)
    projection = nn.Linear(WIDTH, 2, dtype=torch.float64)
    x, p = batch(2), 0.3
    layer = sd.StochasticDepth(block, p, projection)
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    outputs: dict[bool, Tensor] = {}
    while len(outputs) < 2:
        calls.clear()
        output = layer(x)
        outputs[bool(calls)] = output
    close(p * outputs[False] + (1 - p) * outputs[True], layer.eval()(x))
    assert torch.equal(outputs[False], projection(x))


@pytest.mark.parametrize("options", [{}, {"blocks": "all"}])
@pytest.mark.parametrize("training", [True, False])
def test_in_the_scale_of_the_paper_a_rate_of_1_leaves_no_nan(
    options: dict[str, str], training: bool
) -> None:
    x = batch(3)
    net = nn.Sequential(Block(linear(0.0, 0)))
    sd.apply(net, 1.0, scale="eval", example_inputs=x, **options)
    with torch.no_grad():
        net[0].layer.weight.fill_(torch.inf)
    assert torch.equal(net.train(training)(x), x)


def test_past_a_relu_the_mean_over_paths_is_not_the_evaluation() -> None:
    # Two branches by hand: x + f(x) with f(x) = -3 relu(x), from x = 1, p = 1/2, scale "train".
    # Kept, the branch weighs 2: 1 -> -5, where the second adds 0; dropped: 1 -> 1 -> 1 or -5.
    x = torch.ones(1, dtype=torch.float64)
    outputs: set[tuple[float, float]] = set()
    torch.manual_seed(0)
    for _ in range(50):
        first = sd.residual(x, lambda v: -3 * v.relu(), p=0.5)
        outputs.add((first.item(), sd.residual(first, lambda v: -3 * v.relu(), p=0.5).item()))
    assert outputs == {(1.0, 1.0), (1.0, -5.0), (-5.0, -5.0)}
    mean = 0.25 * 1 + 0.25 * -5 + 0.5 * -5
    whole = x - 3 * x.relu()
    whole = whole - 3 * whole.relu()
    assert (mean, whole.item()) == (-3.5, -2.0)
