"""Models whose inputs cannot be guessed: the first training batch settles what is found."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

import stochastic_depth as sd

WIDTH = 8
pytestmark = pytest.mark.filterwarnings("ignore:.*too little of its inputs:UserWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Told(nn.Module):
    """Needs a dict that nobody would think of; ``last`` can be called alone."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, options: dict[str, float]) -> Tensor:
        x = self.first(x) * options["factor"]
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def without_branches(self, x: Tensor, options: dict[str, float]) -> Tensor:
        return self.last(self.first(x) * options["factor"])


@pytest.fixture
def batch() -> tuple[Tensor, dict[str, float]]:
    return torch.randn(4, WIDTH), {"factor": 2.0}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_child_that_can_be_guessed_does_not_stand_for_the_model(batch: Any) -> None:
    model = sd.apply(Told(), p=1.0, schedule="uniform")
    assert sd.branches(model) == []
    assert torch.equal(model(*batch), model.without_branches(*batch))
    assert len(sd.branches(model)) == 3


def test_a_model_that_returns_no_tensor_where_it_is_tried_waits_for_a_batch() -> None:
    class Lists(Told):
        def forward(self, x: Any, options: Any = None) -> Any:
            return super().forward(x, options) if options else [0.0]

    model = sd.apply(Lists(), p=1.0, schedule="uniform")
    batch = torch.randn(4, WIDTH), {"factor": 2.0}
    assert torch.equal(model(*batch), model.without_branches(*batch))


@pytest.mark.parametrize("how", ["function", "method before", "method after"])
def test_a_compiled_model_settles_on_its_first_batch_and_drops_from_it_on(
    how: str, batch: Any
) -> None:
    model, counter = Told(), CompileCounter()
    if how == "method before":
        model.compile(backend=counter)
    sd.apply(model, p=1.0, schedule="uniform")
    if how == "method after":
        model.compile(backend=counter)
    call = torch.compile(model, backend=counter) if how == "function" else model
    for _ in range(3):
        assert torch.equal(call(*batch), model.without_branches(*batch))
    assert len(sd.branches(model)) == 3
    assert counter.frame_count == 1
    sd.remove(model)
    assert not torch.equal(call(*batch), model.without_branches(*batch))
    assert sd.branches(model) == []


def test_a_graph_that_must_be_whole_says_that_it_cannot_settle(batch: Any) -> None:
    model = sd.apply(Told(), p=0.5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Pending"):
        torch.compile(model, backend="eager", fullgraph=True)(*batch)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_a_transform_says_that_it_cannot_settle(transform: Any, batch: Any) -> None:
    x, options = batch
    model = sd.apply(Told(), p=1.0, schedule="uniform")
    transformed = transform(lambda x: model(x, options).sum())
    with pytest.raises(RuntimeError, match=r"first training call.* transform of torch.func"):
        transformed(x)
    model(*batch)
    transformed(x)
    assert [branch.dropped for branch in sd.branches(model)] == [2, 2, 2]


def test_before_the_first_batch_a_model_that_is_one_block_has_its_weights_in_evaluation() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 4)
    settled = sd.apply(copy.deepcopy(model), 0.5, scale="eval", example_inputs=x)
    pending = sd.apply(copy.deepcopy(model), 0.5, scale="eval")
    assert not torch.allclose(settled(x), model(x))
    assert torch.equal(pending(x), settled(x))


class Parts(nn.Module):
    """What can be told of its inputs is that of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.a = nn.Sequential(Block(), Block())
        self.b = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.first(x)))


def told(model: nn.Module) -> list[tuple[str, float, str]]:
    return [(branch.name, branch.p, branch.mode) for branch in sd.branches(model)]


def test_what_was_removed_before_the_first_batch_stays_removed() -> None:
    model = sd.apply(Parts(), 0.5)
    sd.remove(model.a)
    before = told(model)
    assert [name for name, *_ in before] == ["b.0:linear", "b.1:linear"]
    model(torch.randn(4, WIDTH))
    assert told(model) == before


@pytest.mark.parametrize("given", [True, False])
def test_what_was_applied_to_a_part_before_the_first_batch_stays(given: bool) -> None:
    x = torch.randn(4, WIDTH)
    model = sd.apply(Parts(), 0.5, seed=0)
    sd.apply(model.a, 0.9, exclude="0", mode="row", seed=1, example_inputs=x if given else None)
    before = told(model)
    assert before[0] == ("1:linear", 0.9, "row")
    model(x)
    assert told(model) == before
    for _ in range(8):
        model(x)
    assert [branch.decided for branch in sd.branches(model)] == [36, 9, 9]


def test_a_block_that_was_replaced_before_the_first_batch_is_found() -> None:
    model = sd.apply(Parts(), 0.5)
    before = told(model)
    model.a[0] = Block()
    model(torch.randn(4, WIDTH))
    assert told(model) == before


def test_the_factor_of_a_schedule_holds_from_the_first_batch_on(batch: Any) -> None:
    model = sd.apply(Told(), 0.9, schedule="uniform")
    schedule = sd.RateSchedule(model, "late", steps=2)
    model(*batch)
    assert [(branch.p, branch.target) for branch in sd.branches(model)] == [(0.0, 0.9)] * 3
    schedule.step()
    schedule.step()
    assert [branch.p for branch in sd.branches(model)] == [0.9] * 3


def test_each_branch_keeps_the_share_that_its_schedule_has_given_it() -> None:
    model = sd.apply(Parts(), 0.4, schedule="uniform")
    early, late = sd.RateSchedule(model.a, "early", 4), sd.RateSchedule(model.b, "late", 4)
    before = [branch.p for branch in sd.branches(model)]
    model(torch.randn(4, WIDTH))
    assert [branch.p for branch in sd.branches(model)] == before
    assert before == [early.factor * 0.4] * 2 + [late.factor * 0.4] * 2 == [0.4, 0.4, 0.0, 0.0]


@pytest.mark.parametrize("argument", ["include", "exclude", "blocks"])
def test_patterns_that_can_be_read_once_hold_after_the_first_batch(argument: str) -> None:
    names = ["0.0", "1.0"] if argument == "blocks" else ["0", "1"]
    plain = nn.Sequential(*[nn.Sequential(Block()) for _ in range(4)])
    model = sd.apply(plain, 0.5, **{argument: (name for name in names)})
    before = told(model)
    assert len(before) == 2
    model(torch.randn(4, WIDTH))
    assert told(model) == before


class Rivals(nn.Module):
    """Two networks that are called by themselves, in any order."""

    def __init__(self, judges: bool = True) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block())
        self.judge = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[Block() for _ in range(2 * judges)])

    def forward(self, *_: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("order", [("maker", "judge"), ("judge", "maker")])
@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"p": 0.4}, [0.1, 0.2, 0.3, 0.4]),
        ({"p": None, "schedule": [0.4, 0.1, 0.3, 0.2]}, [0.4, 0.1, 0.3, 0.2]),
        ({"p": 0.2, "include": "maker"}, [0.1, 0.2]),
        ({"p": 0.2, "exclude": "maker"}, [0.1, 0.2]),
    ],
)
def test_networks_that_are_called_by_themselves_share_one_depth(
    options: dict[str, Any], rates: list[float], order: tuple[str, str]
) -> None:
    model = sd.apply(Rivals(), **options)
    before = sd.branches(model)
    for name in order:
        getattr(model, name)(torch.randn(4, WIDTH))
    assert sd.branches(model) == before
    assert [branch.order for branch in before] == list(range(len(rates)))
    assert [branch.p for branch in before] == pytest.approx(rates)


def test_one_of_them_may_have_no_branches() -> None:
    model = sd.apply(Rivals(judges=False), 1.0)
    for part in (model.judge, model.maker):
        part(torch.randn(4, WIDTH))
    assert [branch.dropped for branch in sd.branches(model)] == [1, 1]


class Unknown(Told):
    def forward(self, x: Tensor, options: dict[str, float]) -> Tensor:
        return super().forward(x, options) * options["scale"]


class UnknownRivals(nn.Module):
    """Two networks whose inputs nobody would think of."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = Unknown(2), Unknown(2)

    def forward(self, *_: Any) -> Tensor:
        raise NotImplementedError


def test_a_list_of_rates_may_be_that_of_each_network() -> None:
    model = sd.apply(UnknownRivals(), None, schedule=[0.1, 0.2])
    for part in (model.judge, model.maker):
        part(torch.randn(4, WIDTH), {"factor": 2.0, "scale": 1.0})
    assert [branch.p for branch in sd.branches(model)] == [0.1, 0.2, 0.1, 0.2]


class Keeps(Block):
    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.dim() == 3:
            self.kept = y
        return x + y


class Leaves(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.dim() == 3 else super().forward(x)


@pytest.mark.parametrize(
    ("last", "reason"),
    [(Keeps, "kept in an attribute"), (Leaves, "not in the first training batch's run")],
)
def test_what_the_first_batch_does_not_have_is_told(last: type[nn.Module], reason: str) -> None:
    model = sd.apply(nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), last()), 1.0)
    assert [branch.name for branch in sd.branches(model)] == ["1:linear", "2:linear"]
    with pytest.warns(UserWarning, match=rf"(?s)1 of them .* 2:linear: .*{reason}"):
        model(torch.randn(2, 3, WIDTH))
    assert [branch.name for branch in sd.branches(model)] == ["1:linear"]
    assert reason in dict(sd.summary(model).refused)["2:linear"]


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_that_keeps_attention_from_being_dropped_is_told(given: bool) -> None:
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=9,
    )
    model, batch = LlamaForCausalLM(config), {"input_ids": torch.arange(8).view(2, 4)}
    if given:
        with pytest.warns(UserWarning, match=r"(?s)write into .*use_cache=False"):
            sd.apply(model, 0.5, example_inputs=batch)
    else:  # one was found in what was made up
        assert len(sd.branches(sd.apply(model, 0.5))) == 2
        with pytest.warns(UserWarning, match=r"(?s)write into .*use_cache=False"):
            model.train()(**batch)
    assert len(sd.branches(model)) == 1
