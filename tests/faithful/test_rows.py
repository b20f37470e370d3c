"""In row mode a row is a sample; empty batches and mixed precision are as in the plain model."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochastic_depth as sd

from .twins import assert_equal_outcomes, assert_weighed, data, net, outcome, twins

ALL_MODES = ["batch", "row", "subset"]


def count_rows(module: nn.Module, dim: int = 0) -> list[int]:
    rows: list[int] = []
    module.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[dim]))
    return rows


class OwnAttention(nn.Module):
    """Mixes the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.einsum("sbd,tbd->bst", x, x).softmax(-1)
        return torch.einsum("bst,tbd->sbd", weights, self.v(x))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = OwnAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class TimeFirstModel(nn.Module):
    """Takes batch first, and computes time first."""

    def __init__(self, block: type[nn.Module] = TimeFirst) -> None:
        super().__init__()
        self.block = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(0, 1)).transpose(0, 1)


class Transposing(nn.Module):
    """A batch-first block around a time-first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lstm(x.transpose(0, 1))[0].transpose(0, 1)


class Frames(nn.Module):
    """Folds three frames of each sample into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PerToken()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.flatten(0, 1)).view_as(x)


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Windows(nn.Module):
    """Attention in windows that are folded into the batch, and taken apart by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 4)
        mixed = self.inner(windows.flip(1)).tanh() * windows.mean(1, keepdim=True)
        rows = int(mixed.shape[0] / (x.shape[1] / 2))
        return x + mixed.view(rows, -1, 4)


class TimeMajorFold(nn.Module):
    """All samples' first frames, then all second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.block = PerToken()

    def forward(self, x: Tensor) -> Tensor:
        folded = x.transpose(0, 1).flatten(0, 1)
        return self.block(folded).view(x.shape[1], len(x), -1).transpose(0, 1)


APART = {
    "time first": TimeFirstModel,
    "batch first around time first": Transposing,
    "LSTM": Recurrent,
    "frames": Frames,
    "windows": Windows,
    "frames, time major": TimeMajorFold,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # masked, said once
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("model", APART)
def test_a_sample_is_dropped_as_a_whole(model: str, given: bool) -> None:
    x = data(7, 6, 4)
    ours, plain = twins(net(APART[model]), x, mode="row", p=0.5, given=given)
    if not given:
        ours(x)
    assert_weighed(ours, plain, x)
    assert_weighed(ours, plain, data(3, 6, 4), steps=20)


@pytest.mark.parametrize(
    "model", ["time first", "batch first around time first", "frames", "windows"]
)
def test_a_dropped_sample_is_not_computed(model: str) -> None:
    x = data(7, 6, 4)
    told = (
        pytest.warns(UserWarning, match="neighbouring rows") if model == "frames" else nullcontext()
    )
    with told:  # of a number that only the example tells
        ours, _ = twins(net(APART[model]), x, mode="row", p=0.5)
    (name,) = sd.branches(ours)[0].modules
    dim = {"time first": 1, "batch first around time first": 1}.get(model, 0)
    rows, each = (
        count_rows(ours.get_submodule(name), dim),
        {"frames": 6, "windows": 3}.get(model, 1),
    )
    for _ in range(8):
        ours(x)
    (branch,) = sd.branches(ours)
    assert sum(rows) == each * (branch.decided - branch.dropped)
    assert 0 < branch.dropped < branch.decided == 56


class Activated(nn.Module):
    """Applies functions between its calls, and a layer scale after them."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.gate = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.f(x)) * self.gate(x).sigmoid()
        y = self.g(nn.functional.gelu(y, approximate="tanh"))
        return x + self.scale * nn.functional.silu(y, inplace=True) / 2


class Shapes(TorchDispatchMode):
    """Notes how many rows the functions of an activated block are given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = next((x for x in args if isinstance(x, Tensor)), None)
        if first is not None and first.dim() > 1:
            self.rows.setdefault(func.overloadpacket.__name__, []).append(len(first))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_functions_of_each_element_are_given_the_kept_samples(mode: str) -> None:
    x = data(7, 4)
    ours, plain = twins(net(Activated), x, mode=mode, p=0.5)
    (branch,) = sd.branches(ours)
    for _ in range(8):
        dropped = branch.dropped
        with Shapes() as shapes:
            ours(x)
        kept = 7 - (branch.dropped - dropped)
        for name in ("relu", "sigmoid", "gelu", "silu_"):
            assert shapes.rows[name] == [kept]
    if mode == "row":
        assert_weighed(ours, plain, x)


class Mean(PerToken):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) - self.f(x.mean(0, keepdim=True)))


class Largest(PerToken):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + y / y.abs().max()


class Shift(PerToken):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(torch.cat([x[1:], x[:1]]))


class Normed(PerToken):
    """Statistics of the batch, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + (y - y.mean(0)) / (y.std(0, correction=0) + 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # masked, said once
@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("kind", [Mean, Largest, Shift, Normed])
def test_where_samples_mix_each_is_computed_from_all_and_masked(
    kind: type[nn.Module], mode: str
) -> None:
    ours, plain = twins(net(kind), data(), mode=mode, p=0.5)
    assert_weighed(ours, plain, data())


@pytest.mark.parametrize("kind", [Mean, Largest, Shift])
def test_that_samples_mix_is_said_once(kind: type[nn.Module]) -> None:
    model = nn.Sequential(net(kind), net(kind), net(kind))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sd.apply(model, 0.5, mode="row", example_inputs=data())
        for _ in range(4):
            model(data())
    assert len(said) == 1


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def convolve(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.f(x)
        return torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore::UserWarning")  # masked, said once
@pytest.mark.parametrize("mode", ["row", "subset"])
def test_nodes_of_a_graph_are_computed_from_all_their_neighbours(mode: str) -> None:
    class Conv(Graph):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return self.convolve(x, edges)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Conv()

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return x + self.conv(x, edges)

    edges = torch.stack([torch.arange(16) % 12, torch.arange(16) * 5 % 12])
    ours, plain = twins(net(Residual), data(12, 4), edges, mode=mode, p=0.5)
    x = data(12, 4, seed=3)
    for step in range(8):
        torch.manual_seed(step)
        added = (ours(x, edges) - x).detach()
        full = 2 * (plain(x, edges) - x).detach()
        # Nodes without an edge get nothing at all; all others all or nothing.
        right = (added - full).abs().amax(1) < 1e-10
        nothing = added.abs().amax(1) == 0
        assert (right | nothing).all()
    assert sd.branches(ours)[0].dropped > 0


class Biased(nn.Module):
    """Hands its bias on, as attention does with that of its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return self.f(x) * bias, bias


class BiasedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Biased()

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        y, bias = self.attention(x, bias)
        return x + y, bias


class TwoBiased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BiasedBlock(), BiasedBlock()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle, bias = self.first(x, x.square())
        return middle, *self.second(middle, bias)


@pytest.mark.parametrize("size", [2, 7])  # one sample of two would be broadcast over both
@pytest.mark.parametrize("blocks", [None, BiasedBlock])
def test_what_a_call_hands_on_has_all_samples(blocks: type[nn.Module] | None, size: int) -> None:
    x = data(size, 4)
    ours, plain = twins(net(TwoBiased), x, mode="row", p=0.5, blocks=blocks)
    first, second = sd.branches(ours)
    weights: dict[nn.Module, Tensor] = {}
    for block in (plain.first, plain.second):
        block.attention.register_forward_hook(lambda m, _, out: (out[0] * weights[m], out[1]))
    for step in range(8):
        mine = outcome(ours, x, seed=step)
        middle, last = mine["result 0"], mine["result 1"]
        weights[plain.first.attention] = 2.0 * (x != middle).any(1, keepdim=True)
        weights[plain.second.attention] = 2.0 * (middle != last).any(1, keepdim=True)
        mine.pop("next random numbers")
        theirs = outcome(plain, x, seed=step)
        theirs.pop("next random numbers")
        assert_equal_outcomes(mine, theirs)
    for branch in (first, second):
        assert branch.place is not None
        assert 0 < branch.dropped < branch.decided == 8 * size


def test_a_number_beside_the_batch_does_not_keep_samples_from_being_selected() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
            assert num_items_in_batch is None or num_items_in_batch.dim() == 0
            return x + self.f(x)

    ours, plain = twins(net(Counted), data(), mode="row", p=0.5)  # and warnings are errors
    ours(data(), torch.tensor(24))  # a form of call that has not been seen is watched first
    (branch,) = sd.branches(ours)
    rows, before = count_rows(ours.f), branch.decided - branch.dropped
    assert_weighed(ours, plain, data(), torch.tensor(24))
    assert 0 < sum(rows) == branch.decided - branch.dropped - before < 72


# --- empty batches


@pytest.mark.filterwarnings("ignore:.*samples cannot be selected:UserWarning")
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("given", [True, False])
def test_an_empty_batch_stays_empty(mode: str, p: float, given: bool) -> None:
    ours, plain = twins(net(Transposing), data(5, 6, 4), mode=mode, p=p, given=given)
    module = sd.StochasticDepth(nn.Linear(4, 4).double(), p, mode=mode)
    for _ in range(4):
        x = data(0, 6, 4).requires_grad_()
        results = [
            ours(x * 1),
            sd.residual(x * 1, plain.attention.out_proj, p=p, mode=mode),
            module(x * 1),
        ]
        for result in results:
            assert result.shape == (0, 6, 4)
            result.sum().backward()
        assert x.grad.shape == x.shape


# --- the dtype under autocast


class Mixed(nn.Module):
    """A float32 shortcut and a branch that autocast computes in bfloat16, or the reverse."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x + (h if self.gamma is None else self.gamma * h)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_dtype_of_the_output_does_not_depend_on_the_decision(
    mode: str, scaled: bool, first: torch.dtype
) -> None:
    x = torch.randn(4, 4).to(first)
    plain = Mixed(scaled)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x).dtype
    for given in (True, False):
        for p in (1e-30, 0.5, 1.0):
            with torch.autocast("cpu", torch.bfloat16):
                model, _ = twins(Mixed(scaled), x, mode=mode, p=p, given=given)
                dtypes = {model(x).dtype for _ in range(8)}
            assert dtypes == {expected}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"mode": "row", "samples": 1}, {"blocks": Mixed, "scale": "eval"}]
)
def test_a_first_step_under_autocast_leaves_ordinary_tensors(
    options: dict[str, Any], given: bool
) -> None:
    model = nn.Sequential(Mixed(True), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0))
    twins(model, torch.randn(4, 3, 4), p=0.1, given=given, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(4, 3, 4))
            loss = output.square().mean()
        assert type(output) is Tensor
        assert loss.item() > 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kinds = {type(s["momentum_buffer"]) for s in optimizer.state.values()}
    kinds |= {type(p.grad) for p in model.parameters() if p.grad is not None}
    assert kinds == {Tensor}


class Broadcast(nn.Module):
    """A branch that is broadcast into its shortcut, or has a dimension less."""

    def __init__(self, dim: int, keepdim: bool, in_place: bool = False) -> None:
        super().__init__()
        self.f, self.dim, self.keepdim, self.in_place = nn.Linear(4, 4), dim, keepdim, in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x.mean(self.dim, keepdim=self.keepdim))
        if self.in_place:
            y = x.clone()
            y += h
            return y
        return x + h


@pytest.mark.filterwarnings("ignore:.*samples:UserWarning")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("dim", "keepdim", "samples"),
    [(1, True, 0), (0, False, 1), (0, True, 1), (0, True, 0), (0, False, 0)],
)
def test_a_branch_may_be_broadcast(dim: int, keepdim: bool, samples: int, in_place: bool) -> None:
    x = data(6, 5, 4)
    ours, plain = twins(
        net(Broadcast, dim, keepdim, in_place), x, p=0.5, mode="row", samples=samples
    )
    assert_weighed(ours, plain, x, dim=samples)


class GivenFirst(nn.Module):
    """The first tensor of the call may be one for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scored()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.inner(bias, x)


class Scored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, bias: Tensor, x: Tensor) -> Tensor:
        return self.f(x) + bias


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_each_sample_is_decided_where_the_first_tensor_is_one_for_all(mode: str) -> None:
    ours, plain = twins(net(GivenFirst), data(), data(seed=2), p=0.5, mode=mode)
    rows = count_rows(ours.inner.f)
    if mode == "row":
        assert_weighed(ours, plain, data(), data(1, 4, seed=2))
        assert len(set(rows)) > 2
    else:
        for _ in range(4):
            ours(data(), data(1, 4, seed=2))
        (branch,) = sd.branches(ours)
        assert (branch.decided, branch.dropped) == (24, 12)


class Spiking(nn.Module):
    """Keeps something of each sample until the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.potential: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.potential = 0.5 * self.potential + x
        return torch.sigmoid(self.potential)


class Neurons(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.spikes = nn.Linear(4, 4), Spiking()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.spikes(self.f(x))


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_what_a_module_keeps_of_a_sample_meets_no_other(mode: str) -> None:
    model = net(Neurons)
    with pytest.warns(UserWarning, match="spikes keeps a value of the samples"):
        sd.apply(model, 0.5, mode=mode, schedule="uniform", example_inputs=data())
    expected: Tensor | float = 0.0
    for step in range(6):
        x = data(seed=step)
        model(x)
        expected = 0.5 * expected + model.f(x)
        torch.testing.assert_close(model.spikes.potential, expected)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_given_twice_is_given_twice(whole: bool, mode: str) -> None:
    options = {"blocks": "0.attention"} if whole else {}
    model = nn.Sequential(net(SelfAttention))
    sd.apply(model, 0.5, mode=mode, schedule="uniform", example_inputs=data(6, 3, 4), **options)
    seen: list[tuple[bool, int]] = []
    model[0].attention.in_proj_weight.requires_grad_(False)
    model[0].attention.forward = recording(model[0].attention.forward, seen)
    for _ in range(6):
        model(data(6, 3, 4))
    assert all(same for same, _ in seen)
    assert min(size for _, size in seen) < 6


def recording(forward: Any, seen: list[tuple[bool, int]]) -> Any:
    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        seen.append((q is k is v, len(q)))
        return forward(q, k, v, **options)

    return record


class Shown(nn.Module):
    """Keeps its weights for somebody to look at, and never reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.weights = self.f(x).softmax(-1)
        return x * self.weights


class Showing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shown = Shown()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shown(x)


def test_what_a_module_only_shows_is_no_reason_to_compute_all_samples() -> None:
    ours, plain = twins(net(Showing), data(), p=0.5, mode="row")
    rows = count_rows(ours.shown.f)
    assert_weighed(ours, plain, data())
    assert min(rows) < 6


class Logged(nn.Module):
    """Looks at a value of its branch without gradients."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.f, self.context = nn.Linear(4, 4), context

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        with self.context():
            y.abs().mean()
        return x + y


@pytest.mark.parametrize("mode", ["row", "subset"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_a_forward_looks_at_without_gradients_keeps_its_own(context: Any, mode: str) -> None:
    ours, plain = twins(net(Logged, context), data(), p=0.5, mode=mode)
    assert_weighed(ours, plain, data())


class Late(nn.Module):
    """Has lengths that are no argument of its own, and not from the first batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.lengths = Cut(), None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, self.lengths)


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        y = self.f(x)
        if lengths is None:
            return y
        at = torch.arange(y.shape[1])[:, None]
        return torch.stack([a.where(at < n, 0.0) for a, n in zip(y, lengths)])  # noqa: B905


@pytest.mark.parametrize("mode", ["row", "subset"])
def test_samples_keep_their_own_entries_of_what_was_none(mode: str) -> None:
    ours, plain = twins(net(Late), data(6, 5, 4), p=0.5, mode=mode)
    ours.lengths = plain.lengths = torch.tensor([1, 5, 2, 4, 3, 1])
    assert_weighed(ours, plain, data(6, 5, 4))
