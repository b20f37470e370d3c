"""Random networks full of what a symbolic trace cannot see, each able to explain itself.

A block's ``forward`` is ordinary code. Its ``explain`` computes the same from the outside, with
each sample of each branch at a weight of its own: 0 leaves it out, 1 is the plain block.
"""

import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 4
Weights = Callable[[str], Tensor]  # by the name of the layer that marks a branch: (samples, 1, 1)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH + 1), nn.GELU(), nn.Linear(WIDTH + 1, WIDTH))


class Unseen(nn.Module):
    """A residual block on (samples, times, WIDTH), which treats all samples alike.

    Attributes:
        mixes: whether a sample's branch depends on the other samples.
        marks: the children that one branch alone runs, one for each branch.
        settings: what is changed between two steps.
        log: what it notes in a step.
    """

    marks: tuple[str, ...] = ("f",)
    mixes = False

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(WIDTH), mlp(), mlp()
        self.reentrant = choose.random() < 0.5
        self.settings, self.log = {"alpha": 1.0}, []

    def explain(self, x: Tensor, weights: Weights, positive: bool) -> Tensor:
        return x + weights("f") * self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(self.norm(x))


class Set(Unseen):
    """Weighs by a number that changes between steps."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        return x + self.settings["alpha"] * self.f(self.norm(x))

    def branch(self, x: Tensor) -> Tensor:
        return self.settings["alpha"] * super().branch(x)


class Noting(Unseen):
    """Fills a list, counts, and keeps the last input."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        self.log.append(round(x.mean().item(), 9))
        self.settings["calls"] = self.settings.get("calls", 0) + 1
        h = self.f(self.norm(x))
        h += x
        return h


class Within(Unseen):
    """Computes inside of context managers."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        with self.noted("outer"), torch.profiler.record_function("inner"):
            h = self.norm(x)
            with torch.autograd.graph.save_on_cpu():
                h = self.f(h)
        return h + x

    @contextmanager
    def noted(self, name: str) -> Any:
        self.log.append(f"into {name}")
        yield
        self.log.append(f"out of {name}")


class Recomputed(Unseen):
    """Checkpoints its branch, and a part of it again."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        def inner(h: Tensor) -> Tensor:
            return checkpoint(self.f, self.norm(h), use_reentrant=self.reentrant)

        return x + checkpoint(inner, x, use_reentrant=self.reentrant)


class TimeFirst(Unseen):
    """Mixes the times, which come first."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        x = x.transpose(0, 1)
        h = self.norm(x)
        scores = torch.einsum("sbc,tbc->bst", h, h).softmax(-1)
        x = x + self.f(torch.einsum("bst,tbc->sbc", scores, h))
        return x.transpose(0, 1)

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.f((h @ h.mT).softmax(-1) @ h)


class Folded(Unseen):
    """Folds the times into the samples, by sizes that it reads."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        b, *rest = x.shape
        folded = x.reshape(b * rest[0], *rest[1:])
        folded = folded + self.f(self.norm(folded))
        return folded.view(int(folded.shape[0] / rest[0]), *rest)


class Windowed(Unseen):
    """Folds pairs of times, and mixes them."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        pairs = self.norm(x).unflatten(1, (-1, 2)).flatten(0, 1)
        pairs = self.f(pairs.flip(1)) * pairs.mean(1, keepdim=True)
        return x + pairs.view(x.shape)

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        first, second = h[:, 0::2], h[:, 1::2]
        mean = (first + second) / 2
        return torch.stack([self.f(second) * mean, self.f(first) * mean], 2).flatten(1, 2)


class Centred(Unseen):
    """Takes the mean over the samples off, so these are not apart."""

    mixes = True

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        return x + self.f(self.norm(x) - self.norm(x).mean(0, keepdim=True))

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.f(h - h.mean(0, keepdim=True))


class Sorted(Unseen):
    """Works on its samples in another order."""

    mixes = True

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        order = x.detach().sum((1, 2)).argsort()
        return x + self.f(self.norm(x)[order])[order.argsort()].roll(1, 0)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(self.norm(x)).roll(1, 0)


class Messages(Unseen):
    """One graph for the whole batch, as of PyTorch Geometric: edges are pairs of its nodes."""

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        nodes = x.flatten(0, 1)
        first = torch.arange(len(nodes)).view(len(x), -1)[:, :-1].flatten()
        h = self.norm(nodes)
        sent = self.f(h[first]) * h[first + 1]
        return (nodes + torch.zeros_like(nodes).index_add(0, first + 1, sent)).view(x.shape)

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        sent = self.f(h[:, :-1]) * h[:, 1:]
        return torch.cat([torch.zeros_like(h[:, :1]), sent], 1)


class Deciding(Unseen):
    """Another branch for batches of another kind."""

    marks = ("f", "g")

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        if positive and len(x.shape) == 3:
            return x + self.f(self.norm(x))
        return x - self.g(x)

    def explain(self, x: Tensor, weights: Weights, positive: bool) -> Tensor:
        if positive:
            return x + weights("f") * self.f(self.norm(x))
        return x - weights("g") * self.g(x)


class Sublayer(nn.Module):
    """Adds what a function makes of its normed input, as in the annotated transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return x + function(self.norm(x))


class Handing(Unseen):
    """Hands lambdas down."""

    marks = ("f", "g")

    def __init__(self, choose: random.Random) -> None:
        super().__init__(choose)
        self.first, self.second = Sublayer(), Sublayer()

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        scale = self.settings["alpha"]
        x = self.first(x, lambda h: scale * self.f(h))
        return self.second(x, self.g)

    def explain(self, x: Tensor, weights: Weights, positive: bool) -> Tensor:
        x = x + weights("f") * self.settings["alpha"] * self.f(self.first.norm(x))
        return x + weights("g") * self.g(self.second.norm(x))


class Carrying(nn.Module):
    """A layer that is given the last one's branch and adds it to the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), mlp()

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else h + residual
        return self.f(self.norm(residual)), residual


class Carried(Unseen):
    """Carries the residual along; each sum is made by the next layer."""

    marks = ("layers.0.f", "layers.1.f")

    def __init__(self, choose: random.Random) -> None:
        super().__init__(choose)
        self.layers = nn.ModuleList([Carrying(), Carrying()])

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x + residual

    def explain(self, x: Tensor, weights: Weights, positive: bool) -> Tensor:
        for mark, layer in zip(self.marks, self.layers, strict=True):
            x = x + weights(mark) * layer.f(layer.norm(x))
        return x


class Called(nn.Module):
    """Takes its input and a scale in several forms, and returns in several."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor | None = None, *, y: Tensor | None = None, scale: Any = 1.0) -> Any:
        given = y if x is None else x
        result = given + self.f(given) * scale
        return result if x is None else {"result": result, "scale": scale}


class Calling(Unseen):
    """Calls three blocks in three forms."""

    marks = ("called.0.f", "called.1.f", "called.2.f")

    def __init__(self, choose: random.Random) -> None:
        super().__init__(choose)
        self.called = nn.ModuleList([Called(), Called(), Called()])

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        x = self.called[0](x)["result"]
        x = self.called[1](y=x, scale=x.detach().mean((1, 2), keepdim=True))
        return self.called[-1](x, **({"scale": 2} if positive else {}))["result"]

    def explain(self, x: Tensor, weights: Weights, positive: bool) -> Tensor:
        x = x + weights("called.0.f") * self.called[0].f(x)
        scale = x.detach().mean((1, 2), keepdim=True)
        x = x + weights("called.1.f") * self.called[1].f(x) * scale
        return x + weights("called.2.f") * self.called[2].f(x) * (2 if positive else 1)


class Parallel(Unseen):
    """Two branches of one input; the second is skipped by a setting in some steps."""

    marks = ("f", "g")

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        y = x + self.f(self.norm(x))
        return y if self.settings["alpha"] < 0 else torch.add(y, self.g(x), alpha=0.5)

    def explain(self, x: Tensor, weights: Weights, positive: bool) -> Tensor:
        y = x + weights("f") * self.f(self.norm(x))
        return y if self.settings["alpha"] < 0 else y + 0.5 * weights("g") * self.g(x)


class Reversing(Unseen):
    """Turns the gradient of its branch."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return -gradient.clamp(-1, 1)

    def forward(self, x: Tensor, positive: bool) -> Tensor:
        return self.Function.apply(self.f(self.norm(x))) + x

    def branch(self, x: Tensor) -> Tensor:
        return self.Function.apply(super().branch(x))


KINDS: list[type[Unseen]] = [
    Set,
    Noting,
    Within,
    Recomputed,
    TimeFirst,
    Folded,
    Windowed,
    Centred,
    Sorted,
    Messages,
    Deciding,
    Handing,
    Carried,
    Calling,
    Parallel,
    Reversing,
]


class Network(nn.Module):
    """Blocks of random kinds with at most four branches, between two linear layers."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        kinds = choose.choices(KINDS, k=choose.randint(1, 4))
        while sum(len(kind.marks) for kind in kinds) > 4:
            kinds.pop()
        self.blocks = nn.ModuleList(kind(choose) for kind in kinds)

    @property
    def marks(self) -> list[str]:
        """The names of the layers that mark a branch, in the order of execution."""
        return [f"blocks.{i}.{mark}" for i, b in enumerate(self.blocks) for mark in b.marks]

    def forward(self, x: Tensor) -> Tensor:
        positive = bool(x.mean() > 0)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, positive)
        return self.head(x)

    def explain(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The same, with these weights of branches: (samples,) for each mark."""
        positive = bool(x.mean() > 0)
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block.explain(
                x, lambda mark, i=i: weights[f"blocks.{i}.{mark}"].view(-1, 1, 1), positive
            )
        return self.head(x)

    def turn(self, step: int) -> None:
        """Change what may change between two steps."""
        for block in self.blocks:
            block.settings["alpha"] = (1.0, 0.5, -2.0)[step % 3]

    def noted(self) -> list[Any]:
        return [(list(b.log), dict(b.settings)) for b in self.blocks]


def build(seed: int) -> Network:
    """The network of this number, its weights random and the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(random.Random(seed)).double().train()
