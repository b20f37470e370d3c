"""What a generated network should compute, and which of its branches can be dropped.

Written from the description alone: all of a branch is computed and then masked. The plain model
lends its modules; the library is not used.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .networks import MERGES, Block, Layer, Network, Statement

Path = tuple[str, int, int]  # the block's name, the statement's index, which of its branches
Toss = Callable[[Path, int], tuple[Tensor, float]]  # the kept rows as a mask, and their weight


def droppable(network: Network) -> set[Path]:
    """The residual branches that can be dropped, outermost first served.

    A sum around two or more identity branches is a long skip: these are dropped instead of it.
    """
    inner: set[tuple[Path, bool]] = set()
    around: set[tuple[Path, bool]] = set()  # those that a long skip spans
    for i, block in enumerate(network.blocks):
        if i in network.order:  # what is not called is not seen
            found = _of_block(f"blocks.{i}", block)
            inner |= found
            around |= found
    spanned = sum(
        identity
        for i in network.order  # a block that is called twice counts twice
        for _, identity in _of_block(f"blocks.{i}", network.blocks[i])
    )
    if network.long_skip and spanned < 2:
        does = any(s.kind != "dead" for i in network.order for s in network.blocks[i].statements)
        inner = inner - around | ({(("", 0, 0), True)} if does else set())
    return {path for path, _ in inner}


def _of_block(name: str, block: Block) -> set[tuple[Path, bool]]:
    found: set[tuple[Path, bool]] = set()
    for s in block.statements:
        if s.kind == "dead":  # what nobody reads has no branches
            continue
        nested = set()
        for layer in (x for branch in s.branches for x in branch):
            if layer.block is not None:
                nested |= _of_block(f"{name}.nested{layer.index}", layer.block)
        if s.kind in MERGES and sum(identity for _, identity in nested) < 2:
            found.add(((name, s.index, 0), s.kind != "projection"))
        elif s.kind == "parallel":
            second = {((name, s.index, 1), True)}
            if sum(identity for _, identity in nested) < 2:
                second.add(((name, s.index, 0), True))
                nested = set()
            found |= nested | second
        else:
            found |= nested
    return found


def _returns_its_input(block: Block) -> bool:
    return all(s.kind == "dead" for s in block.statements)


class Interpreter:
    """Runs a network by its description.

    Args:
        network: the description.
        model: a plain module built from it.
        dropped: the branches that are decided for.
        toss: decides for one, given its place and the number of rows.
        select: whether dropped rows are not computed where rows can be told apart.
        other_known: whether they can where the second input enters the branch.

    Attributes:
        rows: how many rows each linear layer has to compute, by name.
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        dropped: set[Path],
        toss: Toss,
        select: bool,
        other_known: bool,
    ) -> None:
        self.network, self.model, self.dropped, self.toss = network, model, dropped, toss
        self.select, self.other_known = select, other_known
        self.rows: Counter[str] = Counter()
        self.kept: Tensor | None = None  # the rows that count where we are; None is all

    def run(self, x: Tensor, other: Tensor) -> Tensor:
        def blocks(value: Tensor, order: tuple[int, ...] = self.network.order) -> Tensor:
            for i in order:
                value = self._block(f"blocks.{i}", self.network.blocks[i], value, other)
            return value

        x = x * other
        if not self.network.long_skip:
            return blocks(x)
        if ("", 0, 0) in self.dropped:
            # What returns its input comes before the branch, and is called in any case.
            named = [self.network.blocks[i] for i in self.network.order]
            first = len(list(itertools.takewhile(_returns_its_input, named)))
            order = self.network.order[first:]
            blocks(x, self.network.order[:first])
            takes = any(self.network.blocks[i].takes_other for i in order)
            return self._merge(("", 0, 0), x, partial(blocks, order=order), 1.0, known=not takes)
        return x + blocks(x)

    def _block(self, name: str, block: Block, x: Tensor, other: Tensor) -> Tensor:
        for s in block.statements:
            x = self._statement(name, s, x, other)
            if s.post:
                x = torch.relu(x)
        return x

    def _statement(self, name: str, s: Statement, x: Tensor, other: Tensor) -> Tensor:
        branches = [self._after_idle(name, layers, x, other) for layers in s.branches]

        def branch(k: int) -> Callable[[Tensor], Tensor]:
            return lambda value: self._layers(name, branches[k], value, other)

        def known(k: int) -> bool:
            layers = s.branches[k]
            return not any(
                layer.kind in ("other", "handing")
                or (layer.block is not None and layer.block.takes_other)
                for layer in layers
            )

        block = self._module(name)
        gain = getattr(block, f"gain{s.index}")
        if s.kind in MERGES:
            f, shortcut = branch(0), x
            if s.kind == "addcmul":
                f = lambda value: gain * branch(0)(value)  # noqa: E731
            elif s.kind == "handed":
                f = lambda value: self._linear(  # noqa: E731
                    f"{name}.out{s.index}.linear", branch(0)(value)
                )
            elif s.kind == "projection":
                shortcut = self._linear(f"{name}.shortcut{s.index}", x)
            path = name, s.index, 0
            return self._merge(path, shortcut, f, MERGES[s.kind][1], known(0), start=x)
        match s.kind:
            case "parallel":
                merged = self._merge((name, s.index, 0), x, branch(0), 1.0, known(0))
                return self._merge((name, s.index, 1), merged, branch(1), 1.0, known(1), start=x)
            case "two branches":
                return branch(0)(x) + branch(1)(x)
            case "multiplied":
                return x * torch.sigmoid(branch(0)(x))
            case "concatenated":
                return torch.cat([branch(0)(x), x], 1)[:, 1 : 1 + x.shape[1]]
            case "dead":
                branch(0)(x)
                return x
            case "constant":
                return x + 0.5
            case "parameter":
                return x + gain
            case _:
                return x - getattr(block, f"buffer{s.index}")

    def _merge(
        self,
        path: Path,
        shortcut: Tensor,
        branch: Callable[[Tensor], Tensor],
        factor: float,
        known: bool,
        start: Tensor | None = None,
    ) -> Tensor:
        start = shortcut if start is None else start
        if path not in self.dropped:
            return shortcut + factor * branch(start)
        mask, weight = self.toss(path, len(start))
        if not mask.any():
            return shortcut
        self.kept = mask if self.select and (known or self.other_known) else None
        output = branch(start)
        self.kept = None
        masked = torch.where(mask.view(-1, 1), output, torch.zeros_like(output))
        return shortcut + factor * weight * masked

    def _after_idle(
        self, name: str, layers: tuple[Layer, ...], x: Tensor, other: Tensor
    ) -> tuple[Layer, ...]:
        """Call what returns its input at the start of a branch: it comes before it."""

        def is_idle(layer: Layer) -> bool:
            return layer.block is not None and _returns_its_input(layer.block)

        first = len(list(itertools.takewhile(is_idle, layers)))
        self._layers(name, layers[:first], x, other)
        return layers[first:]

    def _layers(self, name: str, layers: tuple[Layer, ...], x: Tensor, other: Tensor) -> Tensor:
        for layer in layers:
            path = f"{name}.{layer.kind}{layer.index}"
            match layer.kind:
                case "linear":
                    x = self._linear(path, x)
                case "bn":
                    x = self._module(path)(x)
                case "tanh" | "relu":
                    x = getattr(torch, layer.kind)(x)
                case "scale":
                    x = x * getattr(self._module(name), f"scale{layer.index}")
                case "other":
                    x = x * other
                case "handing":
                    x = self._linear(f"{path}.linear", x) * other
                case "doubled":
                    x = x * 2.0
                case "nested":
                    assert layer.block is not None
                    x = self._block(path, layer.block, x, other)
        return x

    def _linear(self, path: str, x: Tensor) -> Tensor:
        self.rows[path] += len(x) if self.kept is None else int(self.kept.sum())
        return self._module(path)(x)

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)
