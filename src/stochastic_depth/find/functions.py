"""The names of torch's functions, by what they mean for a flow."""

__all__ = [
    "ADD",
    "DIVIDE",
    "FROM_PYTHON",
    "LOOKS",
    "MAY_ADD",
    "MULTIPLY",
    "OVERWRITES",
    "RANDOM",
    "SUBTRACT",
    "SUMS",
    "VIEWS",
    "writes",
]

ADD = {"add", "add_", "__add__", "__iadd__", "__radd__"}
SUBTRACT = {"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"}
SUMS = ADD | SUBTRACT
MULTIPLY = {"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"}
DIVIDE = {"div", "div_", "__truediv__", "__itruediv__"}
VIEWS = {
    "chunk", "expand", "flatten", "permute", "reshape", "split", "squeeze", "transpose", "item",
    "unbind", "unflatten", "unsqueeze", "view", "view_as", "contiguous", "__getitem__", "roll",
    "pad", "cat", "concat", "stack", "to", "type_as", "float", "alias", "narrow", "select",
    "movedim", "swapaxes", "T", "mT", "clone", "detach", "tensor_split", "half", "bfloat16",
}  # fmt: skip
MAY_ADD = SUMS | {
    "addcmul", "addcmul_", "addcdiv", "addcdiv_", "lerp", "lerp_", "addmm", "addmm_", "baddbmm",
    "addbmm", "addmv", "index_add", "index_add_", "scatter_add", "scatter_add_", "stack", "cat",
    "concat", "concatenate", "sum", "hstack", "vstack", "where", "__setitem__", "einsum", "fsum",
}  # fmt: skip
LOOKS = {
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "item", "tolist", "numpy",
    "__array__", "equal", "allclose", "is_nonzero", "__complex__",
}  # fmt: skip
OVERWRITES = {"bernoulli_", "uniform_", "normal_", "random_"}
FROM_PYTHON = {"tensor", "as_tensor", "from_numpy", "asarray", "frombuffer", "full"}
RANDOM = {
    "rand", "rand_like", "randn", "randn_like", "bernoulli", "bernoulli_", "uniform_", "normal_",
    "normal", "randint", "randint_like", "randperm", "exponential_", "geometric_", "multinomial",
    "poisson", "binomial", "random_", "log_normal_", "cauchy_", "empty_like", "new_empty",
}  # fmt: skip
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__"))
