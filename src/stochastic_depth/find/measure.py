"""How much there is to a set of values: weights, layers one after the other, modules."""

from collections.abc import Collection, Set

from .flow import Flow
from .functions import ADD, SUMS, VIEWS

__all__ = ["Measures"]

_NO_SHORTCUT = {"embedding", "sigmoid", "sigmoid_", "tanh", "tanh_", "softmax", "softplus", "exp"}
_NORMAL = {"randn", "randn_like", "normal", "normal_"}
_PRODUCTS = {"matmul", "__matmul__", "mv"}
_LIGHT = ("torch.nn.modules.activation", "torch.nn.modules.dropout")


class Measures:
    """Of a recorded run."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.nodes, self.calls = flow, flow.nodes, flow.calls
        self.readers, self.live = flow.readers, flow.live

    def weights(self, i: int) -> tuple[int, int]:
        """How many weight matrices, and depthwise filters, a value is made with."""
        matrices = depthwise = 0
        for x in self.nodes[i].sources:
            if self.is_matrix(x, self.nodes[i].op):
                small = self.nodes[i].op.startswith("conv") and self.nodes[x].shape[1] == 1
                matrices, depthwise = matrices + (not small), depthwise + small
        return matrices, depthwise

    def is_matrix(self, x: int, op: str) -> bool:
        """Whether it is a layer's weights, though of one with a single output, and no gain."""
        shape = self.nodes[x].shape
        if not self.nodes[x].weights:
            return False
        if not self.nodes[x].is_continuous:  # packed, several in a number
            return len(shape) > 1
        if _numel(shape) > max(shape, default=1):
            return len(shape) > 1
        to_one = len(shape) > 1 and shape[0] == 1 and (op == "linear" or op.startswith("conv"))
        return to_one or (len(shape) == 1 and op in _PRODUCTS)

    def matrices(self, values: Collection[int]) -> set[int]:
        """The weight matrices that ``values`` are made with."""
        nodes = self.nodes
        return {x for i in values for x in nodes[i].sources if self.is_matrix(x, nodes[i].op)}

    def size_of(self, values: Collection[int]) -> int:
        """How many weights there are in these; packed ones are taken to have four bits."""
        matrices = (self.nodes[x] for x in self.matrices(values))
        return sum(
            _numel(x.shape) * (1 if x.is_continuous or x.dtype is None else 2 * x.dtype.itemsize)
            for x in matrices
        )

    def depth(self, values: set[int]) -> tuple[int, int]:
        """The weight matrices, and the depthwise filters, one after the other in ``values``."""
        depths: dict[int, tuple[int, int]] = {}
        for i in sorted(values):
            before = max((depths[x] for x in self.nodes[i].sources if x in depths), default=(0, 0))
            here = self.weights(i)
            depths[i] = before[0] + here[0], before[1] + here[1]
        return max(depths.values(), default=(0, 0))

    def is_substantial(self, values: set[int], m: int) -> bool:
        """Whether it has parameters, or calls a module that is more than an activation.

        What was not seen being computed may be anything.
        """
        nodes = self.nodes
        if any(nodes[x].weights for i in values for x in nodes[i].sources):
            return True
        if any(map(self.is_unseen, values)):
            return True
        innermost = {nodes[i].call for i in values}
        for c in innermost:
            for outer in self.flow.around(c):
                call = self.calls[outer]
                if call.start <= m < call.end:
                    break
                if not type(call.module).__module__.startswith(_LIGHT):
                    return True
        return False

    def is_unseen(self, i: int) -> bool:
        """Whether it comes from a scripted function, or from other work outside of torch's."""
        return self.nodes[i].op == "opaque" and self.nodes[i].function == "custom"

    def is_little(self, own: set[int]) -> bool:
        """Whether it has one layer at most, and no gate: values squashed, or two multiplied."""
        nodes = self.nodes
        if any(nodes[i].op in _NO_SHORTCUT for i in own) or self.depth(own)[0] > 1:
            return False
        for i in own:
            node = nodes[i]
            if node.op in VIEWS or node.op in ADD:
                continue
            if len({x for x in node.sources if nodes[x].varies}) > 1:
                return False
        return True

    def factors(self, b: int) -> set[int]:
        """The values that a branch is a product of at last, its scaling apart."""
        nodes = self.nodes
        while True:
            factors = {x for x in nodes[b].sources if nodes[x].varies or nodes[x].random}
            if len(factors) != 1 or any(self.weights(b)):
                return set() if nodes[b].op in SUMS | VIEWS else factors
            (b,) = factors

    def is_gated(self, b: int, branch: set[int], starts: set[int]) -> bool:
        """Whether a branch is at last its start times what is made of others: scores, a cell."""
        light, made = set(starts), set(starts)
        for i in sorted(branch):
            read = {x for x in self.nodes[i].sources if self.nodes[x].varies}
            if not made.isdisjoint(read):
                made.add(i)
            if read <= light and not any(self.weights(i)):
                light.add(i)
        factors = self.factors(b)
        return not light.isdisjoint(factors) and not factors <= made

    def is_noise(self, i: int) -> bool:
        """Whether it is made of normal random numbers alone."""
        node = self.nodes[i]
        return node.random and (node.op in _NORMAL or any(map(self.is_noise, node.sources)))

    def is_grouped(self, i: int) -> bool:
        """Whether it is made by a convolution in groups, of more than a point."""
        if not self.nodes[i].op.startswith("conv"):
            return False
        image, weight = (self.nodes[x].shape for x in self.nodes[i].sources[:2])
        return len(image) == len(weight) and weight[1] < image[1] and max(weight[2:]) > 1

    def is_made_of(self, i: int, values: Set[int]) -> bool:
        """Whether a value is computed from one of ``values``."""
        made = {i}
        for n in range(i, min(values), -1):
            if n in made:
                made.update(self.nodes[n].sources)
        return not made.isdisjoint(values)

    def is_followed(self, m: int) -> bool:
        """Whether a layer with weights works on the sum."""
        after = {m}
        for i in range(m, len(self.nodes)):
            if self.live[i] and not after.isdisjoint(self.nodes[i].sources):
                if any(self.weights(i)):
                    return True
                after.add(i)
        return False


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
