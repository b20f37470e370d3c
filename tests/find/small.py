"""Small residual models, each spelled in its own way."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 8


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """The plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x))


class Sublayer(nn.Module):
    """Is given what it adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, f) -> Tensor:
        return x + f(self.norm(x))


class Lambdas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.first, self.second = Sublayer(), Sublayer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x, lambda y: self.a(y))
        return self.second(x, self.b)


class CarryingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), linear()

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else residual + h
        return self.f(self.norm(residual)), residual


class Carried(nn.Module):
    """A layer's sum is made by the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CarryingLayer() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return self.norm(x + residual)


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.f(h) + x


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = Output()

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.output(h, x)


class HandedDown(nn.Module):
    """The sum is two levels below the layer that begins the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle = linear(), Middle()

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.inner(x).relu(), x)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, pair: tuple[Tensor, None]) -> tuple[Tensor, Tensor]:
        return pair[0], self.f(pair[0])


class Join(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, None]:
        return pair[0] + pair[1], None


class Siblings(nn.Module):
    """The branch and its sum are made by siblings in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Fork(), Join(), Fork(), Join())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x, None))[0]


class Spelled(nn.Module):
    """x and f(x), summed in the way that is given."""

    def __init__(self, spelling) -> None:
        super().__init__()
        self.f, self.spelling = linear(), spelling

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.f(x))


class Slices(nn.Module):
    """Adds to a part of what the branch makes (ReXNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH + 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return torch.cat([y[:, :WIDTH] + x, y[:, WIDTH:]], 1)


class Gates(nn.Module):
    """x a(x) + x b(x) is no residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.a(x).sigmoid() + x * self.b(x).sigmoid())


class WideAndDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = linear(), nn.Sequential(linear(), nn.ReLU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.deep(x)


class PositionalConvolutions(nn.Module):
    """A stack of grouped convolutions says where things are (data2vec)."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=4) for _ in range(2)]
        self.positions = nn.Sequential(convolutions[0], nn.GELU(), convolutions[1], nn.GELU())
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(x.transpose(1, 2)).transpose(1, 2)
        return self.block(x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x + torch.randn_like(x))


class ParameterAsShortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.f = nn.Parameter(torch.randn(WIDTH)), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand_as(x) + self.f(x)


class TokenShift(nn.Module):
    """Interpolates between a value and the one before it (RWKV)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.f = nn.Parameter(torch.rand(WIDTH)), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x * self.mix + x.roll(1, 1) * (1 - self.mix))


class Functional(nn.Module):
    """Reads its weights in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.linear(x, self.w, self.b)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


class Handed(torch.autograd.Function):
    """Returns its input as it is."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


class Shared(nn.Module):
    """One block that is called three times (ALBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(x)))


class Alternating(nn.Module):
    """Does another thing at every other call."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.calls = linear(), linear(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + (self.f(x) if self.calls % 2 else self.g(self.f(x)))


class SharedAlternating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Alternating()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Counting(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()
        self.seen: list[Tensor] = []
        self.box = {"deep": {1}}
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.seen.append(x)
        self.box["deep"].add(2)
        self.calls.add_(1)
        self.last = x
        torch.rand(1, generator=self.generator)
        torch.rand(1)
        x.mul_(2)
        if fail:
            raise KeyError("on purpose")
        return x + self.f(x)


class Extra:
    """More than tensors, lists and dicts: what torch's trees take for a leaf."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights


class Explaining(nn.Module):
    """Also returns an object, which nobody needs (x-transformers' attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Extra]:
        y = self.f(x)
        return y, Extra(y.softmax(-1))


class Explained(nn.Module):
    def __init__(self, used: bool = False) -> None:
        super().__init__()
        self.layers, self.used = nn.ModuleList(Explaining() for _ in range(2)), used

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            y, extra = layer(x)
            seen.append(extra.weights.shape)
            x = x + y
            if self.used:
                x = x * extra.weights
        return x


class Asking(nn.Module):
    """Asks whether what it was given is a tensor, as einops does."""

    def __init__(self) -> None:
        super().__init__()
        self.f = linear()

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if not isinstance(y, Tensor):
            raise TypeError(f"{type(y)} is unknown")
        return x + y.reshape(x.shape)


class Lerp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.scale = linear(), nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x.lerp(self.f(x), self.scale * 2), dim=-1)
