"""``sd.verify`` passes on what is right, and says in words what is wrong."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import stochastic_depth as sd
from stochastic_depth.drop import around
from stochastic_depth.drop.run import Run

D = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc, self.drop = nn.BatchNorm1d(D), nn.Linear(D, D), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc(self.norm(x)))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(D, 3))


def batch() -> Tensor:
    return torch.randn(4, D, generator=torch.Generator().manual_seed(0))


def failures(model: nn.Module, inputs: object) -> dict[str, str]:
    checks = sd.verify(model, inputs).checks
    return {check.name: check.failure for check in checks if check.failure}


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("scale", ["train", "eval", "none"])
def test_what_is_right_passes_and_nothing_changes(mode: str, scale: str) -> None:
    net = sd.apply(model(), p=0.3, mode=mode, scale=scale, example_inputs=batch()).eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    result = sd.verify(net, batch())
    assert result.passed, str(result)
    samples = mode != "batch"  # which are only selected where they are chosen
    assert str(result).count("ok") == len(result.checks) == 4 + samples
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [(b.p, b.mode, b.scale, b.decided) for b in sd.branches(net)] == [
        (0.15, mode, scale, 0),
        (0.3, mode, scale, 0),
    ]
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_a_model_without_stochastic_depth_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no stochastic depth to verify"):
        sd.verify(model(), torch.randn(4, D))


def test_a_model_without_values_is_an_error() -> None:
    net = sd.apply(model(), p=0.3, example_inputs=batch()).to("meta")
    with pytest.raises(ValueError, match="tensors on the meta device have none"):
        sd.verify(net, torch.randn(4, D))


def have_wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Run.merge

    def wrong(self: Run, *args: object, **kwargs: object) -> Tensor:
        self.weight = 1.0
        return right(self, *args, **kwargs)

    monkeypatch.setattr(Run, "merge", wrong)


ALONE = "a branch dropped or weighed alone changes just its sum"


def test_a_wrong_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sd.apply(model(), p=0.3, example_inputs=batch())
    have_wrong_weights(monkeypatch)
    found = failures(net, batch())
    assert found.keys() == {ALONE}
    assert "0:fc, counted twice" in "".join(found.values())


def test_a_wrong_weight_in_evaluation_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sd.apply(model(), p=0.3, scale="eval", example_inputs=batch())
    have_wrong_weights(monkeypatch)
    assert "evaluation is the plain model's, with branches weighed by 1-p" in failures(net, batch())


def part(**options: str) -> nn.Module:
    net = nn.Sequential(Apart(), Apart(), Apart())
    return sd.apply(net, 0.3, example_inputs=batch(), **options)


def moved(**options: str) -> nn.Module:
    net = part(**options)
    net.insert(0, Apart())
    return net


HOLDERS = {
    "in a classifier": lambda **options: nn.Sequential(Apart(), part(**options), nn.Linear(D, 3)),
    "two parts": lambda **options: nn.Sequential(part(**options), part(**options)),
    "averaged": lambda **options: AveragedModel(part(**options)),
    "moved": moved,
}


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("held", HOLDERS)
def test_a_part_passes_in_the_model_that_holds_it(held: str, mode: str) -> None:
    torch.manual_seed(0)
    result = sd.verify(HOLDERS[held](mode=mode), batch())
    assert result.passed, str(result)
    assert not result.unchecked


@pytest.mark.parametrize(
    ("held", "name"),
    [("in a classifier", "1.0"), ("two parts", "0.0"), ("averaged", "module.0"), ("moved", "1")],
)
def test_a_wrong_weight_is_found_in_the_model_that_holds_the_part(
    held: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = HOLDERS[held]()
    have_wrong_weights(monkeypatch)
    assert f"{name}:fc, counted twice" in failures(net, batch())[ALONE]


@pytest.mark.parametrize("projection", [None, "tied", "copy"])
@pytest.mark.parametrize("scale", ["train", "eval", "none"])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_wrapper_passes(mode: str, scale: str, projection: str | None) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    wrapper = sd.StochasticDepth(module, 0.5, projection, mode=mode, scale=scale)
    for net in (nn.Sequential(Apart(), wrapper), part().insert(1, wrapper)):
        result = sd.verify(net, batch())
        assert result.passed, str(result)
        assert not result.unchecked


class Pair(nn.Module):
    """Gives two streams, and takes a second one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x: Tensor, *, other: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.fc(x + other), other


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        other = x.sin()
        for block in self.blocks:
            x, other = block(x, other=other)
        return x


@pytest.mark.parametrize("scale", ["train", "eval", "none"])
@pytest.mark.parametrize("mode", ["batch", "row"])
def test_blocks_pass(mode: str, scale: str) -> None:
    torch.manual_seed(0)
    options = {"blocks": Pair, "mode": mode, "scale": scale, "example_inputs": batch()}
    result = sd.verify(sd.apply(Pairs(), 0.3, **options), batch())
    assert result.passed, str(result)
    assert not result.unchecked


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_wrong_weight_of_a_block_is_found(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(Apart(), sd.StochasticDepth(Apart(), 0.3) if wrapped else Apart())
    if not wrapped:
        sd.apply(net, 0.3, blocks="1", example_inputs=batch())
    monkeypatch.setattr(around, "_lerp", lambda shortcut, x, weight: x)
    assert "1" + ":(block)" * (not wrapped) + ", counted twice" in failures(net, batch())[ALONE]


def test_a_branch_that_the_call_does_not_show_is_told() -> None:
    net = nn.Sequential(Apart(), Apart())
    net[1].fc = nn.Sequential(Apart(), nn.Linear(D, D))  # the sum of the model is that around it
    sd.apply(net, 0.3, include="0:*", example_inputs=batch())
    sd.apply(net[1].fc, 0.3, example_inputs=batch())
    result = sd.verify(net, batch())
    assert result.passed, str(result)
    ((name, reason),) = result.unchecked
    assert name == "1.fc.0:fc"
    assert "this call does not show it" in reason
    assert f"skipped {name}, alone: {reason}" in str(result)


def test_a_branch_that_runs_where_it_is_dropped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sd.apply(model(), p=0.3, example_inputs=batch())
    right = Run.call

    def wrong(self: Run, gate: object, run: object, args: tuple, *others: object) -> object:
        if self.dropped:
            run(torch.ones(4, D, dtype=torch.float64))
        return right(self, gate, run, args, *others)

    monkeypatch.setattr(Run, "call", wrong)
    found = failures(net, batch())
    assert found.keys() == {"a dropped branch is not executed"}
    assert "0.norm" in "".join(found.values())


class Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Meeting(nn.Linear):
    """Its samples are not kept apart."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


def test_samples_that_depend_on_each_other_are_masked_and_right() -> None:
    net = nn.Sequential(Apart())
    net[0].fc = Meeting(D, D)
    with pytest.warns(UserWarning, match="samples cannot be selected in 1 of 1 branches"):
        sd.apply(net, p=0.3, mode="row", example_inputs=batch())
    assert sd.verify(net, batch()).passed


def test_samples_that_came_to_depend_on_each_other_later_are_found() -> None:
    net = sd.apply(nn.Sequential(Apart()), p=0.3, mode="row", example_inputs=batch())
    assert sd.verify(net, batch()).passed
    net[0].fc = Meeting(D, D)
    found = sd.verify(net, batch())
    assert not found.passed
    assert "FAILED  selected samples are what they are where masked" in str(found)
    assert "0:fc" in str(found)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_both_layouts_of_torchs_transformer_layers(batch_first: bool, kind: str) -> None:
    torch.manual_seed(0)
    layers = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
    layer = layers[kind](D, 2, 16, batch_first=batch_first)
    x = torch.randn(4, 5, D)
    inputs = (x, torch.randn(4, 5, D))[: 1 + (kind == "decoder")]
    sd.apply(layer, p=0.3, example_inputs=inputs)
    assert len(sd.branches(layer)) == 2 + (kind == "decoder")
    result = sd.verify(layer, inputs)
    assert result.passed, str(result)


class Odd(nn.Module):
    """A residual block whose branch does what ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc = how, Odds(how)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chooses at random":  # before the branch, in evaluation, too
            x = x[:, torch.multinomial(torch.ones(D), D)]
        return x + self.fc(x)


class Odds(nn.Linear):
    def __init__(self, how: str) -> None:
        super().__init__(D, D)
        self.how = how
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.how == "overflows in double" and x.dtype == torch.float64:
            return y * float("nan")
        if self.how == "is NaN":
            return y.clone().masked_fill_(y > 0, float("nan"))
        if self.how == "computes in single":  # and rounds otherwise for another number of samples
            return y + (len(x) * torch.finfo(torch.float32).eps) * y.float()
        if self.how == "keeps statistics":
            self.total = self.total + x.detach().sum()
        return y


@pytest.mark.parametrize(
    "how",
    ["overflows in double", "computes in single", "keeps statistics", "chooses at random"],
)
def test_what_is_odd_but_right_passes(how: str) -> None:
    torch.manual_seed(0)
    net = sd.apply(nn.Sequential(Odd(how), Odd(how)), 0.3, mode="row", example_inputs=batch())
    result = sd.verify(net, batch())
    assert result.passed, str(result)


def test_a_model_that_gives_nan_does_not_pass() -> None:
    torch.manual_seed(0)
    net = sd.apply(nn.Sequential(Odd("is NaN")), 0.3, example_inputs=batch())
    assert "the plain model gives NaN" in str(sd.verify(net, batch()))
