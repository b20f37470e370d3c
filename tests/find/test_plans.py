"""What every call of a block has to do with its branches."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from find import small
from find.small import WIDTH
from stochastic_depth._torch import tree_leaves
from stochastic_depth.find import find, form_of, run_weighed
from stochastic_depth.find.plan import Findings, Leaf, Plan


def look(model: nn.Module, *args, **kwargs) -> Findings:
    torch.manual_seed(0)
    return find(model, args or (torch.randn(3, WIDTH),), kwargs, samples=None)


def only_plan(found: Findings, block: str = "") -> Plan:
    (plan,) = found.plans[block].values()
    return plan


def test_names_are_those_of_the_block_and_of_its_largest_module() -> None:
    found = look(nn.Sequential(small.Block(), small.Block()))
    assert [b.name for b in found.branches] == ["0:f", "1:f"]
    assert [b.name for b in look(small.Block()).branches] == [":f"]


def test_the_block_is_around_all_calls_and_their_sum() -> None:
    plan = only_plan(look(small.HandedDown()))
    assert set(plan.gates) == {"inner", "middle.output.f"}
    assert plan.opened == {"middle", "middle.output"}
    assert [plan.gates[name][0].last for name in plan.gates] == [False, True]


def test_frames_that_overlap_are_one() -> None:
    plan = only_plan(look(small.Carried()))
    assert len(plan.branches) == 3
    assert plan.opened == {"layers.0", "layers.1", "layers.2"}


def test_a_module_outside_of_the_block_widens_it() -> None:
    assert list(look(small.Lambdas()).plans) == [""]


def test_calls_of_a_gate_that_are_no_branchs_are_counted() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.f = nn.ReLU(), small.linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x + self.f(self.act(x)))

    gates = only_plan(look(Twice())).gates["act"]
    assert [g.branch for g in gates] == [0, None]


def test_a_dropout_in_evaluation_is_a_gate_and_the_last() -> None:
    class Dropping(small.Block):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.dropout(self.f(x))

    plan = only_plan(look(Dropping()))
    assert {name: gates[0].last for name, gates in plan.gates.items()} == {
        "f": False, "dropout": True,
    }  # fmt: skip


def test_what_a_gate_returns_is_known_by_leaf() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = small.linear()

        def forward(self, x: Tensor, mask: Tensor) -> tuple:
            y = self.f(x)
            return y, {"mask": mask, "weights": y.softmax(-1), "none": None, "n": len(x)}

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x + self.attention(x, mask=mask)[0]) * mask

    found = look(Layer(), torch.randn(3, WIDTH), torch.ones(3, WIDTH))
    (gate,) = only_plan(found).gates["attention"]
    kinds = ["branch", "argument", "unread", "none", "value"]
    assert [leaf.kind for leaf in gate.returned] == kinds
    assert gate.returned[1] == Leaf("argument", 1)
    assert sorted(tree_leaves(gate.structure)) == [0, 1, 2, 3, 4]


def test_what_leaves_the_block_and_nobody_reads_is_dead() -> None:
    class Telling(small.Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = self.f(x)
            return x + y, y

    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Telling(), small.linear()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x)[0])

    assert only_plan(look(Deaf()), "block").dead == {1}


def test_a_block_that_is_called_again_has_one_plan() -> None:
    found = look(small.Shared())
    assert [b.name for b in found.branches] == ["block:f"]
    assert len(found.merges[found.branches[0]]) == 3


def test_calls_of_a_block_that_differ_are_told_apart_by_the_frame_around_them() -> None:
    found = look(small.SharedAlternating())
    assert [b.modules for b in found.branches] == [("block.f",), ("block.f", "block.g")]
    plan = only_plan(found)
    assert plan.opened == {"block"}
    assert [g.branch for g in plan.gates["block.f"]] == [0, 1]


def test_each_form_of_call_has_its_plan() -> None:
    class Optional(small.Block):
        def forward(self, x: Tensor, double: bool = False) -> Tensor:  # type: ignore[override]
            y = self.f(x)
            return x + (self.f(y) if double else y)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Optional()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x), double=True)

    found = look(Both())
    x = torch.zeros(1, 1)
    assert set(found.plans["block"]) == {form_of((x,), {}), form_of((x,), {"double": True})}


def test_parameters_that_a_forward_reads_for_its_branch() -> None:
    (branch,) = look(small.Functional()).branches
    assert (branch.name, branch.modules, branch.parameters) == (":branch", (), ("w", "b"))


def test_a_custom_function_after_the_last_call_is_told() -> None:
    for function in (small.Reverse, small.Handed):
        model = small.Spelled(lambda x, y, f=function: x + f.apply(y))
        assert look(model).branches[0].in_function
    assert not look(small.Block()).branches[0].in_function


def test_whether_a_weight_may_come_in_early() -> None:
    assert look(small.Spelled(lambda x, y: x + 2 * y.transpose(0, 1).t())).branches[0].linear
    for bent in (torch.sigmoid, lambda y: torch.ones(WIDTH) / y, lambda y: y / -y):
        assert not look(small.Spelled(lambda x, y, f=bent: x + f(y))).branches[0].linear
    (branch,) = look(small.Spelled(lambda x, y: x + (y + x.mean()))).branches
    assert (branch.linear, branch.turn) == (False, 1)


def refusal(model: nn.Module) -> str:
    found = look(model)
    assert found.branches == []
    (refused,) = found.refused
    return refused.reason


@pytest.mark.parametrize("look_at", [Tensor.item, Tensor.tolist, lambda t: t.view(1).tolist()[0]])
def test_a_value_that_python_looks_at_is_refused(look_at: Callable[[Tensor], float]) -> None:
    def spelling(x: Tensor, y: Tensor) -> Tensor:
        return x + (y * 2 if look_at(y.mean()) > 0 else y)

    assert "looks at a value of it in Python" in refusal(small.Spelled(spelling))


def test_a_write_into_a_tensor_of_others_is_refused() -> None:
    def spelling(x: Tensor, y: Tensor) -> Tensor:
        into = torch.zeros_like(x)
        into[:, :4] = y[:, :4]
        return x + into

    assert "written into a tensor that is not its own" in refusal(small.Spelled(spelling))


def scaled_gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) * 1.5


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and in many models
    scripted = torch.jit.script(scaled_gelu)


class Between(small.Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(scripted(self.norm(x)))


@pytest.mark.parametrize(
    "model",
    [Between(), small.Spelled(lambda x, y: x + scripted(y))],
    ids=["between its calls", "after them"],
)
def test_what_a_scripted_function_computes_of_a_branch_is_refused(model: nn.Module) -> None:
    assert refusal(model).startswith("a part of it is computed outside of torch")


def test_modules_that_are_not_registered_are_refused() -> None:
    hidden = [small.linear()]
    model = small.Spelled(lambda x, y: x + hidden[0](x))
    assert "not registered" in refusal(model)


def test_an_object_that_cannot_be_taken_apart_is_refused_with_the_module() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Boxing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = small.linear()

        def forward(self, x: Tensor) -> Box:
            return Box(self.f(x))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxing = Boxing()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.boxing(x).value

    assert refusal(Layer()).startswith("boxing returns an object")


def test_a_cache_is_named_with_what_to_do() -> None:
    class MyCache:
        def update(self, y: Tensor) -> None:
            self.value = y

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = small.linear()

        def forward(self, x: Tensor, cache: MyCache) -> Tensor:
            y = self.f(x)
            cache.update(y)
            return y

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Caching()

        def forward(self, x: Tensor) -> tuple[Tensor, MyCache]:
            cache = MyCache()
            return x + self.attention(x, cache), cache

    assert "use_cache=False" in refusal(Layer())


class Collecting(nn.Module):
    """Two layers, whose results it puts into a list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = small.linear(), small.linear()

    def forward(self, x: Tensor, results: list[Tensor]) -> Tensor:
        results.append(self.f(x))
        results.append(self.g(results[-1]))
        return results[-1]


def test_a_list_that_the_block_makes_for_a_child_to_fill_is_no_cache() -> None:
    class Aggregating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collect, self.last = Collecting(), nn.Linear(3 * WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            results = [x]
            self.collect(x, results)
            return self.last(torch.cat(results, -1)) + results[0]

    found = look(Aggregating())
    assert [b.modules for b in found.branches] == [("collect", "last")]
    assert found.refused == []


def test_a_list_that_the_block_also_hands_out_is_a_cache() -> None:
    class Handing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collect = Collecting()

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            results: list[Tensor] = []
            return x + self.collect(x, results), results

    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Handing()

        def forward(self, x: Tensor) -> Tensor:
            y, results = self.block(x)
            return y * len(results)

    assert "it is given a list, which it changes" in refusal(Ignoring())


def test_a_branch_that_is_handed_on_in_a_list_is_refused() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.collect = Collecting()

        def forward(self, x: Tensor) -> Tensor:
            results = [x]
            self.collect(x, results)
            return x + results[-1]  # x + x, were it dropped

    assert "handed on in a list or an attribute" in refusal(Reading())


def test_a_branch_that_is_handed_on_in_an_attribute_is_refused() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = small.linear()

        def forward(self, x: Tensor) -> None:
            self.y = self.f(x)

    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keep = Keeping()

        def forward(self, x: Tensor) -> Tensor:
            self.keep(x)
            return x + self.keep.y  # that of the last call, were it dropped

    assert "handed on in a list or an attribute" in refusal(Reading())


def test_leaving_a_sum_out_is_what_its_module_does_that_returns_zeros() -> None:
    model, x = small.Carried(), torch.randn(3, WIDTH)
    found = find(model, (x,), {}, samples=None)
    for i, branch in enumerate(found.branches):
        for weight in (0.0, 2.0):
            got = run_weighed(model, (x,), {}, {branch: weight}, found)
            hook = model.layers[i].f.register_forward_hook(lambda m, a, y, w=weight: y * w)
            assert torch.allclose(got, model(x), atol=1e-6)
            hook.remove()
    assert torch.equal(run_weighed(model, (x,), {}, {}, found), model(x))


def test_weighing_sums_in_any_spelling() -> None:
    x = torch.randn(3, WIDTH)
    for spelling in (
        lambda x, y: torch.stack([x, y]).sum(0),
        lambda x, y: torch.add(x, y, alpha=0.5),
        lambda x, y: y.add_(x),
        lambda x, y: x - y,
        lambda x, y: torch.addcmul(x, y, torch.ones(WIDTH)),
    ):
        model = small.Spelled(spelling)
        found = find(model, (x,), {}, samples=None)
        left_out = run_weighed(model, (x,), {}, {found.branches[0]: 0.0}, found)
        assert torch.equal(left_out, x)
