"""Recording one real run of a model."""

import copy
import random
import threading

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from find.small import WIDTH, Block, Counting, Handed, Lambdas, Spelled
from stochastic_depth.find import find, spot
from stochastic_depth.find.meet import record


def state(model: Counting) -> list:
    return [
        list(model.seen), copy.deepcopy(model.box), model.calls.item(), hasattr(model, "last"),
        model.generator.get_state().tolist(), torch.get_rng_state().tolist(), random.getstate(),
        set(vars(model)),
    ]  # fmt: skip


@pytest.mark.parametrize("fail", [False, True])
def test_everything_is_as_before_also_after_an_exception(fail: bool) -> None:
    model, x = Counting().train(), torch.randn(2, WIDTH)
    before, given = state(model), x.clone()
    try:
        record(model, (x, fail), {})
    except KeyError:
        assert fail
    assert state(model) == before
    assert torch.equal(x, given)
    assert model.training
    assert model.f.training


def test_wrong_inputs_are_told_in_words() -> None:
    with pytest.raises(ValueError, match="example_inputs must be what the model is called with"):
        find(Block(), (torch.randn(2, 3),), {}, samples=None)


def test_a_cache_that_is_given_is_not_written_to() -> None:
    class Cache:
        def __init__(self) -> None:
            self.values: list[Tensor] = []

    class Caching(Block):
        def forward(self, x: Tensor, cache: Cache) -> Tensor:  # type: ignore[override]
            cache.values.append(x)
            return super().forward(x)

    cache = Cache()
    record(Caching(), (torch.randn(2, WIDTH), cache), {})
    assert cache.values == []


def test_other_threads_are_not_recorded() -> None:
    model, x = nn.Sequential(*[Block() for _ in range(20)]), torch.randn(2, WIDTH)
    alone = len(record(model, (x,), {}).nodes)
    stop, errors = threading.Event(), []

    def run() -> None:
        try:
            while not stop.is_set():
                model(x)
        except Exception as error:  # of any kind
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        counts = {len(record(model, (x,), {}).nodes) for _ in range(5)}
    finally:
        stop.set()
        thread.join()
    assert counts == {alone}
    assert not errors
    assert not any("_call_impl" in vars(m) for m in model.modules())


def test_a_sum_in_a_forward_hook_is_a_part_of_its_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output + args[0])
    flow = record(model, (torch.randn(2, WIDTH),), {})
    total = next(n for n in flow.nodes if n.op in ("add", "__add__"))
    assert flow.calls[total.call].name == "0"


def test_what_a_custom_function_hands_out_is_linked_to_what_it_was_given() -> None:
    model = Spelled(lambda x, y: x + Handed.apply(y))
    found = find(model, (torch.randn(2, WIDTH),), {}, samples=None)
    assert [b.modules for b in found.branches] == [("f",)]
    assert found.branches[0].in_function


def test_tensors_that_were_there_before_are_constants() -> None:
    gain = torch.randn(WIDTH)
    found = find(Spelled(lambda x, y: x + y * gain), (torch.randn(2, WIDTH),), {}, samples=None)
    assert [b.modules for b in found.branches] == [("f",)]


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_script_depends_on_all_that_it_is_given() -> None:
    class Scripted(Block):
        def __init__(self) -> None:
            super().__init__()
            self.f = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))

    found = find(Scripted(), (torch.randn(2, WIDTH),), {}, samples=None)
    assert [b.modules for b in found.branches] == [("norm", "f")]


def test_a_compiled_child_is_seen() -> None:
    model = Block()
    model.f.compile(backend="eager")
    found = find(model, (torch.randn(2, WIDTH),), {}, samples=None)
    assert [b.modules for b in found.branches] == [("norm", "f")]


def test_an_expression_has_one_place_for_tensors_and_stand_ins() -> None:
    class StandIn:
        def __add__(self, other: object) -> object:
            return spot(2)

        __radd__ = __iadd__ = __add__

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None) -> object:
            return spot(2)

    class Both(nn.Module):
        def forward(self, x: object, y: object) -> list[object]:
            total = x + y
            called = torch.add(x, y)  # type: ignore[arg-type]
            x += y
            return [total, called, x]

    x = torch.randn(2)
    flow = record(Both(), (x, x.clone()), {})
    recorded = [n.spot for n in flow.nodes if n.spot is not None]
    assert len(recorded) == 3
    assert Both()(x, StandIn()) == recorded
    assert Both()(StandIn(), x)[0] == recorded[0]
    assert len(set(recorded)) == 3


def test_each_sum_of_one_expression_has_its_place() -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x + x

    flow = record(Three(), (torch.randn(2),), {})
    assert len({n.spot for n in flow.nodes if n.spot is not None}) == 2


def test_nothing_stays_with_the_modules() -> None:
    model = Lambdas()
    before = [dict(vars(m)) for m in model.modules()]
    record(model, (torch.randn(2, WIDTH),), {})
    assert [dict(vars(m)) for m in model.modules()] == before


def test_equal_code_of_two_files_is_told_apart() -> None:
    source = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        b = self.linear(x)
        return b.add_(x)
"""
    x = torch.randn(3, 4)
    blocks = []
    for file in ("one", "two"):
        names = {"nn": nn, "__name__": file}
        exec(compile(source, file, "exec"), names)
        blocks.append(names["Block"]())
        for _ in range(100):  # Python specializes the call, which is then another instruction
            blocks[-1](x)
    sd.summary(blocks[0], x)  # meets tensors only
    sd.apply(blocks[1], 1.0, example_inputs=x)  # and this stand-ins, too
    assert torch.equal(blocks[1].train()(x), x)
