"""Sums that look residual: each is refused with what it is, and its near relatives are found."""

import pytest
import torch
from torch import Tensor, nn

from find import small
from find.small import WIDTH
from stochastic_depth.find import find
from stochastic_depth.find.plan import Findings


def look(model: nn.Module) -> Findings:
    torch.manual_seed(0)
    return find(model, (torch.randn(3, 5, WIDTH),), {}, samples=None)


class Net(nn.Module):
    """Has layers enough for what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (small.linear() for _ in range(4))
        self.down, self.up = nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
        self.one, self.deep = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def autoencoder(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).relu())


class ErrorSquared(Net):
    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.autoencoder(x)) ** 2).mean()


class ErrorTimesItself(Net):
    def forward(self, x: Tensor) -> Tensor:
        d = x - self.autoencoder(x)
        return (d * d).sum(-1)


class ErrorOfSome(Net):
    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.autoencoder(x)) * (x > 0)).flatten(1).norm(dim=1)


class LikelihoodOfPixels(Net):
    """A discretised logistic distribution's."""

    def forward(self, x: Tensor) -> Tensor:
        d = x - self.autoencoder(x)
        return (torch.sigmoid((d + 0.01) / 0.1) - torch.sigmoid((d - 0.01) / 0.1)).log().mean()


class DistanceThatGoesOn(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c((x - self.a(x)).abs())


class Quantizer(Net):
    """Its gradient goes around it."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.c(z + (self.b(z).round() - z).detach())


class Gate(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(x * torch.sigmoid(self.a(x) + self.b(self.c(x).relu()) - 2))


class AttentionGate(Net):
    """Attention U-Net's: features of below say which of here count."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        below = self.b(x).relu()
        gate = self.one((self.a(x) + self.c(below)).relu()).sigmoid()
        return self.d(x * gate), below


class Scores(Net):
    """RealFormer's, which are added up over the layers."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.a(x) @ x.mT
        h = before.softmax(-1) @ x
        return self.d((before + self.b(h) @ self.c(h).mT).softmax(-1) @ h)


class AdditiveScores(Net):
    """Bahdanau's, in the second step of a decoder."""

    def forward(self, x: Tensor) -> Tensor:
        keys, h = self.a(x), x.mean(1)
        for _ in range(2):
            scores = self.one(torch.tanh(keys + self.b(h)[:, None])).softmax(1)
            h = self.c((keys * scores).sum(1))
        return h


class Correction(Net):
    """LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x) + 2 * self.up(self.down(x)))


class CorrectionOfParts(Net):
    """The same, for the parts of what a layer gives."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.up(part) for part in self.down(x).chunk(2, 1)]
        return self.d(self.a(x) + torch.cat(parts, 1))


class Packed(nn.Module):
    """A layer whose weights are packed, two in a byte, as bitsandbytes has them."""

    def __init__(self) -> None:
        super().__init__()
        bytes = torch.randint(256, (WIDTH * WIDTH // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(bytes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return packed_product(x, self.weight.view(-1, 1))


@torch.library.custom_op("stochastic_depth_tests::packed_product", mutates_args=())
def packed_product(x: Tensor, bytes: Tensor) -> Tensor:
    numbers = torch.cat([bytes & 15, bytes >> 4]).reshape(WIDTH, WIDTH)
    return x @ ((numbers.float() - 7.5) / 10)


class PackedInABuffer(nn.Module):
    """A layer whose weights are packed in numbers that are no parameters, as GPTQ has them."""

    def __init__(self) -> None:
        super().__init__()
        numbers = torch.randint(2**31, (WIDTH // 4, WIDTH), dtype=torch.int32)
        self.register_buffer("weight", numbers)

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.cat([self.weight >> shift & 15 for shift in (0, 4, 8, 12)])
        return x @ ((numbers.float() - 7.5) / 10)


class PackedCorrection(Net):
    """LoRA beside a layer whose weights are packed."""

    kind: type[nn.Module] = Packed

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.layer(x) + 2 * self.up(self.down(x)))


class BufferedCorrection(PackedCorrection):
    kind = PackedInABuffer


class Iteration(Net):
    """A deep equilibrium model's, whose input enters each time."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(3):
            z = (self.a(z) + self.b(x)).relu()
        return self.d(z)


class WideAndDeep(Net):
    """With one output, as where a click is predicted."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x) + self.deep(self.a(x).relu())).squeeze(-1)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1, keepdim=True)


class Centred(Net):
    """Autoformer takes a moving average off in this way."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = Mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(x - self.mean(x))


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x * torch.randn_like(x)


class Jittered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.jitter = Jitter()

    def forward(self, x: Tensor) -> Tensor:
        return self.d(x + self.jitter(x))


class ActivationAlone(Net):
    """What else it does is used, too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.d(x + self.relu(y)), y

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()


class Head(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(self.c(x).relu())


class WideAndDeepInAWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).logsumexp(-1).mean()


class Recurrent(Net):
    """A recurrent layer, whose inputs' part is computed for all steps at once."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.a(x).unbind(1)
        h = first.relu()
        for given in others:
            h = (given + self.b(h)).relu()
        return self.d(h)


class UpdateGate(Net):
    """A GRU's, which says how much of the old goes on, and how much of the new."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.a(x) + self.b(self.c(x).relu()))
        return self.d(z * x.tanh() + (1 - z) * x)


class UpdateGateOfLerp(Net):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.a(x) + self.b(self.c(x).relu()))
        return self.d(torch.lerp(x.tanh(), x, z))


class Elman(Net):
    """A recurrent decoder, which is given the same in each step."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.c(x).relu()).tanh()
        for _ in range(2):
            h = torch.tanh(self.a(x) + self.b(h))
        return self.d(h)


class Inception(Net):
    """Two branches, each with its activation; one has a layer more."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x).relu() + self.c(self.b(x).relu()).relu())


REFUSED = [
    (Inception, "two branches of a cell"),
    (UpdateGate, "scores, a gate, a cell"),
    (UpdateGateOfLerp, "scores, a gate, a cell"),
    (Centred, "a mean, a trend"),
    (ErrorSquared, "of the difference only the size is used"),
    (ErrorTimesItself, "of the difference only the size is used"),
    (ErrorOfSome, "of the difference only the size is used"),
    (LikelihoodOfPixels, "scores, a gate, a cell"),
    (DistanceThatGoesOn, "of the difference only the size is used"),
    (Quantizer, "straight-through"),
    (Gate, "scores, a gate, a cell"),
    (AttentionGate, "scores, a gate, a cell"),
    (Scores, "scores, a gate, a cell"),
    (AdditiveScores, "scores, a gate, a cell"),
    (Correction, "a correction"),
    (PackedCorrection, "a correction"),
    (BufferedCorrection, "a correction"),
    (CorrectionOfParts, "a correction"),
    (Jittered, "random numbers: noise"),
    (ActivationAlone, "also used outside"),
    (Iteration, "a step of an iteration"),
    (WideAndDeep, "wide and deep"),
    (WideAndDeepInAWrapper, "wide and deep"),
    (Recurrent, "also used outside"),
]


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_what_is_no_residual_connection_is_told(kind: type[nn.Module], reason: str) -> None:
    found = look(kind())
    assert found.branches == []
    assert [reason in refused.reason for refused in found.refused] == [True]


class Difference(Net):
    """Goes on itself: what is left when noise is taken off."""

    def forward(self, x: Tensor) -> Tensor:
        y = x - self.a(x)
        return y + y.abs()


class ErrorThatIsAlsoReturned(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d = x - self.a(x)
        return d, d.square().mean()


class Squashed(Net):
    """The last block before the output."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.a(x)).softmax(-1)


class SquashedByAHead(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = (self.a(x) + self.b(self.c(x).relu())).relu()
        return self.one(h.mean(1)).sigmoid()


class Bottleneck(Net):
    """Its shortcut has more weights than its branch, as in a narrow ResNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x) + self.up(self.down(x).relu()))


class Split(Net):
    """All parts of what it is given, each by itself."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        y = torch.cat([second.relu(), first.tanh()], -1)
        return self.d(self.a(x) + self.c(self.b(y).relu()))


class TanhBlock(Net):
    """Its activation is a tanh, as in networks that solve differential equations."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.a(x) + self.b(self.c(x).tanh())))


class ActivatedProjection(Net):
    """Has an activation on its shortcut, and none at the end of its branch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x).relu() + self.c(self.b(x).relu()))


class Action(Net):
    """A policy's last block: what is squashed is scaled, and weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + self.b(self.c(x).relu())
        return torch.tanh(self.one(h)) * self.scale


class Codes(Net):
    """A mixture of learned codes."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.a(x)).softmax(-1) @ self.codes


class Cropped(Net):
    """A convolution without padding, beside what it covers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.conv(x.mT).mT.relu())
        return self.d(self.a(x[:, 1:-1]) + y)


class Strided(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.conv(x.mT).mT.relu())
        return self.d(self.a(x[:, ::2]) + y)


class Backbone(nn.Module):
    """The last block makes the output, which no head follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = small.linear(), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x).relu())


class GainOnTheShortcut(Net):
    """Which makes no layer of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.gain * x + self.a(x))


class Convolutions(nn.Module):
    """Whole ones, and not by group as in a positional encoding; nothing else has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv1d(5, 5, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


class Noisy(Net):
    """Its branch is no product of noise, as that of a distribution is."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.c(x).relu())
        return self.d(self.a(x) + (y + 0.1 * torch.randn_like(y)))


class ActivatedShortcut(Net):
    """Its projection is activated, and its branch is not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x).relu() + self.c(self.b(x).relu()))


FOUND = [
    (ActivatedShortcut, ("b", "c")),
    (Noisy, ("c", "b")),
    (Convolutions, ("a", "b")),
    (GainOnTheShortcut, ("a",)),
    (Backbone, ("last.c", "last.b")),
    (TanhBlock, ("c", "b")),
    (ActivatedProjection, ("b", "c")),
    (Action, ("c", "b")),
    (Codes, ("a",)),
    (Cropped, ("conv", "c")),
    (Strided, ("conv", "c")),
    (Split, ("b", "c")),
    (Difference, ("a",)),
    (ErrorThatIsAlsoReturned, ("a",)),
    (Squashed, ("a",)),
    (SquashedByAHead, ("c", "b")),
    (Bottleneck, ("down", "up")),
]


@pytest.mark.parametrize(("kind", "modules"), FOUND)
def test_their_relatives_are_found(kind: type[nn.Module], modules: tuple[str, ...]) -> None:
    assert [branch.modules for branch in look(kind()).branches] == [modules]


class Layer(nn.Module):
    """WaveNet's: hands its values on, and to a sum over all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.on, self.out = (small.linear() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.f(x).tanh()
        return x + self.on(z), self.out(z)


def test_a_sum_over_the_layers_is_not_a_branch_of_one() -> None:
    class WaveNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.head = small.linear()

        def forward(self, x: Tensor) -> Tensor:
            outs = []
            for layer in self.layers:
                x, out = layer(x)
                outs.append(out)
            return self.head(sum(outs))

    assert [b.modules for b in look(WaveNet()).branches] == [("layers.0.on",), ("layers.1.on",)]


def test_a_step_s_part_of_what_all_are_given_is_not_its_shortcut() -> None:
    class Conditioned(nn.Module):
        """WaveGlow's."""

        def __init__(self) -> None:
            super().__init__()
            self.given = nn.Linear(WIDTH, 3 * WIDTH)
            self.f = nn.ModuleList(small.linear() for _ in range(3))
            self.g = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            given, total = self.given(c), torch.zeros_like(x)
            for i, (f, g) in enumerate(zip(self.f, self.g, strict=True)):
                h = f(x) + given[..., i * WIDTH : (i + 1) * WIDTH]
                on, out = g(h.tanh()).chunk(2, -1)
                x, total = x + on, total + out
            return total

    found = find(
        Conditioned(), (torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH)), {}, samples=None
    )
    assert found.branches == []


def test_a_layer_of_some_of_the_values_that_another_is_given_is_no_branch() -> None:
    class Placed(Net):
        """Features, and an encoding of the coordinates among them."""

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.a(x) + self.b(self.up(x[..., :2]).relu()))

    assert look(Placed()).branches == []


def test_two_ways_from_different_values_are_no_shortcut_and_branch() -> None:
    class Towers(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.d(self.a(x) + self.b(self.c(y).relu()))

    given = torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH)
    assert find(Towers(), given, {}, samples=None).branches == []


class Halves(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x)
        return self.d(self.a(y[..., :WIDTH]) + self.b(self.c(y[..., WIDTH:]).relu()))


class FirstOfAll(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x[:, 0]) + self.b(self.c(x.mean(1)).relu()))


@pytest.mark.parametrize("kind", [Halves, FirstOfAll])
def test_what_starts_from_other_parts_is_no_shortcut_and_branch(kind: type[nn.Module]) -> None:
    assert look(kind()).branches == []


def test_a_sum_of_whole_numbers_is_none() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.f = Shift(), nn.Embedding(9, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x + self.shift(x))

    found = find(Shifted(), (torch.arange(8).view(2, 4) % 4,), {}, samples=None)
    assert (found.branches, found.refused) == ([], [])


def test_what_the_shortcut_starts_from_weighed_by_something_else_is_no_branch() -> None:
    class Cell(Net):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            h = self.c(x).relu()
            return self.one(self.a(h) + self.gain * h * self.b(self.d(x).relu()).sigmoid())

    assert look(Cell()).branches == []


def test_a_call_whose_state_is_used_too_is_refused_with_that_reason() -> None:
    class States(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(WIDTH, WIDTH), small.linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, state = self.layer(x)
            return self.head(x + y), state

    (refused,) = look(States()).refused
    assert "also used outside" in refused.reason


def test_nothing_is_told_of_what_is_left_out_with_a_branch() -> None:
    class Gated(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.d(x * torch.sigmoid(self.a(x) + self.b(self.c(x).relu())))

    found = look(Gated())
    assert [branch.modules for branch in found.branches] == [("a", "c", "b", "d")]
    assert found.refused == []


def test_steps_of_a_recurrent_layer_that_is_given_the_same_are_refused() -> None:
    found = look(Elman())
    assert found.branches == []
    assert any("a cell" in refused.reason for refused in found.refused)


def test_a_convolutional_block_alone_is_found() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short, self.a, self.b = (nn.Conv1d(5, 5, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.short(x) + self.b(self.a(x).relu()))

    assert [b.modules for b in look(nn.Sequential(Block())).branches] == [("0.a", "0.b")]


class Coder(nn.Module):
    """Codes what it is given, and returns the codes as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = small.linear(), small.linear()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.a(x)
        codes = z.round()
        return self.b(z + (codes - z).detach()), codes


def test_what_the_rounds_of_a_residual_quantizer_add_are_no_branches() -> None:
    class Rounds(Net):
        def __init__(self) -> None:
            super().__init__()
            self.rounds = nn.ModuleList(Coder() for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rest, total, codes = x, 0, []
            for coder in self.rounds:
                y, code = coder(rest)
                total, rest = total + y, rest - y
                codes.append(code)
            return self.d(total), torch.cat(codes, -1)

    assert look(Rounds()).branches == []
