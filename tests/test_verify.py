"""``sd.verify`` passes on what is right, and says in words what is wrong."""

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth import executor

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


def failures(model: nn.Module, inputs: object) -> dict[str, str]:
    checks = sd.verify(model, inputs).checks
    return {check.name.split()[0]: check.failure for check in checks if check.failure}


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("scale", ["train", "eval", "none"])
def test_what_is_right_passes_and_nothing_changes(mode: str, scale: str) -> None:
    net = sd.apply(model(), p=0.3, mode=mode, scale=scale).eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    result = sd.verify(net, torch.randn(4, D, generator=torch.Generator().manual_seed(0)))
    assert result.passed
    assert str(result).count("ok") == len(result.checks) == 5
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
    net = sd.apply(model(), p=0.3).to("meta")
    with pytest.raises(ValueError, match="Sequential is on the meta device"):
        sd.verify(net, torch.randn(4, D))


def test_a_wrong_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sd.apply(model(), p=0.3)
    right = executor.decide

    def wrong(*args: object, **kwargs: object) -> object:
        keep = right(*args, **kwargs)
        return keep if keep.weight == 0.0 else type(keep)(keep.rows, 1.0)

    monkeypatch.setattr(executor, "decide", wrong)
    found = failures(net, torch.randn(4, D))
    assert found.keys() == {"with"}
    assert "0:fc" in found["with"]


def test_a_branch_that_runs_where_it_is_dropped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sd.apply(model(), p=0.3)

    def combine(shortcut: Tensor, inputs: tuple, keep: object, branch: object) -> Tensor:
        return branch.merge(shortcut, branch.run(*inputs), keep.weight)

    monkeypatch.setattr(executor, "combine", combine)
    assert "0.norm" in failures(net, torch.randn(4, D))["at"]


class RowsFromElsewhere(nn.Module):
    """Its rows are not independent, which row mode cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x.mean(0, keepdim=True) + x)


def test_rows_that_depend_on_each_other_are_found() -> None:
    net = sd.apply(nn.Sequential(RowsFromElsewhere()), p=0.3)
    found = sd.verify(net, torch.randn(4, D))
    assert not found.passed
    assert "FAILED  with a coin a row" in str(found)
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
