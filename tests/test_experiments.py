"""The experiments run, are resumed run by run, and write their page."""

import json
from types import SimpleNamespace

import pytest
import torch
from experiments import from_scratch, harness
from torch import nn
from torch.utils.data import Subset


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(harness, "DOCS", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    page = tmp_path / "evidence.md"
    page.write_text("# Page\n\n<!-- from_scratch -->\n<!-- /from_scratch -->\n\nThe end.\n")
    return page


def images(training: int, testing: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (128, 28, 28), dtype=torch.uint8, generator=generator)
    whole = SimpleNamespace(data=pixels, targets=torch.arange(128) % 10)
    return Subset(whole, range(training)), None, Subset(whole, range(testing)), ()


def test_an_experiment_is_resumed_run_by_run_and_writes_its_section(page, monkeypatch, capsys):
    monkeypatch.setattr(from_scratch.fashion_mnist, "load", images)
    monkeypatch.setattr("sys.argv", ["from_scratch", "--size", "tiny", "--seeds", "1"])
    original, stopped = from_scratch.run, []

    def stop(scale, depth, seed):
        if depth == 14 and not stopped:
            stopped.append(depth)
            raise KeyboardInterrupt
        return original(scale, depth, seed)

    monkeypatch.setattr(from_scratch, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        from_scratch.main()
    assert "8 layers, seed 0: " in capsys.readouterr().out
    from_scratch.main()
    assert "8 layers, seed 0 ..." not in capsys.readouterr().out  # it was kept
    kept = json.loads((harness.RESULTS / "from_scratch-tiny.json").read_text())
    assert list(kept["runs"]) == ["8 layers, seed 0", "14 layers, seed 0"]
    assert kept["runs"]["8 layers, seed 0"]["batch"].keys() == {"error", "seconds"}
    text = page.read_text()
    assert text.startswith("# Page\n\n<!-- from_scratch -->\n## From scratch")
    assert text.endswith("<!-- /from_scratch -->\n\nThe end.\n")
    assert "A tiny run, which shows that the command works" in text
    assert (page.parent / "images" / "evidence-from_scratch.png").is_file()
    from_scratch.main()
    assert page.read_text() == text


def test_models_are_trained_by_turns_with_the_same_draws():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            order.append(self)
            draws.append(torch.rand(()).item())
            return self.weight * x

    order: list[nn.Module] = []
    draws: list[float] = []
    models = {"a": Noisy(), "b": Noisy()}
    batches = [(torch.ones(1), torch.ones(1))] * 4
    seconds = harness.train_by_turns(
        models, batches, lambda m, x, y: (m(x) - y).square().sum(), 4, 0.1, seed=0
    )
    a, b = models.values()
    assert order == [a, b, b, a, a, b, b, a]
    assert draws[::2] == draws[1::2]
    assert len(set(draws)) == 4
    assert torch.equal(a.weight, b.weight)
    assert seconds.keys() == {"a", "b"}


def test_numbers_are_paired():
    assert harness.change([1.0, 2.0], [2.0, 3.0], 1) == "−1.0\xa0±\xa00.0"  # on one line
    assert harness.change([1.0], [2.0], 1) == "−1.0"
    assert harness.ratio([1.0, 2.0], [2.0, 4.0]) == "0.50\xa0±\xa00.00"
