import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import stochastic_depth as sd

from .small import keys_of, net, x_for_net


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("scale", ["train", "eval", "none"])
def test_drops_in_evaluation_as_in_training(mode, scale):
    x = x_for_net()
    model = sd.apply(net(), p=0.5, mode=mode, scale=scale, example_inputs=x)
    torch.manual_seed(0)
    expected = [model.train()(x) for _ in range(5)]
    counts = [(b.decided, b.dropped) for b in sd.branches(model)]
    model.eval()
    whole = model(x)
    torch.manual_seed(0)
    with sd.sampling(model):
        for out in expected:
            torch.testing.assert_close(model(x), out)
    assert torch.equal(model(x), whole)
    assert [(b.decided, b.dropped) for b in sd.branches(model)] == counts


def test_batch_norm_stays_in_evaluation():
    x = torch.randn(2, 3, 64, 64)
    model = sd.apply(torchvision.models.resnet18(), p=0.5, example_inputs=x).eval()
    before = [m.running_mean.clone() for m in norms(model)]
    with sd.sampling(model), torch.no_grad():
        passes = torch.stack([model(x) for _ in range(6)])
        alone = [model(x[:1]) for _ in range(1)]
    assert passes.std(0).max() > 0
    assert len(alone) == 1
    assert all(torch.equal(a, m.running_mean) for a, m in zip(before, norms(model), strict=True))


def test_the_mean_is_that_of_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), sd.StochasticDepth(nn.Linear(4, 4), 0.3)).eval()
    x = torch.randn(3, 4)
    with sd.sampling(model), torch.no_grad():
        outputs = torch.stack([model(x) for _ in range(3000)])
    torch.testing.assert_close(outputs.mean(0), model(x), atol=0.06, rtol=0.05)
    assert sd.branches(model)[0].decided == 0


def test_only_this_model_is_sampled():
    x = x_for_net()
    teacher = sd.apply(net(), p=0.5, example_inputs=x).eval()
    student = sd.apply(net(), p=0.5, example_inputs=x).eval()
    whole, keys = teacher(x), keys_of(student)
    with sd.sampling(student):
        assert all(torch.equal(teacher(x), whole) for _ in range(8))
        assert not all(torch.equal(student(x), whole) for _ in range(8))
        with sd.skip(student, sd.branches(student)):
            assert torch.equal(student(x), student.head(student.stem(x)))
    assert keys_of(student) == keys


def test_a_model_without_rates_is_refused():
    with pytest.raises(ValueError, match="no branch with a rate above 0"), sd.sampling(net()):
        pass
    model = sd.apply(net(), p=0.0, example_inputs=x_for_net())
    with pytest.raises(ValueError, match="apply stochastic depth first"), sd.sampling(model):
        pass


@pytest.mark.filterwarnings("ignore")
def test_the_example_says_how_sure_the_model_is():
    pytest.importorskip("torchmetrics")
    example = Path(__file__).parents[2] / "examples" / "uncertainty.py"
    result = runpy.run_path(str(example))["main"]()
    assert result["mean of passes: nll"] < result["plain: nll"]
    assert 0 < result["mean of passes: calibration error"] < 0.2
    assert result["spread, where there were data"] > 0.01
