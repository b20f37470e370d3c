"""The names of torch's functions, by what they do with a value of a branch."""

from ..find.functions import ADD, SUBTRACT, writes

__all__ = [
    "ACTIVATIONS",
    "ADD",
    "ASKS",
    "IN_PLACE",
    "OF_DEVICE",
    "OPERATORS",
    "SCALINGS",
    "SUMS",
    "VIEWS",
]

SUMS = ADD | SUBTRACT | {"__rsub__"}
IN_PLACE = set(filter(writes, SUMS))  # a set, as dynamo does not look at the ends of names
ACTIVATIONS = {
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu",
    "relu6", "relu_", "selu", "sigmoid", "silu", "softplus", "tanh",
}  # fmt: skip
SCALINGS = {"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__"}
VIEWS = {"T", "mT", "H", "mH", "real", "imag", "data", "values", "indices"}  # two are of max()
ASKS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "is_complex", "element_size",
}  # fmt: skip
OF_DEVICE = {"device", "get_device", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"}

_OF_TWO = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_OTHERS = ("neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne")
OPERATORS = [f"__{way}{name}__" for name in _OF_TWO for way in ("", "r", "i")]
OPERATORS += [f"__{name}__" for name in _OTHERS]
