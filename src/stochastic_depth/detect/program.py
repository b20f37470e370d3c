"""Turn a traced forward and its residual regions into Python functions.

The main function is the forward with every region replaced by one call, and each branch is a
function of its own. Both take the block as an argument and look up children, parameters and
buffers on it when they run, so one program serves the block as it changes, and its copies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..functional import Merge
from .capture import Trace
from .examples import Detail
from .graphs import check_absent, is_effect, is_shape
from .regions import Region

__all__ = ["Branch", "Program", "build_program"]


@dataclass(frozen=True)
class Branch:
    """One region, runnable: ``run(block, *inputs)`` is the branch's output."""

    label: str
    run: Callable[..., Any]
    sum: Merge
    rows: tuple[int | None, ...] | None  # the dimension of each input's rows; None: not known
    modules: tuple[str, ...]  # of the block, that it runs
    parameters: tuple[str, ...]  # of the block, that it reads by itself


@dataclass(frozen=True)
class Program:
    """A forward with its branches taken out.

    ``run(block, call_branch, *values)`` is the forward's result; where a region was, it calls
    ``call_branch(i, shortcut, *inputs)`` for the branch ``branches[i]``. It holds for calls whose
    tensors are alike as far as ``detail`` says, and while the modules of ``inlined``, which it does
    not call, have no hooks and the settings that are noted there.
    """

    run: Callable[..., Any]
    branches: tuple[Branch, ...]
    detail: Detail
    inlined: dict[str, tuple[Any, ...]]


def build_program(
    trace: Trace,
    regions: Sequence[tuple[str, Region]],
    bypassed: Callable[[fx.Node], bool],
) -> Program:
    """The program of a traced forward with the labelled ``regions``, which do not overlap.

    Args:
        trace: the traced forward.
        regions: labels and regions, in the order of their sums.
        bypassed: calls inside a branch that return their first argument instead (a DropPath
            that the branch's own coin replaces).
    """
    parts = dict(p for _, region in regions for p in (*region.extras, *region.declared))
    _fill_in(parts)
    branches = tuple(
        _branch(label, region, _branch_graph(region, bypassed)) for label, region in regions
    )
    by_merge = {region.merge: i for i, (_, region) in enumerate(regions)}
    taken = {node for _, region in regions for node in region.nodes}
    main = fx.Graph()
    call_branch = main.placeholder("call_branch")
    env: dict[fx.Node, Any] = {}
    for node in trace.graph.nodes:
        if node in by_merge:
            region = regions[by_merge[node]][1]
            # What is not there is part of a branch, and is read for nothing but a constant.
            operands = [env[region.shortcut], *(env.get(n) for n in region.inputs)]
            env[node] = main.call_method("__call__", (call_branch, by_merge[node], *operands))
        elif (
            node not in taken and node not in parts and all(n in env for n in node.all_input_nodes)
        ):
            env[node] = main.node_copy(node, env.__getitem__)
        elif node not in taken and node not in parts and not is_shape(node) and not is_effect(node):
            raise AssertionError(f"{node} needs a value of a branch")
    return Program(_compile(main, "main"), branches, trace.detail, trace.inlined)


def _fill_in(constants: dict[fx.Node, Any]) -> None:
    """Put constants in place of what branches return beside their output."""
    for node in constants:
        for user in [user for user in node.users if user.target is not check_absent]:
            user.args = fx.node.map_arg(user.args, lambda n: constants.get(n, n))
            user.kwargs = fx.node.map_arg(user.kwargs, lambda n: constants.get(n, n))


def _branch(label: str, region: Region, graph: fx.Graph) -> Branch:
    parameters = tuple(str(node.target) for node in graph.nodes if node.op == "get_attr")
    run = _compile(graph, label)
    return Branch(label, run, region.sum, region.rows, region.modules, parameters)


def _branch_graph(region: Region, bypassed: Callable[[fx.Node], bool]) -> fx.Graph:
    graph = fx.Graph()
    env = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(region.inputs)}

    def get(node: fx.Node) -> fx.Node:
        if node not in env:  # a size or a parameter, looked up again inside the branch
            for source in node.all_input_nodes:
                get(source)
            env[node] = graph.node_copy(node, env.__getitem__)
        return env[node]

    for node in region.nodes:
        if bypassed(node):
            env[node] = get(node.all_input_nodes[0])
        else:
            get(node)
    for node, value in region.extras:
        graph.call_function(check_absent, (get(node), value))
    graph.output(env[region.output])
    return graph


def _compile(graph: fx.Graph, name: str) -> Callable[..., Any]:
    # The block is called _block, since "self" may be a child's name (transformers' attention).
    code = graph.python_code(root_module="_block")
    source = code.src.replace("def forward(self", "def forward(_block", 1)
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(source, f"<stochastic_depth {name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function
