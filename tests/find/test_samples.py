"""Where values have the samples, and whether these stay apart."""

import copy

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from find import small
from find.small import WIDTH
from stochastic_depth.branch import Place
from stochastic_depth.find import Samples, find


def places(model: nn.Module, *args: Tensor) -> list[tuple[Place | None, str]]:
    torch.manual_seed(0)
    found = find(model, args, {}, samples=Samples())
    assert found.branches
    return [(b.place, b.reason) for b in found.branches]


class TimeFirst(nn.Module):
    """Attention over the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.f = small.linear(), small.linear()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).transpose(0, 1)
        weights = (q @ q.transpose(1, 2)).softmax(-1)
        return x + self.f((weights @ q).transpose(0, 1))


def test_samples_in_the_first_dimension() -> None:
    assert places(small.Block(), torch.randn(3, WIDTH)) == [(Place(0), "")]
    assert places(small.Block(), torch.randn(1, 4, WIDTH)) == [(Place(0), "")]


def test_time_first() -> None:
    assert places(TimeFirst(), torch.randn(5, 3, WIDTH)) == [(Place(1), "")]
    assert places(TimeFirst(), torch.randn(3, 3, WIDTH)) == [(Place(1), "")]


def test_a_time_first_layer_in_a_batch_first_block() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.LSTM(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x.transpose(0, 1))[0].transpose(0, 1)

    x = torch.randn(3, 5, WIDTH)
    found = find(Recurrent(), (x,), {}, samples=Samples())
    assert found.branches[0].place == Place(0)
    ((gate,),) = next(iter(found.plans[""].values())).gates.values()
    assert gate.given == (Place(1),)
    assert gate.returned[0].place == Place(1)


def test_frames_that_are_folded_into_the_batch_belong_to_a_sample() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = small.Block()

        def forward(self, x: Tensor) -> Tensor:
            n, t, c = x.shape
            return self.block(x.reshape(n * t, c)).view(n, t, c).mean(1)

    assert places(Frames(), torch.randn(3, 5, WIDTH)) == [(Place(0, 5), "")]


def test_copies_that_are_not_next_to_each_other_are_not_selected() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = small.Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x.repeat(4, 1)).view(4, -1, WIDTH).mean(0)

    ((place, reason),) = places(Ensemble(), torch.randn(3, WIDTH))
    assert place is None
    assert "next to each other" in reason


CUTS = {
    "chunk": lambda t: t.chunk(2, 1),
    "split": lambda t: t.split(WIDTH, 1),
    "unbind": lambda t: t.unflatten(1, (2, WIDTH)).unbind(1),
}


@pytest.mark.parametrize("cut", CUTS)
def test_each_part_of_a_split_has_the_samples(cut: str) -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.scales = small.linear(), small.linear(), nn.Linear(4, 2 * WIDTH)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            a, b = CUTS[cut](self.scales(condition))
            x = x + a * self.f(x)
            return x + b * self.g(x)

    assert places(Modulated(), torch.randn(3, WIDTH), torch.randn(3, 4)) == 2 * [(Place(0), "")]


def test_samples_that_mix() -> None:
    model = small.Spelled(lambda x, y: x + y / y.abs().max())
    ((place, reason),) = places(model, torch.randn(3, WIDTH))
    assert place is None
    assert "depend on each other" in reason


def test_nodes_of_a_graph_are_no_samples() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = small.linear()

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return x + self.f(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))

    edges = torch.stack([torch.arange(6), torch.arange(6).roll(-1)])
    ((place, _),) = places(Graph(), torch.randn(6, WIDTH), edges)
    assert place is None


def test_numbers_that_are_drawn_for_each_sample_go_with_it() -> None:
    class Masked(nn.Module):
        """Drops some tokens of each sample at random, as masked autoencoders do."""

        def __init__(self) -> None:
            super().__init__()
            self.block = small.Block()

        def forward(self, x: Tensor) -> Tensor:
            kept = torch.rand(x.shape[0], x.shape[1]).argsort(1)[:, :3]
            return self.block(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])))

    assert places(Masked(), torch.randn(3, 8, WIDTH)) == [(Place(0), "")]


@pytest.mark.parametrize("labels", [[0, 3, 2, 1], [2, 2, 2, 2]])
def test_numbers_of_classes_and_of_steps_belong_to_samples(labels: list[int]) -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes, self.given = nn.Embedding(5, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
            self.f = small.linear()

        def forward(self, x: Tensor, step: Tensor, y: Tensor) -> Tensor:
            c = self.classes(y) + torch.sin(step[:, None] * torch.arange(WIDTH))
            scale, gate = self.given(torch.nn.functional.silu(c)).chunk(2, 1)
            return x + gate * self.f(x * (1 + scale))

    steps = torch.tensor([7, 7, 7, 7]) if len(set(labels)) == 1 else torch.tensor([7, 31, 99, 54])
    x = torch.randn(4, WIDTH)
    found = places(Modulated().double(), x.double(), steps, torch.tensor(labels))
    assert found == [(Place(0), "")]


def test_batch_norm_does_not_count_as_mixing() -> None:
    class Normed(small.Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

    assert places(Normed().train(), torch.randn(3, WIDTH)) == [(Place(0), "")]


def test_arguments_without_dimensions_have_no_samples() -> None:
    class Counted(small.Block):
        def forward(self, x: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.f(x) / count

    assert places(Counted(), torch.randn(3, WIDTH), torch.tensor(7)) == [(Place(0), "")]


def test_several_inputs_with_samples_in_different_dimensions() -> None:
    class Two(small.Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.f(x * y.t())

    assert places(Two(), torch.randn(3, WIDTH), torch.randn(WIDTH, 3)) == [(Place(0), "")]


def test_a_model_that_takes_no_other_number_of_samples_says_so() -> None:
    class Fixed(small.Block):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 3:
                raise ValueError("just 3")
            return super().forward(x)

    ((place, reason),) = places(Fixed(), torch.randn(3, WIDTH))
    assert place is None
    assert "one sample more" in reason
    assert "just 3" in reason


def test_samples_that_are_all_the_same_prove_nothing() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.block = nn.Embedding(9, WIDTH), small.Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.words(x))

    ((place, reason),) = places(Tokens(), torch.zeros(2, 4, dtype=torch.long))
    assert place is None
    assert "alike" in reason


class Frames(nn.Module):
    """Mixes the frames of a video, which are rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), small.linear()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).unflatten(0, (-1, 3))
        return x + (self.f(h) - h.mean(1, keepdim=True)).flatten(0, 1)


@pytest.mark.parametrize("kind", [Frames, small.Block])
def test_rows_that_are_one_sample_are_dropped_together(kind: type[nn.Module]) -> None:
    model, x = nn.Sequential(kind(), nn.ReLU(), kind()), torch.randn(12, WIDTH).abs()
    options = {"schedule": "uniform", "mode": "row", "seed": 0, "scale": "none"}
    sd.apply(model, 0.5, samples=(0, 3), example_inputs=x, **options)
    assert {b.place for b in sd.branches(model)} == {Place(0, 3)}
    first = sd.branches(model)[0]
    sd.branches(model)[1].p = 1.0
    whole = sd.remove(copy.deepcopy(model))[0](x)
    for _ in range(8):
        got = model[0](x).detach()
        kept = (got - whole).abs().unflatten(0, (4, 3)).amax((1, 2)) < 1e-5
        left = (got - x).abs().unflatten(0, (4, 3)).amax((1, 2)) < 1e-5
        assert torch.equal(kept, ~left)
    assert first.decided == 32
    assert 0 < first.dropped < 32


def test_where_samples_are_is_said_in_one_of_two_ways() -> None:
    model, x = Frames(), torch.randn(12, WIDTH)
    for bad in (-1, "0", (0, 0), (0,), 1.0, (0, True)):
        with pytest.raises(ValueError, match="samples must be a dimension"):
            sd.apply(model, 0.5, mode="row", samples=bad, example_inputs=x)
    with pytest.raises(ValueError, match="samples is for mode='row'"):
        sd.apply(model, 0.5, samples=0, example_inputs=x)
    with pytest.warns(UserWarning, match="no tensor of example_inputs has"):
        sd.apply(model, 0.5, mode="row", samples=(0, 5), example_inputs=x)


def test_a_branch_that_the_model_drops_itself_does_not_keep_others_from_selecting() -> None:
    class Dropping(small.Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return x + (y * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else y)

    torch.manual_seed(0)
    model, x = nn.Sequential(small.Block(), Dropping()), torch.randn(6, WIDTH)
    sd.apply(model, 0.5, schedule="uniform", mode="subset", example_inputs=x)
    assert [b.name for b in sd.branches(model)] == ["0:f"]
    computed: list[int] = []
    model[0].f.register_forward_hook(lambda *call: computed.append(len(call[-1])))
    model.train()(x)
    assert computed == [3]
