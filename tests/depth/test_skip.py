import threading

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd

from .small import Dropping, keys_of, net, run, x_for_net


def without(model, gone):
    """By hand: the blocks or branches that are not in ``gone``."""
    x = model.stem(x_for_net())
    for i, block in enumerate(model.blocks):
        if (i, "attn") not in gone:
            x = x + block.gamma * block.attn(block.norm1(x))
        if (i, "mlp") not in gone:
            x = x + block.mlp(block.norm2(x)).relu()
    return model.head(x)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("what", "gone"),
    [
        ("blocks.1", {(1, "attn"), (1, "mlp")}),
        ("blocks.2:attn", {(2, "attn")}),
        ("*:mlp", {(i, "mlp") for i in range(5)}),
        (["blocks.0", "blocks.3:mlp"], {(0, "attn"), (0, "mlp"), (3, "mlp")}),
        ("blocks", {(i, k) for i in range(5) for k in ("attn", "mlp")}),
    ],
)
def test_leaves_out_what_is_named(applied, training, what, gone):
    model, x = net(), x_for_net()
    if applied:
        sd.apply(model, p=0.0, example_inputs=x)
    before, keys = run(model, x), keys_of(model)
    model.train(training)
    with sd.skip(model, what, x):
        assert torch.equal(model(x), without(model, gone))
    assert keys_of(model) == keys
    assert torch.equal(run(model, x)[0], before[0])


def test_branches_are_named_by_themselves():
    model = sd.apply(net(), p=0.5, example_inputs=x_for_net()).eval()
    branch = next(b for b in sd.branches(model) if b.name == "blocks.4:mlp")
    with sd.skip(model, branch):
        assert torch.equal(model(x_for_net()), without(model, {(4, "mlp")}))
    assert (branch.decided, branch.dropped) == (0, 0)


def test_they_may_end_in_any_order_as_those_of_generators_do():
    x = x_for_net()
    model = sd.apply(net(), p=0.0, example_inputs=x).eval()
    whole, (first, second, *_) = model(x), sd.branches(model)

    def outs(branch):
        with sd.skip(model, branch), sd.sampling(other):
            while True:
                yield model(x)

    other = sd.apply(net(), p=0.5, example_inputs=x).eval()
    both = [outs(first), outs(second)]
    for out in both:
        next(out)
    both.pop(0).close()
    assert torch.equal(next(both[0]), without(model, {(0, "mlp")}))
    both.pop().close()
    assert torch.equal(model(x), whole)
    assert torch.equal(other(x), other(x))


@pytest.mark.parametrize("given", [True, False])
def test_what_is_skipped_is_not_changed_meanwhile(given):
    x = x_for_net()
    model = sd.apply(net(), p=1.0, example_inputs=x if given else None).train()
    names = [branch.name for branch in sd.branches(model)]
    changes = [
        lambda: sd.remove(model),
        lambda: sd.apply(model, p=0.5, example_inputs=x),
        lambda: sd.prune(model, remove="blocks.2", example_inputs=x),
        lambda: model(x),
    ]
    with sd.skip(model, "blocks.1", x):
        for change in changes[: 3 if given else 4]:
            with pytest.raises(RuntimeError, match=r"which skips something of blocks\.1"):
                change()
    assert [branch.name for branch in sd.branches(model)] == names
    model(x)
    assert not sd.is_applied(sd.remove(model))


def test_inputs_are_guessed():
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 64, 64)
    with sd.skip(model, "layer3.1"), torch.no_grad():
        skipped = model(x)
    model.layer3[1] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(model(x), skipped)


def test_a_block_that_changes_the_shape_keeps_its_projection():
    model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
    with sd.skip(model, "layer2.0", x), torch.no_grad():
        skipped = model(x)
    nn.init.zeros_(model.layer2[0].bn2.weight)
    nn.init.zeros_(model.layer2[0].bn2.bias)
    with torch.no_grad():
        torch.testing.assert_close(model(x), skipped)


def test_others_go_on_dropping_in_training():
    x = x_for_net()
    model = sd.apply(net(), p=0.5, schedule="uniform", seed=3, example_inputs=x).train()
    with sd.skip(model, ["blocks.1", "blocks.2:attn"], x):
        outputs = {tuple(model(x)[0].tolist()) for _ in range(12)}
    counts = {b.name: b.decided for b in sd.branches(model)}
    assert len(outputs) > 3
    assert counts["blocks.1:attn"] == counts["blocks.1:mlp"] == 0
    assert counts["blocks.0:attn"] == counts["blocks.2:mlp"] == 12


def test_the_models_own_drop_path_goes_on():
    torch.manual_seed(0)
    model, x = nn.Sequential(Dropping(), Dropping()).train(), torch.randn(64, 8)
    with sd.skip(model, "0:one", x):
        calls = [(m.drop1.calls, m.drop2.calls) for m in model]
        torch.manual_seed(1)
        out = model(x)
        assert [(m.drop1.calls, m.drop2.calls) for m in model] == [
            (calls[0][0], calls[0][1] + 1),
            (calls[1][0] + 1, calls[1][1] + 1),
        ]
    torch.manual_seed(1)
    first, second = model
    y = x + first.drop2(first.two(x).relu())
    assert torch.equal(out, second(y))


def test_nests_and_leaves_in_any_order():
    model, x = net(), x_for_net()
    whole, keys = model(x), keys_of(model)
    outer, inner = sd.skip(model, "blocks.1:attn", x), sd.skip(model, "blocks.1:mlp", x)
    with outer:
        with inner:
            assert torch.equal(model(x), without(model, {(1, "attn"), (1, "mlp")}))
            with sd.skip(model, "blocks.1", x):
                assert torch.equal(model(x), without(model, {(1, "attn"), (1, "mlp")}))
        assert torch.equal(model(x), without(model, {(1, "attn")}))
    assert torch.equal(model(x), whole)
    assert keys_of(model) == keys


def test_after_an_exception_all_is_as_before():
    model, x = net(), x_for_net()
    whole, keys = model(x), keys_of(model)
    with pytest.raises(KeyError), sd.skip(model, "blocks.1", x):
        raise KeyError
    assert torch.equal(model(x), whole)
    assert keys_of(model) == keys


def test_other_threads_see_the_whole_model():
    model, x = net(), x_for_net()
    whole, keys = model(x), keys_of(model)
    names = ["blocks.0:attn", "blocks.1", "blocks.0:mlp", "blocks.2:mlp"]
    gone = [{(0, "attn")}, {(1, "attn"), (1, "mlp")}, {(0, "mlp")}, {(2, "mlp")}]
    expected = [without(model, g) for g in gone]
    wrong: list[object] = []
    barrier = threading.Barrier(len(names))

    def work(i):
        try:
            with lock:
                manager = sd.skip(model, names[i], x)
                manager.__enter__()
            barrier.wait()
            wrong.extend(i for _ in range(20) if not torch.equal(model(x), expected[i]))
            manager.__exit__(None, None, None)
        except BaseException as error:
            wrong.append(error)

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.equal(model(x), whole)
    assert keys_of(model) == keys


def test_a_wrapper_layer_is_skipped():
    layer = nn.Linear(8, 8)
    model, x = (
        nn.Sequential(nn.Linear(8, 8), sd.StochasticDepth(layer, 0.3)).eval(),
        torch.randn(2, 8),
    )
    with sd.skip(model, "1"):
        assert torch.equal(model(x), model[0](x))
    with sd.skip(model.train(), sd.branches(model)[0]):
        assert torch.equal(model(x), model[0](x))
    assert sd.branches(model)[0].decided == 0


def test_a_post_norm_block_goes_with_its_norms():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3).eval(), torch.randn(2, 4, 8)
    with sd.skip(model, "layers.1", x):
        skipped = model(x)
    assert torch.equal(skipped, model.layers[2](model.layers[0](x)))


def test_gradients_do_not_reach_what_is_skipped():
    model, x = net().train(), x_for_net()
    with sd.skip(model, "blocks.2:mlp", x):
        model(x).sum().backward()
    without_gradient = {n for n, p in model.named_parameters() if p.grad is None}
    assert without_gradient == {
        f"blocks.2.{n}" for n in ("norm2.weight", "norm2.bias", "mlp.weight", "mlp.bias")
    }


class Repeating(nn.Module):
    """Its blocks are checkpointed, two at a time."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.net, self.use_reentrant = net(), use_reentrant

    def forward(self, x):
        blocks, x = self.net.blocks, self.net.stem(x)
        for i in range(0, len(blocks), 2):
            x = checkpoint(nn.Sequential(*blocks[i : i + 2]), x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("verb", ["skip", "sampling"])
def test_reentrant_checkpointing_which_would_not_repeat_it_is_an_error(verb, applied):
    outs, x = [], x_for_net()
    for use_reentrant in (False, True):
        model = Repeating(use_reentrant).eval()
        if applied or verb == "sampling":
            sd.apply(model, 0.9, example_inputs=x)
        torch.manual_seed(0)
        with sd.skip(model, "net.blocks.3", x) if verb == "skip" else sd.sampling(model):
            with torch.no_grad():
                outs.append(model(x))
            if use_reentrant:
                with pytest.raises(RuntimeError, match="would be wrong; use checkpoint"):
                    model(x)
            else:
                out = model(x)
        if not use_reentrant:
            out.sum().backward()
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ("blocks.9", ValueError, "'blocks.9' is no branch or block"),
        ("blocks.1:nothing", ValueError, "is no branch or block"),
        ([], ValueError, "empty list"),
        (3, TypeError, "names, globs or Branches"),
        ([3], TypeError, "names, globs or Branches"),
    ],
)
def test_bad_names_are_refused(what, error, match):
    model = net()
    with pytest.raises(error, match=match), sd.skip(model, what, x_for_net()):
        pass
    assert keys_of(model) == keys_of(net())


def test_a_model_that_cannot_be_run_asks_for_inputs():
    class Odd(nn.Module):
        def forward(self, a, b, *, c):
            return a

    with pytest.raises(ValueError, match="pass example_inputs"), sd.skip(Odd(), "x"):
        pass
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"), sd.skip("model", "x"):
        pass


def test_a_block_of_which_something_has_to_stay_is_not_left_out_in_part():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.one, self.two = (nn.Linear(a, b) for a, b in ((4, 8), (8, 8), (8, 8)))

        def forward(self, x):
            x = self.wide(x)
            y = self.one(x)
            x = x + y
            x = x + self.two(x)
            return x, y

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Odd()])

        def forward(self, x):
            x, y = self.blocks[0](x)
            return x * y

    model, x = Uses().eval(), torch.randn(2, 4)
    said = r"not all of 'blocks\.0' can be left out: name its branches"
    with pytest.raises(ValueError, match=said), sd.skip(model, "blocks.0", x):
        pass
    with sd.skip(model, "blocks.0:two", x):
        one = model.blocks[0].wide(x)
        y = model.blocks[0].one(one)
        assert torch.equal(model(x), (one + y) * y)
