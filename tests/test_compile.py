"""Compiled graphs: one graph, no recompiles, the same model as in eager mode."""

import copy
import pickle

import numpy
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import stochastic_depth as sd
from combinations import in_pairs

STEPS = 40
# dynamo looks at .grad of what it is given, which warns for activations
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        out += x
        return self.relu(out)


SHAPES = {Mlp: (8, 4), Conv: (8, 4, 5, 5)}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(block: type[nn.Module], depth: int = 2) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(*[block() for _ in range(depth)])
    return model, torch.randn(SHAPES[block], requires_grad=True)


def compiled(model: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("blocks", [None, "all"])
def test_a_single_sample_is_not_counted_twice_in_the_statistics_of_a_graph(blocks):
    model, x = build(Conv)
    plain = copy.deepcopy(model)
    sd.apply(model, p=0.3, mode="subset", blocks=blocks, example_inputs=x)
    fast, _ = compiled(model)
    torch.testing.assert_close(fast(x[:1]), plain(x[:1]))
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("block", [Mlp, Conv])
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_whole_model_is_one_graph_over_many_steps(block, mode):
    model, x = build(block)
    sd.apply(model, p=0.5, schedule="uniform", mode=mode, example_inputs=x)
    fast, counter = compiled(model)
    outputs = set()
    for _ in range(STEPS):
        output = fast(x)
        output.sum().backward()
        outputs.add(round(output.sum().item(), 4))
    assert counter.frame_count == 1
    assert len(outputs) > 2  # the decisions were not frozen when the graph was made


class Flat(nn.Module):
    """A model that is one block, with all branches in its own forward."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            if self.breaks:
                torch._dynamo.graph_break()
        return x


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_a_model_that_is_one_block_is_one_graph(mode, given):
    model, x = Flat(), torch.randn(8, 4, requires_grad=True)
    sd.apply(model, 0.5, mode=mode, schedule="uniform", example_inputs=x if given else None)
    fast, counter = compiled(model)
    outs = []
    for _ in range(10):
        outs.append(fast(x))
        outs[-1].sum().backward()
    assert counter.frame_count == 1
    assert len({tuple(out.flatten().tolist()) for out in outs}) > 2


@pytest.mark.filterwarnings("ignore:.*recompile_limit")
def test_a_model_that_is_one_block_and_breaks_drops_as_in_eager_mode():
    model, x = Flat(breaks=True), torch.randn(8, 4)
    sd.apply(model, 0.5, schedule="uniform", example_inputs=x)
    eager = copy.deepcopy(model)
    fast = torch.compile(model, backend="eager")
    for step in range(6):
        outs = []
        for m in (fast, eager):
            torch.manual_seed(step)
            outs.append(m(x))
        torch.testing.assert_close(*outs)
    assert [b.dropped for b in sd.branches(model)] == [b.dropped for b in sd.branches(eager)]


@pytest.mark.parametrize("block", [Mlp, Conv])
def test_outcomes_of_compiled_batch_mode_are_those_of_the_paths(block):
    model, x = build(block, depth=1)
    model[0].eval() if block is Conv else None
    with torch.no_grad():
        full = copy.deepcopy(model)(x)
    sd.apply(model, p=0.5, schedule="uniform", scale="none", example_inputs=x)
    fast, _ = compiled(model)
    model.train()
    if block is Conv:
        model[0].norm.eval()  # running statistics, so that kept means the plain output
    dropped = torch.relu(x) if block is Conv else x
    seen = {"kept": 0, "dropped": 0}
    for _ in range(40):  # all alike with probability 2^-39
        output = fast(x)
        kept = torch.allclose(output, full, atol=1e-6)  # float32 fused in another order
        assert kept != torch.allclose(output, dropped, atol=1e-6)
        seen["kept" if kept else "dropped"] += 1
    assert min(seen.values()) > 0


def test_dropped_branch_leaves_batch_norm_alone_in_a_compiled_graph():
    model, x = build(Conv, depth=1)
    sd.apply(model, p=0.5, schedule="uniform", example_inputs=x)
    fast, _ = compiled(model)
    counts, dropped = [], 0
    for _ in range(40):
        before = model[0].norm.num_batches_tracked.item()
        output = fast(x)
        counted = model[0].norm.num_batches_tracked.item() - before
        assert counted == (0 if torch.equal(output, torch.relu(x)) else 1)
        counts.append(counted)
        dropped += 1 - counted
    assert 0 < dropped < 40


def test_subset_computes_fewer_rows_in_a_compiled_graph():
    model, x = build(Mlp, depth=1)
    sd.apply(model, p=0.75, schedule="uniform", mode="subset", example_inputs=x)
    fast, _ = compiled(model)
    for _ in range(5):
        changed = (fast(x) != x).any(dim=1)
        assert changed.sum() == 2


@pytest.mark.parametrize(
    ("block", "order", "blocks"), in_pairs([Mlp, Conv], ["before", "after"], [None, "all"])
)
def test_blocks_compiled_one_by_one_really_skip_and_equal_eager_with_the_same_decisions(
    block, order, blocks
):
    model, x = build(block, depth=4)
    options = {"p": 0.5, "blocks": blocks, "example_inputs": x}
    eager = sd.apply(copy.deepcopy(model), **options)
    counter = CompileCounterWithBackend("aot_eager")
    if order == "after":
        sd.apply(model, **options)
    for child in model:
        child.compile(backend=counter, fullgraph=True)
    if order == "before":
        sd.apply(model, **options)
    for step in range(20):
        torch.manual_seed(step)
        ours = model(x)
        torch.manual_seed(step)
        torch.testing.assert_close(ours, eager(x))
        ours.sum().backward()
    assert counter.frame_count <= 8  # kept and dropped of each block
    drops = [[branch.dropped for branch in sd.branches(m)] for m in (model, eager)]
    assert drops[0] == drops[1]
    assert sum(drops[0]) > 0
    for branch in sd.branches(model):
        branch.p = 1.0
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())  # nothing was computed of them


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo's own
@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_zero_gradients_of_dropped_branches_are_in_the_graphs(by_block, p):
    """As they are in a process group, whatever is asked for."""
    model, x = build(Mlp, depth=4)
    options = {"p": p, "dropped_grad": "zero", "schedule": "uniform", "example_inputs": x}
    eager = sd.apply(copy.deepcopy(model), **options)
    sd.apply(model, **options)
    counter = CompileCounterWithBackend("aot_eager")
    call = model if by_block else torch.compile(model, backend=counter, fullgraph=True)
    for block in model if by_block else ():
        block.compile(backend=counter, fullgraph=True)
    for step in range(6):
        batch = torch.randn(8, 4, requires_grad=True)
        outcomes = []
        for ours in (call, eager) if by_block or p == 1.0 else (call,):
            torch.manual_seed(step)
            outcomes.append(ours(batch))
            outcomes[-1].sum().backward()
        torch.testing.assert_close(outcomes[0], outcomes[-1])
    assert counter.frame_count <= (3 if by_block else 1)  # and none for a block alone
    if by_block or p == 1.0:
        grads = [[p.grad for p in m.parameters()] for m in (model, eager)]
        torch.testing.assert_close(*grads)


def test_a_wrapper_that_is_compiled_really_skips():
    torch.manual_seed(1)
    # torch compiles no call of its own modules
    model, x = sd.StochasticDepth(Mlp(), p=0.5, projection=Mlp()), torch.randn(3, 4)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    outcomes = []
    for step in range(10):
        for m in (model, eager):
            torch.manual_seed(step)
            outcomes.append(m(x))
        torch.testing.assert_close(*outcomes[-2:])
    assert counter.frame_count == 1  # of the module and the projection, which are alike
    assert 0 < model.branch.dropped == eager.branch.dropped < 10


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_the_blocks_of_a_copy_really_skip(clone):
    model, x = build(Mlp, depth=3)
    sd.apply(model, p=0.5, example_inputs=x)
    copied = clone(model)
    for child in copied:
        child.compile(backend="eager")
    for step in range(10):
        torch.manual_seed(step)
        ours = copied(x)
        torch.manual_seed(step)
        torch.testing.assert_close(ours, model(x))
    drops = [[branch.dropped for branch in sd.branches(m)] for m in (model, copied)]
    assert drops[0] == drops[1]
    assert sum(drops[0]) > 0


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
def test_blocks_that_are_alike_share_their_graphs_however_many_there_are(mode):
    model, x = build(Mlp, depth=12)
    sd.apply(model, p=0.5, schedule="uniform", mode=mode, example_inputs=x)
    counter = CompileCounterWithBackend("eager")
    for child in model:
        child.compile(backend=counter)
    rates = sd.RateSchedule(model, lambda t: 1.0 - t / 20)
    for _ in range(20):
        model(x).sum().backward()
        rates.step()
    # Dropped, kept at another weight, kept at 1, and numbers of samples; all of them twice, since
    # the first block's input has no gradient.
    assert counter.frame_count <= {"batch": 6, "row": 4, "subset": 10}[mode]


class ByFunction(Mlp):
    def __init__(self, mode: str, scale: str) -> None:
        super().__init__()
        self.p, self.options = 0.0, {"mode": mode, "scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        branch = lambda y: self.linear(self.norm(y))  # noqa: E731 - as users write it
        return sd.residual(x, branch, p=self.p, training=self.training, **self.options)


# In evaluation, where scale="eval" weighs, no mode chooses anything.
@pytest.mark.parametrize(
    ("mode", "scale"),
    [("batch", "train"), ("row", "train"), ("subset", "train"), ("batch", "eval")],
)
@pytest.mark.parametrize("form", ["applied", "whole", "wrapper", "function"])
def test_both_ends_of_p_are_exact_in_graphs_that_were_made_for_other_rates(form, mode, scale):
    options = {"mode": mode, "scale": scale}
    if form == "function":
        model = nn.Sequential(ByFunction(mode, scale))
    elif form == "wrapper":
        model = nn.Sequential(sd.StochasticDepth(Mlp(), p=0.5, **options))
    else:
        blocks = "all" if form == "whole" else None
        model = nn.Sequential(Mlp())
        sd.apply(model, 0.5, blocks=blocks, example_inputs=torch.randn(4, 4), **options)
    x = torch.randn(6, 4)
    norm, linear = (
        next(m for m in model.modules() if type(m) is t) for t in (nn.LayerNorm, nn.Linear)
    )
    full = x + linear(norm(x))
    fast = torch.compile(model, backend="eager", fullgraph=True)
    (dial,) = [model[0]] if form == "function" else sd.branches(model)
    for p in (0.5, 0.4, 0.3, 1.0, 0.2, 0.0, 1.0):
        dial.p = p
        out = fast(x)
        if p in (0.0, 1.0):
            torch.testing.assert_close(out, full if p == 0.0 else x)
    if scale == "eval":
        model.eval()
        for p in (0.25, 1.0, 0.5, 0.0):
            dial.p = p
            torch.testing.assert_close(fast(x), x + (1.0 - p) * (full - x))


class Broken(nn.Module):
    """A block whose graph breaks at one place."""

    def __init__(self, place: str) -> None:
        super().__init__()
        inner = [nn.Linear(4, 4), Break(), nn.Tanh()] if place == "in a child" else [nn.Tanh()]
        self.first, self.second = nn.Sequential(*inner), nn.Linear(4, 4)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        self.reach("before the branch")
        h = self.first(x)
        self.reach("in the branch")
        h = self.second(h)
        self.reach("before the sum")
        y = x + h
        self.reach("after the sum")
        return y

    def reach(self, place: str) -> None:
        if place == self.place:
            torch._dynamo.graph_break()


class Break(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


PLACES = ["before the branch", "in the branch", "before the sum", "after the sum", "in a child"]


def compiled_in_parts(model: nn.Module, way: str) -> tuple[nn.Module, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    if way == "whole":
        return torch.compile(model, backend=counter), counter
    for child in model:
        child.compile(backend=counter)
    return model, counter


@pytest.mark.parametrize(
    ("place", "way", "blocks"), in_pairs(PLACES, ["whole", "by block"], [None, "all"])
)
def test_where_a_graph_breaks_in_a_block_decisions_are_those_of_eager_mode(place, way, blocks):
    model, x = nn.Sequential(*[Broken(place) for _ in range(3)]), torch.randn(8, 4)
    options = {"p": 0.5, "schedule": "uniform", "blocks": blocks, "example_inputs": x}
    eager = sd.apply(copy.deepcopy(model), **options)
    fast, counter = compiled_in_parts(sd.apply(model, **options), way)
    rates = [sd.RateSchedule(m, lambda t: 1.0 - t / 40) for m in (model, eager)]
    for step in range(20):
        x = x.clone().requires_grad_()
        outcomes = []
        for m in (fast, eager):
            torch.manual_seed(step)
            out = m(x)
            (given,) = torch.autograd.grad(out.square().sum(), x)
            outcomes.append((out, given))
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs)
        for schedule in rates:
            schedule.step()
    drops = [[branch.dropped for branch in sd.branches(m)] for m in (model, eager)]
    assert drops[0] == drops[1]
    assert sum(drops[0]) > 0
    # A block has up to three graphs, each for an input with and without a gradient, and each once
    # more for a branch that is dropped; more where the block runs whatever was decided.
    assert counter.frame_count <= 20


@pytest.mark.parametrize(
    ("place", "way", "mode"), in_pairs(PLACES, ["whole", "by block"], ["row", "subset"])
)
def test_where_a_graph_breaks_in_a_block_samples_are_dropped_and_weighed(place, way, mode):
    model, x = nn.Sequential(Broken(place)), torch.randn(8, 4)
    branch = model(x).detach() - x
    sd.apply(model, p=0.5, mode=mode, example_inputs=x)
    fast, _ = compiled_in_parts(model, way)
    numbers = set()
    for _ in range(10):
        moved = fast(x) - x
        kept = (moved != 0).any(1)
        torch.testing.assert_close(moved, 2.0 * branch * kept[:, None], atol=1e-6, rtol=1e-5)
        numbers.add(int(kept.sum()))
    assert numbers == {4} if mode == "subset" else len(numbers) > 1


@pytest.mark.parametrize(
    "options", [{"seed": 0}, {"ranks": "shared"}, {"draw": "balanced"}], ids=str
)
def test_private_generator_is_refused_in_a_compiled_graph(options):
    model, x = build(Mlp)
    fast, _ = compiled(sd.apply(model, p=0.5, example_inputs=x, **options))
    with pytest.raises(Exception, match="cannot be used inside"):
        fast(x)


@pytest.mark.parametrize("way", ["whole", "by block"])
@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("options", [{"seed": 0}, {"ranks": "shared"}], ids=str)
def test_samples_in_compiled_blocks_are_not_drawn_by_the_graph_where_they_have_a_seed(
    mode, way, options
):
    model, x = build(Mlp)
    sd.apply(model, p=0.5, mode=mode, example_inputs=x, **options)
    fast, _ = compiled_in_parts(model, way)
    with pytest.raises(RuntimeError, match="nor for samples in compiled blocks"):
        fast(x)


def test_copy_of_an_applied_model_compiles():
    model, x = build(Mlp)
    fast, counter = compiled(copy.deepcopy(sd.apply(model, p=0.5, mode="subset", example_inputs=x)))
    fast(x)
    assert counter.frame_count == 1


class Keyword(Mlp):
    def forward(self, x: Tensor, mask: Tensor | None, scales: tuple[float, ...] = ()) -> Tensor:
        return super().forward(x) + len(scales)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Keyword()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(mask=None, x=x, scales=(1.0, 2.0))


def test_blocks_called_with_keywords_and_nested_arguments_compile():
    x = torch.randn(8, 4)
    model = sd.apply(Keywords(), p=1.0, example_inputs=x)
    fast, counter = compiled(model)
    assert torch.equal(fast(x), x + 2)
    assert counter.frame_count == 1


class Transposed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x)).t().contiguous().t() + x


def test_a_branch_in_another_layout_than_its_shortcut_compiles():
    x = torch.randn(8, 4, requires_grad=True)
    model = sd.apply(nn.Sequential(Transposed()), p=0.5, schedule="uniform", example_inputs=x)
    fast, counter = compiled(model)
    for _ in range(10):
        fast(x).sum().backward()
    assert counter.frame_count == 1


class Depthwise(nn.Module):
    """A ConvNeXt's block: its input is seen channels-last, its weights are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_convolutions_compile_whatever_the_layout_of_their_gradients():
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    net = nn.Sequential(Depthwise(), Depthwise())
    model = sd.apply(net, p=0.5, schedule="uniform", example_inputs=x)
    fast, counter = compiled(model)
    outputs = set()
    for _ in range(20):
        output = fast(x)
        output.sum().backward()
        outputs.add(round(output.square().sum().item(), 3))
    assert counter.frame_count == 1
    assert len(outputs) > 2


class InPlace(nn.Module):
    """Adds its branch to the memory that something else reads, too."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.linear(x.roll(1, -1))
        if self.way == "another name":
            z = x
            z += y
            return x + z
        if self.way == "view":
            x.view(-1, 4).add_(y.view(-1, 4))
        else:
            x.add_(y)
        return x


@pytest.mark.filterwarnings("ignore:samples are taken to be as many neighbouring rows")
@pytest.mark.parametrize(
    ("way", "by_block", "mode"),
    in_pairs(["statement", "another name", "view"], [False, True], ["batch", "row", "subset"]),
)
def test_a_sum_in_place_is_in_place_in_a_graph(way: str, by_block: bool, mode: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), InPlace(way)), torch.randn(6, 8)
    ours = sd.apply(copy.deepcopy(model), 1e-12, mode=mode, example_inputs=x)
    if by_block:
        ours[1].compile(backend="eager", fullgraph=True)
    else:
        ours.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(ours(x), model(x))
    ours(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(ours[1].linear.weight.grad, model[1].linear.weight.grad)


@pytest.mark.parametrize("blocks", [None, "all"])
def test_the_size_of_the_batch_may_change_in_a_graph_of_subset_mode(blocks: str | None) -> None:
    model, x = build(Mlp)
    sd.apply(model, 0.5, mode="subset", blocks=blocks, example_inputs=x)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for size in (6, 6, 4, 5):
        assert run(torch.randn(size, *x.shape[1:])).shape[0] == size


@pytest.mark.parametrize("strict", [False, True])
def test_exported_applied_model_is_the_plain_one(strict):
    model, x = build(Conv)
    model.eval()
    expected = model(x)
    sd.apply(model, p=0.5, example_inputs=x)
    exported = torch.export.export(model, (x.detach(),), strict=strict).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter itself
@pytest.mark.parametrize("block", [Mlp, Conv])
def test_exported_to_onnx_an_applied_model_is_the_plain_one(block):
    model, x = build(block)
    x = x.detach()
    model.eval()
    with torch.no_grad():
        model(x)
        expected = model(x).numpy()
    sd.apply(model, p=0.5, example_inputs=x).eval()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    graph = program.model_proto
    (result,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    numpy.testing.assert_allclose(result, expected, atol=1e-6)  # another order of float32 sums


@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("dropped_grad", ["none", "zero"])
def test_func_grad_in_training_is_what_autograd_computes(mode, dropped_grad):
    model, x = build(Mlp, depth=4)
    options = {"mode": mode, "dropped_grad": dropped_grad}
    sd.apply(model, p=0.5, schedule="uniform", example_inputs=x, **options)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, x).square().sum()

    for seed in range(5):
        torch.manual_seed(seed)
        expected = torch.autograd.grad(
            loss(parameters), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        torch.manual_seed(seed)
        gradients = torch.func.grad(loss)(parameters)
        torch.testing.assert_close(list(gradients.values()), list(expected))


def test_vmap_in_training_needs_a_choice_and_different_decisions_are_refused():
    model, x = build(Mlp)
    sd.apply(model, p=0.5, schedule="uniform", example_inputs=x)
    with pytest.raises(RuntimeError, match="random operation"):
        torch.vmap(model)(x)
    with pytest.raises(RuntimeError, match=r"item\(\)|data pointer"):  # it is read as a number
        torch.vmap(model, randomness="different")(x)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(torch.vmap(model, randomness="same")(x), expected)


def test_vmap_and_functional_call_in_evaluation():
    model, x = build(Mlp)
    sd.apply(model, p=0.5, example_inputs=x).eval()
    expected = torch.stack([model(row) for row in x])
    torch.testing.assert_close(torch.vmap(model)(x), expected)
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, state, x), x)


class Two(nn.Module):
    """Two branches, whose graphs are told apart by what is dropped."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)


def whole(model):
    return torch.compile(model, backend="eager")


def by_blocks(model):
    for block in model:
        block.compile(backend="eager")
    return model


def drops_by_hand(model, x, one, two):
    for block in model:
        x = x if one else x + block.one(x)
        x = x if two else x + block.two(x)
    return x


@pytest.mark.parametrize("compile_it", [whole, by_blocks])
def test_models_of_one_class_do_not_lend_each_other_their_graphs(compile_it):
    torch.manual_seed(0)
    plain, x = nn.Sequential(Two(), Two()), torch.randn(4, 8)
    run_plain = compile_it(copy.deepcopy(plain))
    torch.testing.assert_close(run_plain(x), plain(x))
    runs = {}
    for one, two in ((True, False), (False, True), (True, True)):
        chosen = [name for name, drop in (("*:one", one), ("*:two", two)) if drop]
        model = copy.deepcopy(plain)
        sd.apply(model, 1.0, schedule="uniform", include=chosen, example_inputs=x)
        runs[one, two] = compile_it(model)
        torch.testing.assert_close(runs[one, two](x), drops_by_hand(plain, x, one, two))
    for _ in range(2):  # each again, after all the others
        for drops, run in runs.items():
            torch.testing.assert_close(run(x), drops_by_hand(plain, x, *drops))
        torch.testing.assert_close(run_plain(x), plain(x))


@pytest.mark.parametrize("compile_it", [whole, by_blocks])
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "first batch"])
@pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")
def test_a_model_that_ran_compiled_before_drops_as_soon_as_it_is_applied(compile_it, given):
    torch.manual_seed(0)
    model, x = nn.Sequential(Two(), Two()), torch.randn(4, 8)
    plain = copy.deepcopy(model)
    run = compile_it(model)
    run(x)
    sd.apply(model, 1.0, schedule="uniform", example_inputs=x if given else None)
    assert torch.equal(run(x), x)
    model.eval()
    torch.testing.assert_close(run(x), plain(x))
    model.train()
    assert torch.equal(run(x), x)
    sd.remove(model)
    torch.testing.assert_close(run(x), plain(x))
    with sd.skip(model, "*:one", example_inputs=x):
        torch.testing.assert_close(run(x), drops_by_hand(plain, x, True, False))
    torch.testing.assert_close(run(x), plain(x))


class Within(Mlp):
    """Plain, but for a function in it that is compiled."""

    def __init__(self, part: str) -> None:
        super().__init__()
        wrap = torch.compile(backend="eager")
        self.act = wrap(torch.tanh) if part == "activation" else torch.tanh
        self.add = wrap(torch.add) if part == "sum" else torch.add
        self.whole = wrap(self.compute) if part == "forward" else self.compute

    def compute(self, x: Tensor) -> Tensor:
        return self.add(x, self.act(self.linear(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)


@pytest.mark.parametrize("part", ["activation", "sum", "forward"])
def test_a_function_that_is_compiled_inside_of_a_forward_meets_the_branch(part):
    model, x = Within(part), torch.randn(6, 4)
    full = model(x).detach()
    sd.apply(model, 0.5, example_inputs=x)
    (branch,) = sd.branches(model)
    for step in range(8):
        torch.manual_seed(step)
        dropped = branch.dropped
        out = model(x)
        expected = x if branch.dropped > dropped else x + 2 * (full - x)
        torch.testing.assert_close(out, expected)
    assert 0 < branch.dropped < 8


class Spelled(nn.Module):
    """One branch, written in one of several ways between its last module and its sum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm, self.out = way, nn.LayerNorm(4), nn.Linear(4, 4)
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.way == "scores":  # as many keys as channels: swapped operands fit, too
            return x + self.out((self.q(h) @ self.k(h).mT).softmax(-1) @ h)
        y = self.out(h)
        match self.way:
            case "matmul":
                return x + y @ self.weight
            case "bias":
                return x + (y + self.bias)
            case "minus a buffer":
                return x + (y - self.mean)
            case "alpha":
                return x + torch.add(y, self.mean, alpha=2)
            case "rsub":
                return x + torch.rsub(y, self.mean)
        return torch.stack([x, y.tanh()]).sum(0)


@pytest.mark.parametrize(
    ("way", "mode", "by_block"),
    in_pairs(
        ["scores", "matmul", "bias", "minus a buffer", "alpha", "rsub"],
        ["batch", "row"],
        [False, True],
    ),
)
def test_what_comes_before_the_sum_is_computed_as_in_eager_mode(way, mode, by_block):
    model, x = nn.Sequential(Spelled(way)).double(), torch.randn(6, 4, 4, dtype=torch.float64)
    change = model(x) - x
    samples = None if mode == "batch" else 0
    sd.apply(model, p=0.5, schedule="uniform", mode=mode, samples=samples, example_inputs=x)
    if by_block:
        model[0].compile(backend="eager")
    fast = model if by_block else torch.compile(model, backend="eager")
    kept = set()
    for _ in range(12):
        for ours, whole in zip(fast(x) - x, change, strict=True):
            is_kept = bool(ours.any())
            torch.testing.assert_close(ours, 2 * whole * is_kept, rtol=1e-12, atol=1e-14)
            kept.add(is_kept)
    assert kept == {False, True}


def test_what_a_graph_cannot_tell_is_an_error():
    x = torch.randn(6, 4, 4)
    for way, message in {"matmul": "write torch.matmul", "join": "write x \\+ y"}.items():
        model = sd.apply(nn.Sequential(Spelled(way)), p=0.5, example_inputs=x)
        with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=message):
            torch.compile(model, backend="eager", fullgraph=True)(x)
