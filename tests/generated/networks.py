"""Random residual networks: descriptions, and modules with ordinary forwards made of them."""

import itertools
import linecache
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4
ALPHA = 0.5


@dataclass(frozen=True)
class Layer:
    """One step of a branch. ``index`` names its module (or parameter) in the block."""

    # linear, tanh, relu, scale, bn, doubled (in place), nested,
    # other (times the second input), handing (the same in a module that returns that input, too)
    kind: str
    index: int = 0
    block: "Block | None" = None


@dataclass(frozen=True)
class Statement:
    """One statement of a forward; ``branches`` are sequences of layers."""

    kind: str
    index: int
    branches: tuple[tuple[Layer, ...], ...] = ()
    post: str = ""


@dataclass(frozen=True)
class Block:
    """A block of a network: what its forward does, and how it is called and returns."""

    statements: tuple[Statement, ...]
    style: str  # plain, tuple, dict, keyword
    takes_other: bool


@dataclass(frozen=True)
class Network:
    """Blocks by number, in the order in which they are called; perhaps with a long skip."""

    blocks: tuple[Block, ...]
    order: tuple[int, ...]
    long_skip: bool
    train_norm: bool


# How shortcut x and branch b are merged, and the factor of the branch.
MERGES = {
    "x + b": ("x = x + b", 1.0),
    "b + x": ("x = b + x", 1.0),
    "b += x": ("b += x; x = b", 1.0),
    "b.add_": ("x = b.add_(x)", 1.0),
    "torch.add": ("x = torch.add(x, b)", 1.0),
    "alpha": (f"x = torch.add(x, b, alpha={ALPHA})", ALPHA),
    "x - b": ("x = x - b", -1.0),
    "stack": ("x = torch.stack([x, b]).sum(0)", 1.0),
    "addcmul": ("x = torch.addcmul(x, self.gain{i}, b)", 1.0),
    "projection": ("x = self.shortcut{i}(x) + b", 1.0),
    "handed": ("x = self.out{i}(b, x)", 1.0),
}
PLAIN = {
    "multiplied": "x = x * torch.sigmoid(b)",
    "concatenated": "x = torch.cat([b, x], 1)[:, 1:1 + b.shape[1]]",
    "dead": "b",
    "constant": "x = x + 0.5",
    "parameter": "x = x + self.gain{i}",
    "buffer": "x = x - self.buffer{i}",
}
POST = {"": "", "relu": "x = torch.relu(x)", "relu_": "x = x.relu_()", "module": "x = self.act(x)"}


class Handed(nn.Module):
    """Adds what it computes to what its parent hands it, as BertOutput does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.linear(hidden) + residual


class Handing(nn.Module):
    """Returns beside its value what it was given, as attention does with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) * other, other


@st.composite
def _layers(draw: st.DrawFn, depth: int, ids: Iterator[int], known: list[int], other: bool):
    kinds = ["linear", "linear", "tanh", "relu", "scale", "bn", "shared", "doubled"]
    kinds += ["other", "handing"] * other + ["nested"] * (depth > 0)
    layers = []
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=3)):
        if kind == "nested":
            block = draw(_blocks(depth - 1, other))
            layers.append(Layer(kind, next(ids), block))
        elif kind == "doubled":  # what a linear layer returns, which nobody else sees
            layers += [Layer("linear", next(ids)), Layer(kind)]
            known.append(layers[-2].index)
        elif kind == "shared":
            if known:
                layers.append(Layer("linear", draw(st.sampled_from(known))))
        else:
            layers.append(Layer(kind, next(ids)))
            known += [layers[-1].index] * (kind == "linear")
    # The last is linear, so that nothing needs its result for its own gradient.
    layers.append(Layer("linear", next(ids)))
    known.append(layers[-1].index)
    return tuple(layers)


@st.composite
def _statements(draw: st.DrawFn, depth: int, ids: Iterator[int], known: list[int], other: bool):
    kinds = [*MERGES, *MERGES, *PLAIN, "parallel", "two branches"]
    kind = draw(st.sampled_from(kinds))
    i = next(ids)
    if kind in ("constant", "parameter", "buffer"):
        return Statement(kind, i)
    if kind == "two branches":  # of the same depth: neither is the other's shortcut
        return Statement(kind, i, ((Layer("linear", next(ids)),), (Layer("linear", next(ids)),)))
    branches = [draw(_layers(depth, ids, known, other))]
    if kind == "parallel":
        branches.append(draw(_layers(0, ids, known, other)))
    if kind == "projection":  # the branch has to be the longer one
        branches = [(Layer("linear", next(ids)), Layer("tanh"), *branches[0])]
    post = draw(st.sampled_from(list(POST))) if kind in MERGES else ""
    return Statement(kind, i, tuple(branches), post)


@st.composite
def _blocks(draw: st.DrawFn, depth: int, other: bool):
    ids, known = itertools.count(), []
    takes = other and draw(st.booleans())
    count = draw(st.integers(1, 3))
    statements = tuple(draw(_statements(depth, ids, known, takes)) for _ in range(count))
    return Block(statements, draw(st.sampled_from(["plain", "tuple", "dict", "keyword"])), takes)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Networks of one to three blocks, with blocks in branches two levels deep."""
    other = draw(st.booleans())
    blocks = tuple(draw(_blocks(2, other)) for _ in range(draw(st.integers(1, 3))))
    order = draw(st.lists(st.integers(0, len(blocks) - 1), min_size=1, max_size=4))
    return Network(blocks, tuple(order), draw(st.booleans()), draw(st.booleans()))


def build(network: Network) -> nn.Module:
    """The network as a module, its weights random and the same each time."""
    torch.manual_seed(0)
    # The second input is always used, so that nothing works with another number of its rows.
    lines = ["x = x * other", *["start = x"] * network.long_skip]
    for i in network.order:
        lines += [f"x = {_call(network.blocks[i], f'self.blocks[{i}]', 'x')}"]
    lines += ["x = start + x"] if network.long_skip else []
    module = _compile("self, x, other", [*lines, "return x"])()
    module.blocks = nn.ModuleList(_module(block) for block in network.blocks)
    module.double().train()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d) and not network.train_norm:
            m.eval()
    return module


def _module(block: Block) -> nn.Module:
    lines = []
    for s in block.statements:
        lines += _code(s)
    signature = "self, *, x" if block.style == "keyword" else "self, x"
    lines.append(
        {"tuple": "return x, None", "dict": "return {'out': x}"}.get(block.style, "return x")
    )
    module = _compile(signature + ", other" * block.takes_other, lines)()
    module.act = nn.ReLU(inplace=True)
    for s in block.statements:
        setattr(module, f"gain{s.index}", nn.Parameter(torch.rand(WIDTH)))
        module.register_buffer(f"buffer{s.index}", torch.rand(WIDTH))
        if s.kind == "projection":
            setattr(module, f"shortcut{s.index}", nn.Linear(WIDTH, WIDTH))
        if s.kind == "handed":
            setattr(module, f"out{s.index}", Handed())
        for layer in itertools.chain(*s.branches):
            name = f"{layer.kind}{layer.index}"
            if layer.kind == "linear" and not hasattr(module, name):
                setattr(module, name, nn.Linear(WIDTH, WIDTH))
            elif layer.kind == "bn":
                setattr(module, name, nn.BatchNorm1d(WIDTH))
            elif layer.kind == "handing":
                setattr(module, name, Handing())
            elif layer.kind == "scale":
                setattr(module, name, nn.Parameter(torch.rand(WIDTH)))
            elif layer.block is not None:
                setattr(module, name, _module(layer.block))
    return module


def _call(block: Block, path: str, value: str) -> str:
    given = f"x={value}" if block.style == "keyword" else value
    given += ", other=other" * block.takes_other
    return f"{path}({given})" + {"tuple": "[0]", "dict": "['out']"}.get(block.style, "")


def _code(s: Statement) -> list[str]:
    lines = []
    names = ["b", "c"]
    for name, layers in zip(names, s.branches, strict=False):
        lines.append(f"{name} = x")
        for layer in layers:
            path = f"self.{layer.kind}{layer.index}"
            match layer.kind:
                case "linear" | "bn":
                    lines.append(f"{name} = {path}({name})")
                case "tanh" | "relu":
                    lines.append(f"{name} = torch.{layer.kind}({name})")
                case "scale":
                    lines.append(f"{name} = {name} * {path}")
                case "doubled":
                    lines.append(f"{name} *= 2.0")
                case "other":
                    lines.append(f"{name} = {name} * other")
                case "handing":
                    lines.append(f"{name}, other = {path}({name}, other)")
                case "nested":
                    lines.append(f"{name} = {_call(layer.block, path, name)}")
    match s.kind:
        case "parallel":
            lines.append("x = x + b + c")
        case "two branches":
            lines.append("x = b + c")
        case kind:
            text = MERGES[kind][0] if kind in MERGES else PLAIN[kind]
            lines.append(text.replace("{i}", str(s.index)))
    return [*lines, POST[s.post]] if s.post else lines


_numbers = itertools.count()


def _compile(signature: str, lines: list[str]) -> type[nn.Module]:
    """A module class whose forward is ordinary source code, which tracebacks can show."""
    body = "\n        ".join(lines)
    source = f"class Generated(nn.Module):\n    def forward({signature}):\n        {body}\n"
    file = f"<generated {next(_numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    namespace = {"torch": torch, "nn": nn, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return namespace["Generated"]
