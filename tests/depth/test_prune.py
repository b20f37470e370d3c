import copy
import io
import pickle
import warnings

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd

from .small import Block, Dropping, net, run, skips_as_it_prunes, state_of, x_for_net

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def vision(name):
    torch.manual_seed(0)
    models = torchvision.models
    if name == "vit":
        model = models.VisionTransformer(64, 16, 6, 4, 64, 128)
    elif name == "swin":
        model = models.SwinTransformer([2, 2], 16, [2, 4], [2, 2], [4, 4])
    elif name == "convnext":
        setting = models.convnext.CNBlockConfig
        model = models.ConvNeXt([setting(16, 32, 2), setting(32, None, 3)])
    else:
        model = getattr(models, name)()
    return model.eval()


@pytest.mark.parametrize(
    ("what", "left"),
    [
        ("blocks.1", 4),
        (["blocks.0", "blocks.4"], 3),
        ("blocks.[0-3]:*", 1),  # all but one, branch by branch
        ("blocks.2:attn", 5),
        (["blocks.3", "blocks.2:attn", "blocks.4:mlp"], 4),
    ],
)
def test_prunes_as_it_skips(what, left):
    pruned = skips_as_it_prunes(net(), what, x_for_net())
    assert list(pruned.blocks._modules) == [str(i) for i in range(left)]
    assert not sd.is_applied(pruned)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext", "swin"])
def test_torchvision_prunes_as_it_skips(name):
    model = vision(name)
    table = sd.importance(model, [IMAGE])
    pruned = skips_as_it_prunes(model, table.ranking[:3], IMAGE)
    fresh = sd.prune(vision(name), remove=sd.pruned(pruned), example_inputs=IMAGE)
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(run(fresh, IMAGE)[0], run(pruned, IMAGE)[0])


@pytest.mark.parametrize("name", ["resnet50", "vit"])
def test_what_goes_is_what_the_summary_says(name):
    model = sd.apply(vision(name), p=0.5, example_inputs=IMAGE)
    rows = {row.name: row for row in sd.summary(model, IMAGE).rows}
    gone = [n for n in rows if "layer3.2" in n or "layer_3" in n or n.endswith("layer_5:mlp")]
    assert gone
    whole = vision(name)
    counts, flops = [], []
    pruned = sd.prune(copy.deepcopy(whole), remove=gone, example_inputs=IMAGE)
    for m in (whole, pruned):
        counts.append(sum(p.numel() for p in m.parameters()))
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            m.train()(IMAGE)  # the plain path, with all operations
        flops.append(counter.get_total_flops())
    assert 1 - counts[1] / counts[0] == pytest.approx(sum(rows[n].parameters for n in gone))
    assert 1 - flops[1] / flops[0] == pytest.approx(sum(rows[n].flops for n in gone), abs=0.002)


def test_a_branch_alone_leaves_nothing_behind():
    model = sd.prune(net(), remove="blocks.2:attn", example_inputs=x_for_net())
    gone = {"norm1.weight", "norm1.bias", "attn.weight", "attn.bias", "gamma"}
    names = {n.removeprefix("blocks.2.") for n in model.state_dict() if n.startswith("blocks.2.")}
    assert names == {n for n, _ in Block(8).named_parameters()} - gone
    assert isinstance(model.blocks[2], Block)
    model.train()(x_for_net()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert "Removed(blocks.2:attn)" in repr(model)


def test_names_map_the_old_to_the_new():
    whole = net()
    model = sd.prune(net(), remove=["blocks.1", "blocks.3:mlp"], example_inputs=x_for_net())
    names = sd.pruned(model).names
    assert sd.pruned(model).removed == ("blocks.1", "blocks.3:mlp")
    assert names["blocks.4.attn.weight"] == "blocks.3.attn.weight"
    assert "blocks.1.attn.weight" not in names
    assert "blocks.3.mlp.weight" not in names
    assert set(names.values()) == set(model.state_dict())
    state = {names[k]: v for k, v in whole.state_dict().items() if k in names}
    model.load_state_dict(state)


def test_pruning_twice_is_pruning_once():
    x = x_for_net()
    twice = sd.prune(net(), remove=["blocks.1"], example_inputs=x)
    twice = sd.prune(twice, remove=["blocks.1", "blocks.2:attn"], example_inputs=x)
    once = sd.prune(net(), remove=["blocks.1", "blocks.2", "blocks.3:attn"], example_inputs=x)
    assert torch.equal(twice(x), once(x))
    assert sd.pruned(twice) == sd.pruned(once)
    again = sd.prune(net(seed=1), remove=sd.pruned(twice).removed, example_inputs=x)
    again.load_state_dict(twice.state_dict())
    assert torch.equal(again(x), once(x))


def test_keep_takes_a_number_a_ranking_or_names():
    x = x_for_net()

    def removed(**options):
        return sd.pruned(sd.prune(net(), example_inputs=x, **options)).removed

    assert removed(keep=3) == ("blocks.1", "blocks.3")
    assert removed(keep=range(2)) == ("blocks.2", "blocks.3", "blocks.4")
    assert removed(keep=["blocks.0", "blocks.4"]) == ("blocks.1", "blocks.2", "blocks.3")
    table = sd.importance(net(), [x], of="blocks")
    assert set(removed(keep=2, by=table)) == set(table.ranking[:3])
    table = sd.importance(net(), [x])
    assert len(removed(keep=8, by=table)) <= 2
    assert removed(keep=numpy.int64(3)) == ("blocks.1", "blocks.3")
    ranking = [f"blocks.{i}" for i in (4, 0, 1, 2, 3)]
    assert removed(keep=3, by=ranking) == ("blocks.0", "blocks.4")


def test_a_block_stays_where_other_inputs_may_reach_more_of_it():
    class Optional(Block):
        def forward(self, x, more=None):
            x = x + self.attn(self.norm1(x))
            return x if more is None else x + self.mlp(x + more)

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Optional(8) for _ in range(3))

        def forward(self, x, more=None):
            for block in self.blocks:
                x = block(x, more)
            return x

    model, x, more = Uses().eval(), torch.randn(2, 8), torch.randn(2, 8)
    with sd.skip(model, "blocks.1:attn", (x, more)):
        skipped = model(x, more)
    sd.prune(model, remove="blocks.1:attn", example_inputs=x)
    assert sd.pruned(model).removed == ("blocks.1:attn",)
    assert torch.equal(model(x, more), skipped)


def test_all_but_one():
    x = x_for_net()
    names = [f"blocks.{i}:{kind}" for i in range(5) for kind in ("attn", "mlp")]
    one = skips_as_it_prunes(net(), names[:-1], x)
    assert len(one.blocks) == 1
    assert len(sd.prune(net(), keep=1, example_inputs=x).blocks) == 1
    with pytest.raises(ValueError, match="nothing would be left"):
        sd.prune(one, remove="blocks.0:mlp", example_inputs=x)


def test_a_branch_whose_value_is_used_elsewhere_stays():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.one(x)
            x = x + y
            return x + self.two(x), y

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Odd(), Odd()])

        def forward(self, x):
            for block in self.blocks:
                x, y = block(x)
            return x * y

    model, x = Uses().eval(), torch.randn(2, 8)
    out, names = model(x), list(model.state_dict())
    for what in ("blocks.1:one", "blocks.1"):
        with pytest.raises(ValueError, match="can"):
            sd.prune(model, remove=what, example_inputs=x)
        assert list(model.state_dict()) == names
        assert torch.equal(model(x), out)


def test_a_frozen_a_tied_and_a_shared_block():
    x = x_for_net()
    model = net()
    model.blocks[1].requires_grad_(False)
    model.blocks[2].attn.weight = model.blocks[3].attn.weight
    model.blocks[4] = model.blocks[0]
    for what in ("blocks.1", "blocks.1:mlp", "blocks.2:attn", "blocks.3", "blocks.0:attn"):
        pruned = skips_as_it_prunes_tied(model, what, x)
        fresh = copy.deepcopy(model)
        fresh = sd.prune(fresh, remove=sd.pruned(pruned), example_inputs=x)
        fresh.load_state_dict(pruned.state_dict())


def skips_as_it_prunes_tied(model, what, x):
    with sd.skip(model, what, x):
        skipped = run(model, x)[0]
    pruned = sd.prune(copy.deepcopy(model), remove=what, example_inputs=x)
    assert torch.equal(run(pruned, x)[0], skipped)
    return pruned


def test_its_own_drop_path_goes_with_a_branch():
    model, x = nn.Sequential(Dropping(), Dropping()).eval(), torch.randn(4, 8)
    pruned = skips_as_it_prunes(model, "0:one", x)
    calls = pruned[0].drop2.calls
    pruned.train()(x)
    assert pruned[0].drop2.calls == calls + 1


@pytest.mark.parametrize("what", ["blocks.1", ["blocks.1", "blocks.2:attn"]])
def test_copies_pickles_compiled_and_exported(what):
    x = x_for_net()
    model = sd.prune(net(), remove=what, example_inputs=x)
    out = model(x)
    assert torch.equal(copy.deepcopy(model)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)
    file = io.BytesIO()
    torch.save(model, file)
    assert torch.equal(torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x), out)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), out)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), out)


def test_onnx():
    pytest.importorskip("onnxscript")
    x = x_for_net()
    model = sd.prune(net(), remove=["blocks.1", "blocks.2:attn"], example_inputs=x)
    with warnings.catch_warnings():  # the exporter's own
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    torch.testing.assert_close(program.call_reference(x)[0], model(x))


def test_stochastic_depth_goes_on_with_what_is_left():
    x = x_for_net()
    model = sd.apply(net(), p=0.5, example_inputs=x)
    sd.prune(model, remove=["blocks.1", "blocks.2:attn"], example_inputs=x)
    assert not sd.is_applied(model)
    sd.apply(model, p=0.5, example_inputs=x)
    assert [b.name for b in sd.branches(model)] == [
        f"blocks.{i}:{k}" for i in range(4) for k in ("attn", "mlp") if (i, k) != (1, "attn")
    ]
    model.train()(x).sum().backward()


def test_a_view_shares_what_it_has():
    x = x_for_net()
    model = sd.apply(net(), p=0.5, example_inputs=x)
    view = sd.shallow(model, keep=range(2), example_inputs=x)
    assert sd.is_applied(model)
    assert len(model.blocks) == 5
    assert len(view.blocks) == 2
    assert {id(p) for p in view.parameters()} < {id(p) for p in model.parameters()}
    exit_at_2 = model.head(model.blocks[1](model.blocks[0](model.stem(x))))
    assert torch.equal(view(x), sd.remove(model).eval() and exit_at_2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, TypeError, "either keep= or remove="),
        ({"keep": 3, "remove": "blocks.1"}, TypeError, "either keep= or remove="),
        ({"remove": "blocks.1", "by": ["blocks.1"]}, TypeError, "by= ranks what to keep"),
        ({"keep": 5}, ValueError, "at least 1 and less than the 5 blocks"),
        ({"keep": 0}, ValueError, "at least 1 and less than the 5 blocks"),
        ({"keep": -1}, ValueError, "at least 1 and less than the 5 blocks"),
        ({"keep": True}, TypeError, "a number of blocks, or which"),
        ({"keep": "blocks.1"}, TypeError, "a number of blocks, or which"),
        ({"keep": [7]}, ValueError, "there are 5 blocks"),
        ({"keep": ["blocks.7"]}, ValueError, "none of the blocks"),
        ({"keep": []}, ValueError, "would keep 0 of 5"),
        ({"keep": range(5)}, ValueError, "would keep 5 of 5"),
        ({"keep": 2, "by": ["blocks.9"]}, ValueError, "ranks 'blocks.9'"),
        ({"keep": 2, "by": ["blocks.1"]}, ValueError, "keep at least 4"),
        ({"keep": 3, "by": ["blocks.0", "blocks.0"]}, ValueError, "ranks 'blocks.0' twice"),
        ({"keep": [0, -5, 1]}, ValueError, "has 'blocks.0' twice"),
        ({"remove": "blocks.9"}, ValueError, "'blocks.9' is no branch or block"),
        ({"remove": "*"}, ValueError, "nothing would be left"),
        ({"remove": [f"blocks.{i}" for i in range(5)]}, ValueError, "nothing would be left"),
        ({"remove": 3}, TypeError, "names, globs or Branches"),
    ],
)
def test_bad_input_changes_nothing(options, error, match):
    model = sd.apply(net(), p=0.5, example_inputs=x_for_net())
    before, names = state_of(model), [b.name for b in sd.branches(model)]
    with pytest.raises(error, match=match):
        sd.prune(model, example_inputs=x_for_net(), **options)
    assert str(state_of(model)) == str(before)
    assert [b.name for b in sd.branches(model)] == names


@pytest.mark.parametrize("head_is_zero", [False, True])
def test_what_others_depend_on_stays(head_is_zero):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(8) for _ in range(3))
            self.head = nn.Linear(8, 8)
            if head_is_zero:
                nn.init.zeros_(self.head.weight)

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = block(x) * (i + 1)
            return self.head(x)

    model, x = Counts().eval(), torch.randn(2, 8)
    out = model(x)
    with pytest.raises(RuntimeError, match="computes something else than when it skips"):
        sd.prune(model, remove="blocks.1", example_inputs=x)
    assert torch.equal(model(x), out)
    assert len(model.blocks) == 3
    sd.prune(model, remove="blocks.1:mlp", example_inputs=x)


def test_a_parameter_that_a_block_looks_at_stays():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.bias = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

        def forward(self, x):
            y = self.body(x)
            if self.bias is not None:
                y = y + self.bias
            return x + y

    model, x = nn.Sequential(Block(8), Biased(), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    pruned = skips_as_it_prunes(model, "1:body", x)
    assert torch.equal(pruned(x), model[2](model[0](x)))
    assert pruned[1].bias is not None
