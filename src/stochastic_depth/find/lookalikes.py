"""Sums that look residual: why one is no residual connection, or its branch cannot be left out."""

from collections.abc import Callable, Set

from .functions import SUBTRACT, SUMS, VIEWS
from .parts import OUTSIDE, Parts

__all__ = ["Lookalikes"]

_SOFTMAXES = {"softmax", "gumbel_softmax"}
_SQUASHES = _SOFTMAXES | {"sigmoid", "sigmoid_", "hardsigmoid", "tanh", "tanh_"}
_SIZES = {
    "pow", "pow_", "square", "square_", "abs", "abs_", "norm", "linalg_norm",
    "linalg_vector_norm",
}  # fmt: skip
_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm", "einsum"}
_LINEAR = _PRODUCTS | {"linear", "div", "div_", "__truediv__", "neg", "dropout"}
_BETWEEN = VIEWS | SUMS | {
    "mul", "mul_", "__mul__", "__rmul__", "div", "div_", "__truediv__", "neg", "masked_fill",
    "masked_fill_", "where", "clamp", "dropout",
}  # fmt: skip
_NORMS = {"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"}
_ACTIVATIONS = {"relu", "relu_", "leaky_relu", "gelu", "silu", "tanh"}
_TO_ONE = "a layer with a single output"
_TO_SQUASH = _BETWEEN | _NORMS
_TO_SCORES = _BETWEEN | _ACTIVATIONS | {_TO_ONE}
_TO_GATE = _TO_SQUASH | _TO_SCORES
_TO_PRODUCT = _BETWEEN | {"rsub", "__rsub__"}  # 1 - gate

_CELL = "a sum of two branches of a cell, neither of which is its shortcut"
_SCORES = "it goes on through a softmax, a sigmoid, or a tanh alone: scores, a gate, a cell"


class Lookalikes(Parts):
    """Of a recorded run."""

    def objection(self, branch: set[int], near: set[int], m: int) -> str:
        """Why a branch cannot be left out, or is too little to be one."""
        nodes = self.nodes
        if not self.is_substantial(branch, m):
            return self.leak(near)
        if not self.largest(branch, 0, m) and not any(self.depth(branch)):
            if any(map(self.is_unseen, branch)):
                return OUTSIDE
            if any(self.depth(near)):
                return self.leak(near)
            return "it only weighs values: a token shift, an interpolation"
        weighted = [i for i in branch if any(nodes[x].weights for x in nodes[i].sources)]
        if weighted and all(self.is_grouped(i) for i in weighted):
            return "it is made of grouped convolutions alone: a positional encoding"
        if not weighted and nodes[m].op in SUBTRACT:
            return "it takes off what is computed without weights: a mean, a trend"
        if not weighted and any(nodes[x].random for i in branch for x in nodes[i].sources):
            return "it is made of random numbers: noise"
        return ""

    def likeness(
        self, m: int, b: int, own: set[int], needs: set[int], branch: set[int], block: int
    ) -> str:
        """What a sum is, if no residual connection.

        Args:
            m: the sum.
            b: the branch's value.
            own: what its shortcut alone is made of.
            needs: what the branch is made of, and what the shortcut goes on from.
            branch: what can be left out of it.
            block: the call that it is in.
        """
        if self.is_cut_off(b):
            return "no gradient comes to it (detach), as in a quantizer's straight-through estimate"
        difference = self.nodes[m].op in SUBTRACT
        if difference and self.ends(m, self.is_size, _BETWEEN):
            return "of the difference only the size is used: an error, as that of an autoencoder"
        if self.weighs(m, _SOFTMAXES, _TO_SCORES) or (difference and self.squashed(m)):
            return _SCORES
        if not own:
            return ""
        if self.is_gate(m, branch):
            return _SCORES
        if any(map(self.is_noise, self.factors(b))):
            return "it scales normal random numbers: a sample of a distribution"
        if self.is_shared(own, needs, m):
            return _CELL
        if not any(self.depth(own)):
            return ""
        if all(self.nodes[min(self.viewed({i}))].op in _ACTIVATIONS for i in (max(own), b)):
            return _CELL  # both are activated, as branches are
        if all(map(self.is_linear, branch)) and self.size_of(branch) < self.size_of(own):
            return "it is linear, and smaller than the layer on its shortcut: a correction (LoRA)"
        if not self.matrices(own).isdisjoint(self.matrices(branch)):
            return "it runs the layer on its shortcut, too: a step of an iteration"
        convolves = any(self.nodes[i].op.startswith("conv") for i in own)  # as a block alone does
        if self.is_all(block) and not convolves and not self.is_followed(m):
            return "two ways to the model's output, wide and deep: no shortcut"
        return ""

    def is_shared(self, own: set[int], branch: set[int], m: int) -> bool:
        """Whether others read what a projection of the shortcut makes with its weights."""
        made: set[int] = set()
        for i in sorted(own):
            if any(self.weights(i)) or not made.isdisjoint(self.nodes[i].sources):
                made.add(i)
        readers = {r for i in made for r in self.readers[i]}
        return not readers <= own | branch | {m}

    def is_cut_off(self, i: int) -> bool:
        """Whether no gradient comes to what a value is made of."""
        ways = [self.nodes[x] for x in self.viewed({i})]
        # A custom Function's backward pass may give it one.
        return any(way.op in ("detach", "data") and not way.function for way in ways)

    def is_linear(self, i: int) -> bool:
        """Whether a value is linear in what it is made of, but for weights."""
        op, factors = self.nodes[i].op, [x for x in self.nodes[i].sources if self.nodes[x].varies]
        alone = len(factors) == 1 and (op in _LINEAR or op.startswith("conv"))
        return alone or op in VIEWS | SUMS

    def is_size(self, r: int, i: int) -> bool:
        """Whether ``r`` is the size of ``i``: its square, a distance."""
        return self.nodes[r].op in _SIZES or self.nodes[r].sources.count(i) > 1

    def squashed(self, m: int) -> list[int]:
        """What is made where all that becomes of a sum is squashed."""
        return self.ends(m, lambda r, _: self.nodes[r].op in _SQUASHES, _TO_SQUASH)

    def is_gate(self, m: int, branch: set[int]) -> bool:
        """Whether others are weighed by a squashed sum, or by a squashed layer of it.

        What only is squashed may be a block's activation, but not where the layers of its branch
        run again: these are steps of a recurrent layer.
        """
        squashed = self.squashed(m)
        if squashed and any(len(self.readers[x]) > 1 for x in self.matrices(branch)):
            return True
        return any(map(self.is_weight, squashed)) or self.weighs(m, _SQUASHES, _TO_GATE)

    def weighs(self, m: int, squashes: Set[str], between: Set[str]) -> bool:
        """Whether others are weighed by what such functions make of a sum, and it does no more."""

        def is_end(r: int, _: int) -> bool:
            return self.nodes[r].op in squashes and self.is_weight(r)

        return bool(self.ends(m, is_end, between))

    def is_weight(self, i: int) -> bool:
        """Whether other values are multiplied with it, and not a scale alone."""

        def multiplies(r: int, x: int) -> bool:
            others = (o for o in self.nodes[r].sources if o != x)
            is_product = self.nodes[r].op in _PRODUCTS | {"lerp", "lerp_"}
            return is_product and any(self.nodes[o].varies for o in others)

        return bool(self.ends(i, multiplies, _TO_PRODUCT))

    def ends(self, m: int, is_end: Callable[[int, int], bool], between: Set[str]) -> list[int]:
        """All that becomes of a value, through functions ``between``, if these are ends alone."""
        waiting, seen, found = [m], {m}, list[int]()
        while waiting:
            i = waiting.pop()
            if i in self.flow.kept:
                return []
            for r in self.readers[i]:
                if is_end(r, i):
                    found.append(r)
                elif self.nodes[r].op in between or (_TO_ONE in between and self.is_to_one(r)):
                    waiting += {r} - seen
                    seen.add(r)
                else:
                    return []
        return found

    def is_all(self, block: int) -> bool:
        """Whether all layers of the model are in one call, embeddings apart."""
        call = self.calls[block]
        return not any(
            any(self.weights(i)) and self.nodes[i].op != "embedding"
            for i in range(len(self.nodes))
            if self.live[i] and not call.start <= i < call.end
        )

    def is_to_one(self, i: int) -> bool:
        """Whether it is made by a layer with a single output."""
        shapes = [self.nodes[x].shape for x in self.matrices([i])]
        return bool(shapes) and all(shape[0] == 1 for shape in shapes)
