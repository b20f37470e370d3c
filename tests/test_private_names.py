"""Each private name of torch that the library stands on is there and means what it meant."""

import ast
import copy
import inspect
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import replicate
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from ranks import launch
from stochastic_depth import _torch
from stochastic_depth.drop.instruction import is_applied


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


# --- where calls of modules are met


def test_what_stands_on_an_instance_meets_its_calls_and_goes_without_a_trace() -> None:
    net, x = Net(), torch.ones(2, 3)
    expected = net(x)
    net.linear.__dict__[_torch.CALL] = lambda x: x + 1
    assert torch.equal(net(x), x + 1)
    assert torch.equal(net.linear.forward(x), expected)  # which is no call
    del net.linear.__dict__[_torch.CALL]
    assert torch.equal(net(x), expected)


def test_the_call_of_the_class_is_hooks_and_forward() -> None:
    net, x, seen = Net(), torch.ones(2, 3), []
    expected = net(x)
    net.__dict__[_torch.CALL] = None  # is not asked
    net.register_forward_pre_hook(lambda module, args: seen.append("before"))
    net.register_forward_hook(lambda module, args, out: seen.append("after"))
    assert torch.equal(Net._call_impl(net, x=x), expected)  # type: ignore[no-untyped-call]
    assert torch.equal(Net._call_impl(net, x), expected)  # type: ignore[no-untyped-call]
    assert seen == ["after", "before", "after"] or seen == ["before", "after"] * 2


LAZY = """
import sys, torch, stochastic_depth as sd
from torch import nn

class Block(nn.Module):
    def __init__(self, late):
        super().__init__()
        self.linear, self.late = nn.Linear(4, 4), late

    def forward(self, x):
        run = torch.compile(self.linear, backend="eager") if self.late else self.linear
        return x + run(x)

model, x = nn.Sequential(Block(False), Block(False)), torch.randn(2, 4)
sd.apply(model, 1.0, mode="row", example_inputs=x)
sd.remove(model)
print("torch._dynamo" in sys.modules)
model.append(Block(True))
sd.apply(model, 1.0, mode="row", example_inputs=x)
print("torch._dynamo" in sys.modules, [b.modules for b in sd.branches(model)])
"""


def test_the_compiler_is_loaded_where_something_is_compiled_and_by_nobody_else() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    found = [(f"{i}.linear",) for i in range(3)]
    assert done.stdout.splitlines() == ["False", f"True {found}"]


def test_compile_puts_what_it_made_of_the_instances_call_before_it() -> None:
    torch._dynamo.reset()
    net, x, graphs = Net(), torch.ones(2, 3), []
    expected = net(x)
    met: list[int] = []

    def call(x: Tensor) -> Tensor:
        met.append(1)
        return Net._call_impl(net, x)  # type: ignore[no-untyped-call,no-any-return]

    net.__dict__[_torch.CALL] = call
    assert net.__dict__.get(_torch.COMPILED_CALL) is None
    net.compile(backend=lambda graph, _: graphs.append(graph) or graph)
    made = net.__dict__[_torch.COMPILED_CALL]
    assert torch.equal(net(x), expected)
    assert len(graphs) == len(met) == 1
    net.__dict__[_torch.COMPILED_CALL] = lambda x: x + 1
    assert torch.equal(net(x), x + 1)  # it is what a call meets first
    net.__dict__[_torch.COMPILED_CALL] = made
    assert torch.equal(net(x), expected)


def test_copies_and_pickles_leave_out_what_was_compiled() -> None:
    net = Net()
    net.compile(backend="eager")
    assert copy.deepcopy(net).__dict__.get(_torch.COMPILED_CALL) is None


def test_data_parallel_copies_a_module_by_a_method_of_the_instance() -> None:
    assert f"module.{_torch.REPLICATE}()" in inspect.getsource(replicate)
    net = Net()
    net.note = [1]
    replica = _torch.class_replicate(net)
    assert type(replica) is Net
    assert replica is not net
    assert replica.__dict__["note"] is net.note  # ``__dict__`` and all
    net.__dict__[_torch.REPLICATE] = lambda: "ours"
    assert net._replicate_for_data_parallel() == "ours"


# --- where a forward runs


def test_a_backward_pass_has_a_number_and_nothing_else_has() -> None:
    seen: list[int] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(_torch.graph_task())
        return x.sin()

    for reentrant in (True, False):
        seen.clear()
        x = torch.ones(2, requires_grad=True)
        out = checkpoint(forward, x, use_reentrant=reentrant)
        assert seen == [-1]
        out.sum().backward()
        assert seen[1] >= 0
        assert _torch.graph_task() == -1


def test_hooks_on_what_autograd_saves_are_seen_and_are_those_of_checkpointing() -> None:
    assert _torch.saved_tensors_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert _torch.saved_tensors_hooks() is not None
        outer = _torch.saved_tensors_hooks()
        assert _torch.saved_tensors_hooks() == outer
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            assert _torch.saved_tensors_hooks() != outer
    seen: list[Any] = []

    def forward(x: Tensor) -> Tensor:
        seen.append(_torch.saved_tensors_hooks())
        return x.sin()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert seen[0] is not None
    assert _torch.saved_tensors_hooks() is None


def asked(by: Callable[[FrameType], bool]) -> tuple[Any, list[bool]]:
    """Something that notes what ``by`` says of the frame that asks for its class."""
    seen: list[bool] = []

    class Other:
        @property  # type: ignore[misc]
        def __class__(self) -> type:
            seen.append(by(sys._getframe(1)))
            return Other

    return Other, seen


def test_the_arguments_of_a_module_with_a_full_backward_hook_are_looked_through() -> None:
    other, seen = asked(_torch.is_given_to_hook)
    module = nn.Identity()
    module.register_full_backward_hook(lambda *_: None)
    with suppress(UserWarning):  # that it returns no tensor
        module(other())
    assert any(seen)
    seen.clear()
    assert not isinstance(other(), Tensor)
    assert seen == [False]


def test_hooks_of_all_modules_are_known() -> None:
    before = nn.modules.module.register_module_forward_pre_hook(hook := lambda *_: None)
    after = nn.modules.module.register_module_forward_hook(other := lambda *_: None)
    assert _torch.global_hooks() == [hook, other]
    before.remove()
    after.remove()
    assert _torch.global_hooks() == []


def test_what_parametrize_caches_is_not_used_for_a_while() -> None:
    linear = parametrizations.weight_norm(nn.Linear(3, 3))
    with parametrize.cached():
        with _torch.without_parametrize_cache():
            assert linear.weight is not linear.weight
        assert linear.weight is linear.weight
    assert linear.weight is not linear.weight


def test_the_arguments_of_a_custom_function_are_looked_through() -> None:
    Other, seen = asked(is_applied)  # torch 2.13 asks from its own apply, 2.14 from where it is

    class One(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Tensor:
            return torch.ones(1)

    One.apply(Other())
    assert any(seen)
    seen.clear()
    assert not isinstance(Other(), Tensor)
    assert seen == [False]


def test_autocast_is_seen() -> None:
    assert not _torch.is_any_autocast_on()
    with torch.autocast("cpu", torch.bfloat16):
        assert _torch.is_any_autocast_on()
        with torch.autocast("cpu", enabled=False):
            assert not _torch.is_any_autocast_on()
    assert not _torch.is_any_autocast_on()


def test_transforms_forward_mode_and_compiling_are_told_from_ordinary_autograd() -> None:
    torch._dynamo.reset()
    x, seen = torch.ones(2), []

    def forward(x: Tensor) -> Tensor:
        seen.append(_torch.is_transformed())
        return x.sin().sum()

    forward(x.requires_grad_())
    assert seen.pop() is False
    x = x.detach()
    for transform in (torch.func.grad(forward), torch.vmap(forward)):
        transform(x)
        assert seen.pop() is True
    with torch.autograd.forward_ad.dual_level():
        assert _torch.is_transformed()
    assert not _torch.is_transformed()
    compiled = torch.compile(lambda x: x + _torch.is_transformed(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + 1)


# --- FSDP1


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.filterwarnings("ignore:FSDP is switching to use")  # one rank has nothing to shard
def test_fsdp1_marks_its_flat_parameters_and_their_views(original: bool) -> None:
    plain = Net()
    assert not any(map(_torch.is_flat_parameter, plain.parameters()))
    assert not _torch.is_view_of_flat_parameter(plain.linear.weight)
    assert not _torch.is_view_of_flat_parameter(None)
    model = FullyShardedDataParallel(plain, use_orig_params=original, device_id=torch.device("cpu"))
    assert any(map(_torch.is_flat_parameter, model.parameters()))
    seen: list[bool] = []
    plain.linear.register_forward_pre_hook(
        lambda module, args: seen.append(_torch.is_view_of_flat_parameter(module.weight))
    )
    model(torch.ones(2, 3)).sum().backward()
    assert seen == [True]


def test_the_hooks_on_a_gradient_are_seen() -> None:
    for name in ("register_hook", "register_post_accumulate_grad_hook"):
        weight = Net().linear.weight
        assert not _torch.has_gradient_hooks(weight)
        handle = getattr(weight, name)(lambda x: None)
        assert _torch.has_gradient_hooks(weight)
        handle.remove()
        assert not _torch.has_gradient_hooks(weight)


# --- structures


def test_structures_are_taken_apart_and_put_together() -> None:
    value = {"a": (torch.ones(1), 2), "b": [None, torch.zeros(1)]}
    leaves, structure = _torch.tree_flatten(value)
    assert leaves == _torch.tree_leaves(value)
    assert leaves[1:3] == [2, None]  # None is a leaf
    again = _torch.tree_unflatten(leaves, structure)
    assert again == value
    assert _torch.tree_flatten(again)[1] == structure
    assert hash(structure) == hash(_torch.tree_flatten(again)[1])
    doubled = _torch.tree_map(lambda x: x, value)
    assert doubled == value
    assert _torch.tree_map_only(int, lambda x: x + 1, value)["a"][1] == 3


# --- what graphs leave to Python


def test_what_is_outside_of_graphs_breaks_them_and_runs_as_ever() -> None:
    torch._dynamo.reset()
    ran: list[bool] = []

    @_torch.outside_graphs
    def outside(x: Tensor) -> Tensor:
        ran.append(torch.compiler.is_compiling())
        return x + 1

    def call(x: Tensor) -> Tensor:
        return outside(x * 2) * 3

    assert torch.equal(torch.compile(call, backend="eager")(torch.ones(2)), torch.full((2,), 9.0))
    assert ran == [False]


def test_a_package_that_starts_no_graph_is_traced_as_a_part_of_one_and_runs_as_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = """
def plus_one(x):
    return x + 1

class Class:
    def method(self, x, breaks):
        if not torch.compiler.is_compiling():
            ran.append(around())
        if breaks:
            torch._dynamo.graph_break()
        return plus_one(x)
"""
    ran: list[bool] = []

    def graphs(package: str, breaks: bool) -> int:
        torch._dynamo.reset()
        method, counter = sys.modules[package].Class().method, CompileCounter()
        function = torch.compile(lambda x: method(x * 2, breaks) * 3, backend=counter)
        assert torch.equal(function(torch.ones(2)), torch.full((2,), 9.0))
        return counter.frame_count

    for package in ("marked", "unmarked"):
        module = types.ModuleType(package)
        module.__dict__.update(torch=torch, ran=ran, around=_torch.is_compiled_around)
        exec(compile(source, f"{package}.py", "exec"), module.__dict__)
        monkeypatch.setitem(sys.modules, package, module)
    _torch.start_no_graph("marked")
    assert graphs("unmarked", breaks=False) == graphs("marked", breaks=False) == 1
    assert graphs("unmarked", breaks=True) == 3  # before the break, in the method, after it
    ran.clear()
    assert graphs("marked", breaks=True) == 2
    assert ran == [True]
    assert not _torch.is_compiled_around()


def store_of_the_group(rank: int) -> None:
    store = _torch.default_store()
    if rank == 0:
        store.set("from rank 0", "7")
    store.wait(["from rank 0"], timedelta(seconds=20))
    assert int(store.get("from rank 0")) == 7
    with pytest.raises(Exception, match=r"(?i)time"):
        store.wait(["from nobody"], timedelta(milliseconds=100))


def test_the_ranks_of_a_process_group_have_a_store_in_common() -> None:
    launch(store_of_the_group, 2)


# --- nothing else is private


ALLOWED = {
    "torch.compiler",
    "torch.utils._python_dispatch",  # documented, and nothing public does it
}


def private_names(path: Path) -> set[str]:
    """Dotted names below torch with a part that begins with an underscore."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch.") and name.replace(".", "").isidentifier():
                found.add(name)
    return {name for name in found if any(map(is_private, name.split(".")))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


ROOT = Path(sd.__file__).parent


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_other_file_reaches_for_private_names_of_torch(path: Path) -> None:
    if path.name == "_torch.py":
        pytest.skip("which is where they are")
    names = {n for n in private_names(path) if not any(n.startswith(a) for a in ALLOWED)}
    assert names == set()
