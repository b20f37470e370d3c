import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stochastic_depth as sd

from .small import net, run, x_for_net


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def batches():
    source = torch.Generator().manual_seed(2)
    return [
        (torch.randn(8, 4, generator=source), torch.randint(3, (8,), generator=source))
        for _ in range(3)
    ]


def loss_without(model, *names):
    total = 0.0
    for batch in batches():
        with torch.no_grad(), sd.skip(model, names, batch[0]) if names else torch.no_grad():
            total += float(loss(model, batch))
    return total / 3


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("of", ["branches", "blocks"])
def test_the_loss_is_that_without_each(of, applied):
    model = net()
    if applied:
        sd.apply(model, p=0.5, example_inputs=x_for_net())
    training, counted = model.training, [b.decided for b in sd.branches(model)]
    table = sd.importance(model, batches(), "loss", of=of, loss=loss)
    assert table.loss == pytest.approx(loss_without(net()))
    assert len(table.rows) == {"branches": 10, "blocks": 5}[of]
    for row in table.rows:
        assert row.value == pytest.approx(loss_without(net(), row.name))
    values = [table[name] for name in table.ranking]
    assert values == sorted(values)
    assert model.training == training
    assert [b.decided for b in sd.branches(model)] == counted


def test_greedy_takes_one_after_the_other():
    table = sd.importance(net(), batches(), "greedy", of="blocks", loss=loss)
    left, gone = [f"blocks.{i}" for i in range(5)], []
    for row in table.rows:
        best = min(left, key=lambda name: loss_without(net(), *gone, name))
        assert row.name == best
        gone.append(best)
        left.remove(best)
        assert row.value == pytest.approx(loss_without(net(), *gone))
    assert table.ranking == gone


def test_the_influence_is_one_less_the_cosine():
    model = net()
    inputs = [batch[0] for batch in batches()]
    table = sd.importance(model, inputs)
    of_blocks = sd.importance(model, inputs, of="blocks")
    sums = {row.name: 0.0 for row in (*table.rows, *of_blocks.rows)}
    with torch.no_grad():
        for x in inputs:
            h = model.stem(x)
            for i, block in enumerate(model.blocks):
                a = h + block.gamma * block.attn(block.norm1(h))
                b = a + block.mlp(block.norm2(a)).relu()
                for name, before, after in ((":attn", h, a), (":mlp", a, b), ("", h, b)):
                    cosine = torch.cosine_similarity(before, after, dim=-1).mean()
                    sums[f"blocks.{i}{name}"] += float(1 - cosine) / 3
                h = b
    for result in (table, of_blocks):
        for row in result.rows:
            assert row.value == pytest.approx(sums[row.name], abs=1e-6)
    assert len(table.rows) == 10
    assert len(of_blocks.rows) == 5


@pytest.mark.parametrize("width", [8, 12, 32])
def test_the_influence_is_over_channels_whatever_the_width(width):
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.BatchNorm2d(8), nn.Conv2d(8, 32, 3, padding=1)
            self.down = nn.Conv2d(32, 8, 1)

        def forward(self, x):
            return x + self.down(self.up(self.norm(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(Conv(), nn.ReLU()).eval(), torch.randn(2, 8, width, width)
    with torch.no_grad():
        cosine = torch.cosine_similarity(x, model[0](x), dim=1).mean()
    for of in ("branches", "blocks"):
        (row,) = sd.importance(model, [x], of=of).rows
        assert row.value == pytest.approx(float(1 - cosine), abs=1e-6)


def test_the_influence_of_tokens_is_over_the_last_dimension():
    class Conformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    model, x = nn.Sequential(Conformer()).eval(), torch.randn(2, 8, 8)
    with torch.no_grad():
        cosine = torch.cosine_similarity(x, model(x), dim=-1).mean()
    assert sd.importance(model, [x]).rows[0].value == pytest.approx(float(1 - cosine), abs=1e-6)


def test_a_block_that_does_nothing_is_least_important():
    model = net()
    with torch.no_grad():
        model.blocks[3].attn.weight.mul_(1e-4)
        model.blocks[3].attn.bias.zero_()
        model.blocks[3].mlp.weight.mul_(1e-4)
        model.blocks[3].mlp.bias.zero_()
    for by in ("influence", "loss"):
        table = sd.importance(model, batches(), by, of="blocks", loss=loss)
        measure = {row.name: abs(row.value - (table.loss or 0.0)) for row in table.rows}
        assert min(measure, key=measure.get) == "blocks.3"


def test_what_cannot_be_measured_is_said():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({"f": nn.Linear(4, 4)}) for _ in range(3))
            self.body = nn.ModuleList(Inner(i) for i in range(3))

        def forward(self, x):
            for inner in self.body:
                x = inner(x)
            return x

    class Inner(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.f = nn.Linear(4, 4)
            self.i = i

        def forward(self, x):
            return x + self.f(x)

    def odd(model, batch):
        out = model(batch)
        gap = float((out - model.body[0].f(batch) - batch).abs().sum())
        return out.square().mean() if gap else float("nan")

    model, x = Fails().eval(), torch.randn(2, 4)

    def odd_loss(model, batch):
        out = model(batch).square().mean()
        if torch.equal(model(batch), model.body[2](model.body[1](batch))):
            raise FloatingPointError("without the first")
        return out

    table = sd.importance(model, [x], "loss", loss=odd_loss)
    assert len(table.rows) == 2
    ((name, reason),) = table.unmeasured
    assert name == "body.0:f"
    assert "FloatingPointError: without the first" in reason
    assert name not in table.ranking
    assert f"not measured  {name}" in str(table)
    pruned = sd.prune(model, keep=2, by=table, example_inputs=x)
    assert sd.pruned(pruned).removed[0] != "body.0"


def test_it_prints_sorts_and_plots():
    table = sd.importance(net(), batches(), "loss", of="blocks", loss=loss)
    lines = str(table).splitlines()
    assert lines[0].split() == ["block", "loss", "without", "it"]
    assert [line.split()[0] for line in lines[2:7]] == table.ranking
    assert lines[-1].startswith("loss of the whole model")
    assert table._repr_html_().count("<tr>") == 6
    with pytest.raises(KeyError):
        table["blocks.9"]
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = table.plot()
    assert [t.get_text() for t in axes.get_yticklabels()] == [row.name for row in table.rows]


def test_progress_is_told():
    told = []
    options = {"of": "blocks", "loss": loss}
    sd.importance(net(), batches(), "loss", progress=lambda *p: told.append(p), **options)
    assert told == [(i, 6) for i in range(1, 7)]
    told.clear()
    sd.importance(net(3), batches(), "greedy", progress=lambda *p: told.append(p), **options)
    assert told == [(i, 7) for i in range(1, 8)]
    sd.importance(net(3), batches(), "loss", progress=True, **options)


@pytest.mark.parametrize("missing", [["rich.progress"], ["rich.progress", "tqdm"]])
def test_progress_needs_no_package(missing, monkeypatch):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    sd.importance(net(3), batches(), "loss", of="blocks", loss=loss, progress=True)


def test_batches_may_be_used_up():
    table = sd.importance(net(), iter(batches()), "loss", of="blocks", loss=loss)
    assert table == sd.importance(net(), batches(), "loss", of="blocks", loss=loss)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": x_for_net()}, TypeError, "put a single batch into a list"),
        ({"batches": {"x": x_for_net()}}, TypeError, "put a single batch into a list"),
        ({"by": "size"}, ValueError, "by must be one of"),
        ({"of": "layers"}, ValueError, "of must be one of"),
        ({"by": "loss", "batches": [x_for_net()]}, ValueError, "give loss="),
        ({"loss": lambda model, batch: 0.0}, ValueError, "has to call the model"),
        ({"batches": [torch.randn(2, 9)]}, ValueError, "calling it failed"),
        ({"by": "loss", "loss": lambda m, b: m(b[0]).sum() * float("nan")}, ValueError, "is nan"),
    ],
)
def test_bad_input_is_refused(arguments, error, match):
    model = net()
    out = run(model, x_for_net())[0]
    with pytest.raises(error, match=match):
        sd.importance(model, **{"batches": batches(), **arguments})
    assert torch.equal(run(model, x_for_net())[0], out)
