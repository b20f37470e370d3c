"""A block's code sees its own module, its own children and ordinary tensors."""

import gc
import inspect
import sys
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.drop.forms import Forms

from .twins import MODES, assert_same, assert_weighed, data, net, outcome, twins

# --- questions that a forward may ask, of itself, its children and its values


class Base(nn.Module):
    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.sequence = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.weight = nn.Parameter(torch.ones(4))
        self.slot = 3
        self.answers: list[Any] = []

    def who(self) -> str:
        return "base"


class Asking(Base):
    """Asks a question about itself, an outer tensor and a tensor of the branch."""

    def __init__(self, question: Callable[["Asking", Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.question = question
        self.me = weakref.ref(self)
        self.known = {id(self)}

    def who(self) -> str:
        return "asking, " + super(type(self), self).who()

    def forward(self, x: Tensor) -> Tensor:
        """Its own words."""
        h = self.sequence(self.f(x))
        for layer in self.layers:
            h = layer(h)
        self.answers.append(self.question(self, x, h))
        return x + self.named["a"](self.g(h) * self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Asking":
        other = net(Asking, self.question)
        other.load_state_dict(self.state_dict())
        return other


class Child(nn.Module):
    pass


QUESTIONS: dict[str, Callable[[Asking, Tensor, Tensor], Any]] = {
    "is_tensor": lambda self, x, h: (torch.is_tensor(x), torch.is_tensor(h)),
    "type": lambda self, x, h: (type(x) is Tensor, type(h) is Tensor, h.__class__ is Tensor),
    "isinstance": lambda self, x, h: (isinstance(h, Tensor), isinstance(h, nn.Parameter)),
    "hasattr": lambda self, x, h: [hasattr(h, a) for a in ("grad_fn", "device", "nothing", "out")],
    "floating": lambda self, x, h: (h.is_floating_point(), torch.is_complex(h), h.dtype),
    "shape": lambda self, x, h: (len(h.shape), [*h.shape], h.shape[0] == len(x), h.numel()),
    "layout": lambda self, x, h: (h.is_contiguous(), h.stride(), h.storage_offset(), h.is_leaf),
    "mean": lambda self, x, h: round(h.mean().item(), 9),
    "tolist": lambda self, x, h: [round(v, 9) for v in h.detach().flatten().tolist()],
    "numpy": lambda self, x, h: h.detach().numpy().round(9).tolist(),
    "repr": lambda self, x, h: repr(h.detach()),
    "truth": lambda self, x, h: bool((h > -100).all()),
    "unpacked": lambda self, x, h: [round(row.sum().item(), 9) for row in h],
    "ordered": lambda self, x, h: h.detach().argsort(0).tolist(),
    "as a key": lambda self, x, h: {h: 1}[h],
    "type of self": lambda self, x, h: (type(self) is Asking, self.__class__.__name__),
    "identity of self": lambda self, x, h: (self.me() is self, id(self) in self.known),
    "sets of self": lambda self, x, h: self in {self} and {self: 2}[self],
    "super": lambda self, x, h: (self.who(), super(Asking, self).who()),
    "isinstance of self": lambda self, x, h: (isinstance(self, Base), isinstance(self, Child)),
    "slots": lambda self, x, h: (self.slot, type(self).__mro__[1].__slots__),
    "lists": lambda self, x, h: [
        isinstance(self.layers, nn.ModuleList),
        isinstance(self.layers[:1], nn.ModuleList),
        type(self.layers[-1]).__name__,
        len(self.layers),
    ],
    "sequences": lambda self, x, h: [
        isinstance(self.sequence, nn.Sequential),
        isinstance(self.sequence[1:], nn.Sequential),
        [type(m).__name__ for m in self.sequence],
        self.sequence[0].weight is self.sequence.get_parameter("0.weight"),
    ],
    "dicts": lambda self, x, h: (
        isinstance(self.named, nn.ModuleDict),
        list(self.named),
        "a" in self.named,
    ),
    "types of children": lambda self, x, h: [type(m) for m in self.children()],
    "children by name": lambda self, x, h: [
        dict(self.named_children())["f"] is self.f,
        self.get_submodule("f") is self.f,
        self._modules["f"] is self.f,
        self.get_submodule("sequence.0") is self.sequence[0],
        self.f is not self.g,
    ],
    "modules": lambda self, x, h: [name for name, _ in self.named_modules()],
    "parameters": lambda self, x, h: [name for name, _ in self.named_parameters()],
    "parameter": lambda self, x, h: (type(self.weight) is nn.Parameter, self.weight.is_leaf),
    "state_dict": lambda self, x, h: list(self.state_dict()),
    # "compile" is the block's own verb, whose decisions stay outside of what is compiled.
    "its attributes": lambda self, x, h: sorted(
        k for k in vars(self) if not k.startswith("_") and k != "compile"
    ),
    "training": lambda self, x, h: (self.training, self.f.training),
    "grad mode": lambda self, x, h: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "signature": lambda self, x, h: (str(inspect.signature(self.forward)), self.forward.__doc__),
    "source": lambda self, x, h: inspect.getsource(type(self).forward),
    "forward": lambda self, x, h: (
        self.forward.__func__ is Asking.forward,
        self.forward.__self__ is self,
    ),
    "forward of a child": lambda self, x, h: self.f.forward.__func__ is nn.Linear.forward,
    "caller": lambda self, x, h: sys._getframe(1).f_code.co_filename == __file__,
    "locals of the caller": lambda self, x, h: sorted(sys._getframe(1).f_locals),
}


def asking(question: str) -> nn.Module:
    """After an ordinary block: one that looks at its branch's values may be left in place."""
    return nn.Sequential(net(Static), net(Asking, QUESTIONS[question]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_what_a_forward_asks_is_answered_as_in_the_plain_model(question: str, mode: str) -> None:
    ours, plain = twins(asking(question), data(), mode=mode)
    ours[1].answers.clear()
    plain[1].answers.clear()
    for step in range(2):
        assert_same(ours, plain, data(seed=step))
    assert len(ours[1].answers) == 2
    assert ours[1].answers == plain[1].answers


@pytest.mark.parametrize(
    "question", ["type of self", "super", "children by name", "lists", "forward", "signature"]
)
def test_it_is_answered_so_also_where_the_branch_is_dropped(question: str) -> None:
    ours, plain = twins(asking(question), data(), p=1.0)
    ours[1].answers.clear()
    outcome(ours, data())
    outcome(plain, data())
    assert ours[1].answers == plain[1].answers[-1:]
    assert [branch.dropped for branch in sd.branches(ours)] == [1, 1]


# --- children reached in any way


class Reaching(nn.Module):
    def __init__(self, reach: Callable[["Reaching"], list[nn.Module]]) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)])
        self.reach = reach

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for module in self.reach(self):
            h = module(h)
        return x + h


WAYS: dict[str, Callable[[Reaching], list[Any]]] = {
    "attributes": lambda self: [self.f, self.g],
    "named_children": lambda self: [m for name, m in self.named_children() if name in "fg"],
    "get_submodule": lambda self: [self.get_submodule(name) for name in ("f", "layers.0.0", "g")],
    "getattr": lambda self: [getattr(self, name) for name in ("f", "g")],
    "the dict of modules": lambda self: [self._modules["f"], self._modules["g"]],
    "vars": lambda self: list(vars(self)["_modules"].values())[:2],
    "modules": lambda self: [m for m in self.modules() if isinstance(m, nn.Linear)],
    "a slice": lambda self: [*self.layers[:1], *self.layers[1:]],
    "a negative index": lambda self: [self.layers[-1], self.layers[0][-1], self.layers[0][0]],
    "a sliced sequence": lambda self: [self.layers[0][:1], self.layers[0][1:], self.layers[1]],
    "reversed": lambda self: [*reversed(list(self.layers))],
    "a closure": lambda self: [lambda h: self.f(h).sin(), lambda h: self.g(h)],
    "a bound call": lambda self: [self.f.__call__, self.g.__call__],
    "a new container": lambda self: [nn.Sequential(self.f, nn.Tanh()), self.g],
    "a generator": lambda self: (getattr(self, name) for name in "fg"),
    "sorted by name": lambda self: [m for _, m in sorted(self.named_children())[:2]],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_children_are_dropped_however_they_are_reached(way: str, mode: str) -> None:
    ours, plain = twins(net(Reaching, WAYS[way]), data(), mode=mode, p=0.5)
    runs: list[int] = []
    linear = [m for m in ours.modules() if isinstance(m, nn.Linear)]
    for module in linear:
        module.register_forward_hook(lambda _, args, __: runs.append(len(args[0])))
    assert_weighed(ours, plain, data())
    (branch,) = sd.branches(ours)
    rows = 12 * 6 - branch.dropped * (6 if mode == "batch" else 1)
    used = {id(m) for m in WAYS[way](ours)} if way == "attributes" else None
    assert sum(runs) % rows == 0
    assert sum(runs) >= rows * (2 if used else 1)


def test_a_list_that_torch_does_not_know_runs_its_modules() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)
            self.hidden = [self.f, nn.Tanh()]

        def forward(self, x: Tensor) -> Tensor:
            h = x
            for module in self.hidden:
                h = module(h)
            return x + h

    ours, plain = twins(net(Hidden), data(), p=0.5)
    assert_weighed(ours, plain, data())


# --- how a class may define its forward and its call


class Inherited(Reaching):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x) - x


class Called(Reaching):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.clone()).clone()


class Static(nn.Module):
    def __init__(self, reach: Any = None) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    @staticmethod
    def run(f: nn.Module, g: nn.Module, x: Tensor) -> Tensor:
        return x + g(f(x))

    @property
    def last(self) -> nn.Module:
        return self.g

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.f, self.last, x)


class Getting(Static):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__("g" if name == "second" else name)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.f(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Inherited, Called, Static, Getting])
def test_forwards_of_any_kind_are_weighed_and_dropped(kind: type[nn.Module], mode: str) -> None:
    ours, plain = twins(net(kind, WAYS["attributes"]), data(), mode=mode)
    assert_same(ours, plain, data())
    assert type(ours) is kind
    sd.branches(ours)[0].p = 0.5
    if kind is not Inherited:  # whose shortcut is 2 x
        assert_weighed(ours, plain, data())


def test_a_blocks_forward_is_its_own() -> None:
    ours, plain = twins(net(Asking, QUESTIONS["shape"]), data())
    assert ours.forward.__func__ is Asking.forward
    assert inspect.signature(ours.forward) == inspect.signature(plain.forward)
    assert ours.forward.__doc__ == "Its own words."
    assert "forward" not in vars(ours)
    assert repr(ours) == repr(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())


# --- errors


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.wrong = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if self.wrong:
            x = x.view(5, 5)  # the line at fault
        h = self.f(x)
        return x + h


@pytest.mark.parametrize("p", [1e-30, 0.5, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_traceback_shows_the_users_line(mode: str, p: float) -> None:
    ours, plain = twins(net(Faulty), data(), mode=mode, p=p)
    ours(data())
    frames = []
    for model in (ours, plain):
        model.wrong = True
        with pytest.raises(RuntimeError, match="invalid for input of size 24") as error:
            model(data())
        frames.append([f for f in traceback.extract_tb(error.tb) if f.filename == __file__])
    assert [f.line for f in frames[0]] == [f.line for f in frames[1]]
    assert frames[0][-1].name == "forward"
    assert frames[0][-1].line == "x = x.view(5, 5)  # the line at fault"
    ours.wrong = plain.wrong = False
    if p < 1e-9:
        assert_same(ours, plain, data())


def test_code_in_c_is_not_told_that_a_value_of_a_branch_is_a_tensor() -> None:
    """It would read the memory of one: torch 2.14's Function.apply does."""
    seen = []

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            match y:
                case Tensor():
                    seen.append(True)
            seen.append(isinstance(y, Tensor))
            seen.append(y.__class__ is Tensor)
            seen.append(next(map(isinstance, [y], [Tensor])) is (type(y) is Tensor))
            return x + y

    x = torch.randn(2, 4)
    model = sd.apply(Looking(), 1.0, example_inputs=x).train()
    seen.clear()
    assert torch.equal(model(x), x)
    assert seen == [True] * 4


def test_a_type_whose_code_in_c_reads_the_memory_of_tensors_is_refused() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.looks = nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return x + (y if self.looks and isinstance(y, torch.FloatTensor) else 1.0 * y)

    x, model = torch.randn(2, 4), Looking()
    sd.apply(model, 1.0, example_inputs=x).train()
    model.looks = True
    with pytest.raises(TypeError, match=r"a type such as torch\.FloatTensor reads a value"):
        model(x)


WHERE: dict[str, Callable[[Tensor], bool]] = {
    "is_cpu": lambda y: y.is_cpu,
    "is_meta": lambda y: not y.is_meta,
    "is_cuda": lambda y: not y.is_cuda,
    "get_device": lambda y: y.get_device() == torch.zeros(1).get_device(),
    "device": lambda y: y.device.type == "cpu",
}


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("asks", WHERE)
def test_what_is_dropped_is_where_it_would_be(asks: str, p: float) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return x + y if WHERE[asks](y) else -x

    x = torch.randn(2, 4)
    model = sd.apply(Asks(), p, example_inputs=x).train()
    assert torch.equal(model(x), x + model.f(x) * (1 - p))


class Choosing(nn.Module):
    """Takes a keyword by the name of which the library calls a module."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Chosen()

    def forward(self, x: Tensor, module: float = 1.0) -> Tensor:
        return x + self.f(x, module=module)


class Chosen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor, module: float) -> Tensor:
        return super().forward(x) * module


@pytest.mark.parametrize("blocks", [None, Choosing])
def test_a_keyword_may_have_any_name(blocks: Any) -> None:
    model, x = net(Choosing), data()
    sd.apply(model, 0.5, example_inputs={"x": x, "module": 2.0}, blocks=blocks)
    plain = x + 2.0 * nn.functional.linear(x, model.f.weight, model.f.bias)
    kept = x + 2 * (plain - x)
    outputs = [model(x, module=2.0) for _ in range(20)]
    assert all(torch.equal(y, x) or torch.allclose(y, kept) for y in outputs)


class Keras(Choosing):
    def compile(self, optimizer: str) -> str:
        return f"compiled with {optimizer}"


def test_a_method_called_compile_may_mean_something_else() -> None:
    model = net(Keras)
    sd.apply(model, 0.5, example_inputs=data())
    assert model.compile("sgd") == "compiled with sgd"


QUESTIONS_OF_A_VALUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cast by type()": lambda x, h: x + (0.5 * h).type(x.dtype),
    "cast by a name": lambda x, h: x + h.type("torch.DoubleTensor"),
    "plus": lambda x, h: x + +h,
    "subtract_": lambda x, h: x.clone().subtract_(h),
    "new entries beside it": lambda x, h: x + torch.cat([h, h.new_zeros(1, 4)])[:-1],
    "its type in words": lambda x, h: x + h * (h.type() == "torch.DoubleTensor"),
}


class Asked(nn.Module):
    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.way = nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, self.f(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", QUESTIONS_OF_A_VALUE)
def test_a_value_can_be_cast_and_asked_for_others_like_it(way: str, mode: str) -> None:
    ours, plain = twins(net(Asked, QUESTIONS_OF_A_VALUE[way]), data(), mode=mode, p=0.5)
    assert_weighed(ours, plain, data())


class Shaped(nn.Module):
    """Asks for the shape of a value, and calls something that does not run on the meta device."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.f = nn.Sequential(Looking() if looks else nn.Identity(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        rows, columns = h.shape
        return x + h.reshape(rows, 2, columns // 2).flatten(1)


class Looking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.sum() > 0)


@pytest.mark.parametrize("looks", [False, True])
def test_hooks_of_what_is_dropped_do_not_run_where_its_shape_is_asked(looks: bool) -> None:
    model = net(Shaped, looks)
    sd.apply(model, 1.0, example_inputs=data())
    seen: list[Any] = []
    for module in model.f.modules():
        module.register_forward_hook(lambda *call: seen.append(call))
    model(data())
    assert seen == []
    sd.branches(model)[0].p = 0.0
    model(data())
    assert len(seen) == 3


class Halved(nn.Module):
    """Asks for the shape of a value, of which a hook hands on a half."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 8)
        self.f.register_forward_hook(lambda module, args, out: out[..., :4])

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return x * h.shape[-1] + h


def test_the_shape_of_what_is_dropped_is_that_which_hooks_make_of_it() -> None:
    model = net(Halved)
    sd.apply(model, 1.0, example_inputs=data())
    torch.testing.assert_close(model(data()), 4 * data())


class Repeating(nn.Module):
    def forward(self, x: Tensor, times: Any) -> Tensor:
        return x.repeat(1, 2 if times is True else 1)


class Repeated(nn.Module):
    """Asks for the shape of what a call with another argument than tensors returns."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.repeat = nn.Linear(4, 4), Repeating()
        self.widths: list[int] = []

    def forward(self, x: Tensor, times: Any) -> Tensor:
        h = self.repeat(self.f(x), times)
        self.widths.append(h.shape[1])
        return x + h[:, :4]


def test_a_shape_is_that_of_the_arguments_of_now_also_where_they_are_equal() -> None:
    model = sd.apply(net(Repeated), 1.0, example_inputs=(data(), 1))
    for times in (1, True, 1.0):
        model(data(), times)
    assert model.widths[-3:] == [4, 8, 4]


def test_what_a_shape_is_asked_of_outlives_no_call() -> None:
    model = sd.apply(net(Repeated), 1.0, example_inputs=(data(), Base()))
    kept = Base()
    model(data(), kept)
    gone = weakref.ref(kept)
    del kept
    gc.collect()
    assert gone() is None


def test_shapes_are_remembered_up_to_a_limit() -> None:
    forms, module = Forms(), Repeating()
    for i in range(3000):
        assert forms.of(module, (data(), float(i)), {}).shape == (6, 4)
    assert 0 < len(forms.known[module]) < 2000
