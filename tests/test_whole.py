"""Blocks dropped as a whole: LayerDrop, and forwards that cannot be traced."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


class Layer(nn.Module):
    """A decoder layer in the way of transformers: keywords, a mask, a cache, a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, hidden: Tensor, mask: Tensor | None = None, cache: Cache | None = None):
        mixed = torch.tanh(self.first(hidden))
        if mask is not None:
            mixed = mixed * mask
        if cache is not None:
            cache.keys.append(mixed)
        hidden = hidden + mixed
        return hidden + self.gain * self.second(hidden), cache, None


class Decoder(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: Tensor, **more: object) -> Tensor:
        for layer in self.layers:
            x, cache, weights = layer(hidden=x, **more)
            assert weights is None
            assert cache is more.get("cache")
        return x


class Untraceable(nn.Module):
    """What it does depends on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("not finite")
        return self.linear(x)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rows_run(model: nn.Module) -> list[int]:
    """Filled with the rows that every layer's first linear computes."""
    counts: list[int] = []
    for layer in model.layers:
        layer.first.register_forward_hook(lambda _, args, __: counts.append(len(args[0])))
    return counts


def expected(plain: Decoder, x: Tensor, weights: list[Tensor], **more: object) -> Tensor:
    """All computed; ``weights`` are those of each layer's change, by row."""
    for layer, weight in zip(plain.layers, weights, strict=True):
        x = x + weight.view(-1, 1) * (layer(x, **more)[0] - x)
    return x


def coins(model: nn.Module, mode: str, rows: int, weight: float) -> list[Tensor]:
    """The weights by row that the default generator gives the layers next."""
    drawn = []
    for branch in sd.branches(model):
        u = torch.rand(rows if mode == "row" else 1).expand(rows)
        drawn.append(torch.where(u >= branch.p, weight, 0.0).double())
    return drawn


@pytest.mark.parametrize(("scale", "weight"), [("train", 2.0), ("none", 1.0)])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_output_and_gradients_are_those_of_masked_layers(mode, scale, weight):
    plain = Decoder().double()
    model = sd.apply(copy.deepcopy(plain), 0.5, "uniform", mode, scale, whole=Layer)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    model(x)  # the layers have been looked at
    for seed in range(8):
        torch.manual_seed(seed)
        weights = coins(model, mode, len(x), weight)
        torch.manual_seed(seed)
        losses = [model(x).square().sum(), expected(plain, x, weights).square().sum()]
        torch.testing.assert_close(*losses)
        leaves = [[x, *m.parameters()] for m in (model, plain)]
        ours, theirs = (
            torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)
            for loss, wrt in zip(losses, leaves, strict=True)
        )
        torch.testing.assert_close(ours, theirs)


def test_only_kept_rows_run():
    model = sd.apply(Decoder(), 0.5, "uniform", "subset", whole=Layer)
    model(torch.randn(6, 4))
    counts = rows_run(model)
    model(torch.randn(6, 4))
    assert counts == [3, 3, 3]


def test_p_1_runs_nothing_from_the_first_call_and_p_0_is_the_plain_model():
    plain = Decoder()
    x = torch.randn(2, 4)
    model = copy.deepcopy(plain)
    calls = []
    real = nn.Linear.forward

    def forward(self: nn.Linear, given: Tensor) -> Tensor:
        calls.append(type(given) is Tensor)  # False for the look on fake tensors
        return real(self, given)

    sd.apply(model, 1.0, "uniform", whole="layers.*")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        assert torch.equal(model(x), x)
    assert calls
    assert not any(calls)
    assert torch.equal(sd.apply(model, 0.0, whole="layers.*")(x), plain(x))


def test_evaluation_is_the_plain_model_and_the_paper_s_scaling_weighs_the_change():
    plain = Decoder().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    model = sd.apply(copy.deepcopy(plain), 0.5, whole=Layer)
    assert torch.equal(model(x), plain(x))
    sd.apply(model, 0.25, "uniform", scale="eval", whole=Layer).eval()
    weights = [torch.full((3,), 0.75, dtype=torch.float64)] * 3
    torch.testing.assert_close(model(x), expected(plain, x, weights))


def test_rows_that_cannot_be_told_apart_are_masked_with_a_warning():
    plain = Decoder().double()
    model = sd.apply(copy.deepcopy(plain), 0.5, "uniform", "row", whole=Layer)
    x, mask = torch.randn(2, 5, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="cannot be told which of the tensors"):
        model(x, mask=mask)
    counts = rows_run(model)
    torch.manual_seed(1)
    weights = coins(model, "row", 5, 2.0)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x, mask=mask), expected(plain, x, weights, mask=mask))
    assert counts == [5, 5, 5]


def test_a_cache_is_passed_on_and_dropped_layers_leave_it_alone():
    model = sd.apply(Decoder(), 0.5, "uniform", whole=Layer)
    cache = Cache()
    x = torch.randn(2, 4, requires_grad=True) * 1  # not a leaf: deepcopy would refuse it
    for _ in range(10):
        model(x, cache=cache)
    kept = sum(branch.decided - branch.dropped for branch in sd.branches(model))
    assert len(cache.keys) == kept
    assert 0 < kept < 30


def test_a_forward_that_cannot_be_traced_is_dropped():
    model = nn.Sequential(Untraceable(), Untraceable())
    with pytest.raises(ValueError, match="whole="):
        sd.apply(model)
    sd.apply(model, 1.0, "uniform", whole=Untraceable)
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x)
    assert sd.verify(model, x).passed


class Bad(nn.Module):
    def __init__(self, result) -> None:
        super().__init__()
        self.linear, self.result = nn.Linear(4, 3), result

    def forward(self, x: Tensor):
        return self.result(self, x)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (lambda self, x: self.linear(x), "wrap it in StochasticDepth with a projection"),
        (lambda self, x: (x + 1, self.linear(x)), r"beside its output it returns a tensor"),
        (lambda self, x: "nothing", "returns a str"),
        (lambda self, x: x.argsort(), "torch.int64"),
    ],
)
def test_what_cannot_be_dropped_is_reported_and_runs(result, reason):
    model = nn.Sequential(Bad(result))
    x = torch.randn(2, 4)
    plain = model(x)
    sd.apply(model, 1.0, "uniform", whole=Bad)
    with pytest.warns(UserWarning, match=reason):
        output = model(x)
    assert (
        all(map(torch.equal, output, plain))
        if isinstance(plain, tuple)
        else str(output) == str(plain)
    )


def test_something_else_beside_the_output_than_before_is_an_error():
    calls = []

    def result(self, x):
        calls.append(x)
        return x + 1, len(calls)

    model = sd.apply(nn.Sequential(Bad(result)), 0.5, "uniform", whole=Bad)
    torch.manual_seed(1)
    assert torch.rand(1) > 0.5  # it keeps
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="something else beside its output"):
        model(torch.ones(2, 4))


def test_state_is_kept_and_remove_undoes():
    plain = Decoder()
    model = sd.apply(copy.deepcopy(plain), 0.5, whole=lambda name, m: isinstance(m, Layer))
    x = torch.randn(2, 4)
    model(x)
    assert list(model.state_dict()) == list(plain.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(3)
        ours = model(x)
        torch.manual_seed(3)
        assert torch.equal(twin(x), ours)
    sd.remove(model)
    assert torch.equal(model(x), plain(x))
    assert vars(model.layers[0]).keys() == vars(plain.layers[0]).keys()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays(reentrant):
    model = sd.apply(Decoder(), 0.5, "uniform", "row", whole=Layer)
    x = torch.randn(4, 4, requires_grad=True)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        run(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["batch", "subset"])
def test_compiles_into_one_graph_after_a_first_call(mode):
    torch._dynamo.reset()
    model = sd.apply(Decoder(), 0.5, "uniform", mode, whole=Layer)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 4)
    with pytest.raises(Exception, match="once in training before"):
        fast(x)
    torch._dynamo.reset()
    model(x)
    results = {round(fast(x).sum().item(), 4) for _ in range(20)}
    assert len(results) > 2


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"whole='blocks\.\*' matches no module of Decoder"):
        sd.apply(Decoder(), whole="blocks.*")
    with pytest.raises(TypeError, match="whole must be globs"):
        sd.apply(Decoder(), whole=3)
    with pytest.raises(ValueError, match="include and exclude are for branches"):
        sd.apply(Decoder(), whole=Layer, exclude="layers.0")


def test_summary_lists_blocks_and_not_what_is_in_them():
    text = str(sd.summary(sd.apply(Decoder(), 0.5, "uniform", whole=Layer), torch.randn(2, 4)))
    assert "layers.2:(whole)" in text
    assert "not dropped" not in text
    assert "expected depth  1.50 of 3" in text
