"""summary(): what it counts, what it prints, and that it changes nothing."""

import copy
import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from models import SMALL_BRANCHES, Block, small, small_batch
from stochastic_depth.applied import names_in
from stochastic_depth.drop.force import forced, plain


def conv(inputs: int, outputs: int, kernel: int, pixels: int) -> int:
    """Multiplications and additions of a convolution of one image."""
    return 2 * inputs * outputs * kernel**2 * pixels


# SmallResNet on one 8x8 image, counted by hand.
FLOPS = {
    "stem": conv(3, 4, 3, 64),
    "blocks.0:conv1": 2 * conv(4, 4, 3, 64),
    "blocks.1:conv1": 2 * conv(4, 4, 3, 64),
    "blocks.2.project": conv(4, 8, 1, 16),
    "blocks.2:conv2": conv(4, 8, 3, 16) + conv(8, 8, 3, 16),
    "blocks.3:conv1": 2 * conv(8, 8, 3, 16),
    "head": 2 * 8 * 5,
}
PARAMETERS = {
    "stem": 3 * 4 * 9 + 4,
    "blocks.0:conv1": 2 * (4 * 4 * 9) + 2 * 8,
    "blocks.1:conv1": 2 * (4 * 4 * 9) + 2 * 8,
    "blocks.2.project": 4 * 8 + 8,
    "blocks.2:conv2": 4 * 8 * 9 + 8 * 8 * 9 + 2 * 16,
    "blocks.3:conv1": 2 * (8 * 8 * 9) + 2 * 16,
    "head": 8 * 5 + 5,
}
RATES = [0.1, 0.2, 0.3, 0.4]


def applied() -> nn.Module:
    return sd.apply(small(), None, schedule=RATES, example_inputs=small_batch())


def test_shares_are_those_counted_by_hand() -> None:
    result = sd.summary(applied(), small_batch(3))
    assert [row.name for row in result.rows] == SMALL_BRANCHES
    assert [row.kind for row in result.rows] == ["identity", "identity", "projection", "identity"]
    assert [row.p for row in result.rows] == RATES
    for row in result.rows:
        assert row.flops == pytest.approx(FLOPS[row.name] / sum(FLOPS.values()), rel=1e-12)
        share = PARAMETERS[row.name] / sum(PARAMETERS.values())
        assert row.parameters == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "rates"), [(3, [0, 1 / 3, 1 / 3, 1 / 3]), (10, RATES), (1, [0] * 4)]
)
def test_subset_shows_the_rates_that_take_effect_on_the_example(rows, rates) -> None:
    model = sd.apply(small(), None, schedule=RATES, mode="subset", example_inputs=small_batch())
    result = sd.summary(model, small_batch(rows))
    assert [row.p for row in result.rows] == pytest.approx(rates)
    for branch in sd.branches(model):
        assert branch.decided == 0
    model(small_batch(rows))
    taken = [branch.dropped / branch.decided for branch in sd.branches(model)]
    assert taken == pytest.approx(rates)
    assert [row.p for row in sd.summary(model).rows] == RATES


def test_expected_depth_and_compute_follow_from_the_rates() -> None:
    model = applied()
    result = sd.summary(model, small_batch(1))
    assert result.depth == 4
    assert result.expected_depth == pytest.approx(4 - sum(RATES))
    dropped = sum(p * FLOPS[name] for p, name in zip(RATES, SMALL_BRANCHES, strict=True))
    assert result.compute_kept == pytest.approx(1 - dropped / sum(FLOPS.values()))

    sd.branches(model)[3].p = 1.0
    assert sd.summary(model).expected_depth == pytest.approx(4 - 0.6 - 1.0)


def measure(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.train()(small_batch())
    return counter.get_total_flops()


@pytest.mark.parametrize("dropped", [[], [0], [2], [1, 3], [0, 1, 2, 3]])
def test_compute_kept_is_what_a_training_forward_computes(dropped: list[int]) -> None:
    model = sd.apply(
        small(),
        None,
        schedule=[float(i in dropped) for i in range(4)],
        example_inputs=small_batch(),
    )
    kept = measure(model) / measure(small())
    assert sd.summary(model, small_batch()).compute_kept == pytest.approx(kept, rel=1e-12)


def test_attention_counts_and_nothing_else_is_in_a_transformer_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = sd.apply(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), p=0.5)
    result = sd.summary(model, torch.randn(2, 5, 8))
    assert sum(row.flops for row in result.rows) == pytest.approx(1.0)
    projections, scores, mlp = 2 * 5 * 8 * 8 * 4, 2 * 2 * 5 * 5 * 8, 2 * 5 * 8 * 16 * 2
    total = 2 * (projections + scores + mlp)
    assert result.rows[0].flops == pytest.approx((projections + scores) / total)
    assert result.rows[1].flops == pytest.approx(mlp / total)


def test_equal_layers_have_equal_flops_where_attention_in_steps_is_another_run() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.mlp = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            if not torch.backends.cuda.flash_sdp_enabled():  # as where attention goes in steps
                out = (out + 0).contiguous()
            x = x + out
            return x + self.mlp(x)

    model, x = nn.Sequential(*[Attention() for _ in range(4)]), torch.randn(2, 5, 8)
    rows = sd.summary(sd.apply(model, 0.5, example_inputs=x), x).rows
    attention, mlp = 2 * 10 * 8 * 24 + 2 * 2 * 10 * 5 * 8, 2 * 10 * 8 * 8
    total = 4 * (attention + mlp)
    assert len(rows) == 8
    for row, expected in zip(rows, 4 * [attention, mlp], strict=True):
        assert row.flops == pytest.approx(expected / total)


class Biased(nn.Module):
    """Attends with a position bias that is computed of constants, in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(4, 4), nn.Linear(8, 4)
        self.register_buffer("positions", torch.randn(5, 8))

    def forward(self, x):
        return self.linear(x) * self.bias(self.positions)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Biased()

    def forward(self, x):
        return x + self.attention(x)


def test_what_a_branch_computes_of_constants_is_its_work() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), Attending()), torch.randn(3, 5, 4)
    sd.apply(model, 0.5, example_inputs=x)
    (row,) = sd.summary(model, x).rows
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model.eval()(x)
    with FlopCounterMode(display=False) as without, torch.no_grad():
        model[0](x)
    assert row.flops == pytest.approx(1 - without.get_total_flops() / whole.get_total_flops())


FIRST = """
import sys, torch, stochastic_depth as sd
layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
model, x = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 8)
sd.apply(model, p=0.5, example_inputs=x)
assert "torch._dynamo" not in sys.modules  # which counting FLOPs imports
print([sum(row.flops for row in sd.summary(model, x).rows) for _ in range(2)])
"""


def test_the_first_summary_of_a_process_counts_as_the_second_does() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert done.stdout == "[1.0, 1.0]\n", done.stderr


class Scaled(nn.Module):
    def forward(self, x, scale):
        return x * scale


class Parametrized(nn.Module):
    """Gives a parameter to a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scaled, self.scale = (
            nn.Linear(4, 4),
            Scaled(),
            nn.Parameter(torch.ones(4)),
        )

    def forward(self, x):
        return x + self.scaled(self.linear(x), self.scale.expand(len(x), -1))


def test_a_parameter_may_be_an_input() -> None:
    model, x = nn.Sequential(Parametrized(), Parametrized()), torch.randn(3, 4)
    sd.apply(model, 0.5, example_inputs=x)
    assert [row.flops for row in sd.summary(model, x).rows] == [0.5, 0.5]


def test_a_parameter_that_two_layers_of_a_branch_share_counts_once() -> None:
    model = small()
    model.blocks[3].conv2.weight = model.blocks[3].conv1.weight
    result = sd.summary(sd.apply(model, 0.2))
    total = sum(PARAMETERS.values()) - 8 * 8 * 9
    assert result.rows[3].parameters == pytest.approx((PARAMETERS["blocks.3:conv1"] - 576) / total)


def test_without_example_inputs_there_are_no_flops() -> None:
    result = sd.summary(applied())
    assert [row.flops for row in result.rows] == [None] * 4
    assert result.compute_kept is None
    assert "not measured: give example_inputs" in str(result)


def test_a_plain_model_shows_what_could_be_dropped() -> None:
    result = sd.summary(small(), small_batch())
    assert result.rows == ()
    assert result.unused == tuple(SMALL_BRANCHES)
    assert result.expected_depth == 0
    assert result.compute_kept == 1.0


class Refused(Block):
    def forward(self, x):
        out = self.branch(x)
        return (x + out) * out.sigmoid()


def test_the_table_shows_branches_totals_leftovers_and_refusals() -> None:
    model = small()
    model.blocks.append(Refused(8, 8))
    options = {"exclude": "blocks.1:*", "example_inputs": small_batch()}
    sd.apply(model, None, schedule=[0.1, 0.3, 0.4], **options)
    lines = str(sd.summary(model)).splitlines()  # 304, 896 and 1184 of 4069 parameters
    assert [line.rstrip() for line in lines] == [
        "branch          kind            p  params  FLOPs",
        "------------------------------------------------",
        "blocks.0:conv1  identity    0.100    7.5%      -",
        "blocks.2:conv2  projection  0.300   22.0%      -",
        "blocks.3:conv1  identity    0.400   29.1%      -",
        "------------------------------------------------",
        "expected depth  2.20 of 3 branches",
        "compute kept    not measured: give example_inputs",
        "not dropped     blocks.1:conv1",
        "skipped         blocks.4:conv1: what the branch computes is also used outside of it: "
        "compute what both need before the branch",
    ]
    measured = str(sd.summary(model, -small_batch().abs()))
    assert "compute kept    " in measured
    assert "not measured" not in measured


def test_a_wrapper_is_a_row_like_any_branch() -> None:
    model = nn.Sequential(nn.Linear(4, 4), sd.StochasticDepth(nn.Linear(4, 4), 0.25))
    (row,) = sd.summary(model, torch.zeros(2, 4)).rows
    assert (row.name, row.kind, row.p, row.parameters) == ("1", "block", 0.25, 0.5)
    assert row.flops == pytest.approx(0.5)


def test_a_summary_changes_nothing() -> None:
    model = sd.apply(small(), p=0.5, schedule="uniform", example_inputs=small_batch())
    model.blocks[0].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    sd.summary(model, small_batch())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert [(b.decided, b.dropped, b.p) for b in sd.branches(model)] == [(0, 0, 0.5)] * 4
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("bad", [torch.zeros(1, 5), {"image": torch.zeros(1, 3, 8, 8)}, (1, 2)])
def test_bad_example_inputs_are_an_error_and_change_nothing(bad: object) -> None:
    model = applied().train()
    with pytest.raises(ValueError, match="example_inputs must be what the model is called with"):
        sd.summary(model, bad)
    assert all(module.training for module in model.modules())
    assert [b.decided for b in sd.branches(model)] == [0] * 4
    assert torch.isfinite(model(small_batch())).all()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


def test_the_slowest_of_many_ranks_is_told() -> None:
    model = sd.apply(nn.Sequential(*[Mlp() for _ in range(6)]), 0.5, schedule="uniform")
    x = torch.randn(2, 4)
    result = sd.summary(model, x, ranks=8)
    # All compute is in branches of one cost: half of it runs, or what the slowest of 8 keeps of 6.
    below = torch.tensor([math.comb(6, k) / 64 for k in range(7)]).cumsum(0)[:-1]
    independent = 1.0 - (below**8).mean().item()
    assert result.slowest == pytest.approx(
        {"independent": independent, "shared": 0.5, "balanced": 0.5}, abs=1e-3
    )
    assert f"slowest of 8    {independent:.1%} independent, 50.0% shared, 50.0% balanced" in str(
        result
    )
    assert sd.summary(model, x).slowest == {}  # one rank
    assert sd.summary(model, ranks=8).slowest == {}  # no FLOPs
    sd.apply(model, 0.5, mode="row", example_inputs=x)
    assert sd.summary(model, x, ranks=8).slowest == {}
    with pytest.raises(ValueError, match=r"ranks is how many take part in a step, .* got 0"):
        sd.summary(model, ranks=0)


class Outer(nn.Module):
    """A branch with another one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(Mlp(), nn.Linear(4, 4, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.f(x)


def nested(how: str) -> nn.Module:
    torch.manual_seed(0)
    model, x = nn.Sequential(Outer(), nn.Linear(4, 4), Outer()), torch.randn(2, 4)
    if how == "blocks":
        return sd.apply(model, 0.5, blocks=[Outer, Mlp], example_inputs=x)
    if how == "wrappers":
        model[0].f[0] = sd.StochasticDepth(model[0].f[0], 0.5)
        model[2].f[0] = sd.StochasticDepth(model[2].f[0], 0.5)
        return sd.apply(model, 0.5, example_inputs=x)
    sd.apply(model, 0.5, example_inputs=x)
    for outer in (model[0], model[2]):
        sd.apply(outer.f, 0.5, example_inputs=x)
    return model


@pytest.mark.parametrize("how", ["blocks", "wrappers", "parts"])
def test_what_nested_branches_keep_is_exact(how: str) -> None:
    model, x = nested(how), torch.randn(2, 4)
    branches = {name: branch for branch, name in names_in(model).items()}
    assert len(branches) == 4
    rates = dict(zip(branches, [0.1, 0.3, 0.6, 0.8], strict=True))
    runs, whole = [], 5 * 2 * 2 * 16  # FLOPs of five linear layers
    for drops in itertools.product([0.0, 1.0], repeat=4):
        chance = 1.0
        for (name, branch), p in zip(branches.items(), drops, strict=True):
            branch.p = p
            chance *= rates[name] if p else 1.0 - rates[name]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.train()(x)
        kept = counter.get_total_flops() / whole
        assert sd.summary(model, x).compute_kept == pytest.approx(kept)
        runs.append((chance, kept))
    for name, branch in branches.items():
        branch.p = rates[name]
    result = sd.summary(model, x, ranks=2)
    expected = sum(chance * kept for chance, kept in runs)
    assert result.compute_kept == pytest.approx(expected)
    highest = sum(p * q * max(a, b) for p, a in runs for q, b in runs)
    assert result.slowest["independent"] == pytest.approx(highest, abs=1e-3)
    assert result.slowest["shared"] == pytest.approx(expected)
    assert expected < result.slowest["balanced"] < highest + 0.02
    outer = [row for row in result.rows if row.inside is None]
    inner = {row.inside: row for row in result.rows if row.inside is not None}
    depth = sum((1.0 - row.p) * (1.0 + (1.0 - inner[row.name].p)) for row in outer)
    assert result.expected_depth == sd.summary(model).expected_depth == pytest.approx(depth)


class Classifier(nn.Module):
    """A wrapper around what stochastic depth is applied to."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Sequential(Mlp(), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def stack() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Mlp(), Leaky(), Mlp())


class Leaky(Mlp):
    """What its branch computes is used outside of it, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x)
        return (x + out) * out


LEAK = "what the branch computes is also used outside of it: compute what both need before the"


def test_branches_have_their_names_in_the_model_that_is_given() -> None:
    x = torch.randn(2, 4)
    backbone = sd.apply(stack(), 0.5, schedule="uniform", example_inputs=x)
    model = Classifier(backbone)
    for given in (None, x):
        result = sd.summary(model, given)
        assert [row.name for row in result.rows] == ["backbone.0:linear", "backbone.2:linear"]
        assert [(name, LEAK in why) for name, why in result.refused] == [
            ("backbone.1:linear", True)
        ]
    assert result.unused == ("head.0:linear",)
    assert [row.flops for row in result.rows] == pytest.approx([16 / 76] * 2)
    assert result.compute_kept == pytest.approx(60 / 76)
    assert [branch.name for branch in sd.branches(model)] == ["0:linear", "2:linear"]
    whole = sd.apply(model, 0.5, schedule="uniform", include="backbone.*", example_inputs=x)
    for given in (None, x):
        result = sd.summary(whole.backbone, given)
        assert [row.name for row in result.rows] == ["0:linear", "2:linear"]
        assert [name for name, _ in result.refused] == ["1:linear"]
        assert result.unused == ()
    backbone.insert(0, nn.Linear(4, 4))  # blocks that have moved
    result = sd.summary(backbone, x)
    assert [row.name for row in result.rows] == ["1:linear", "3:linear"]
    assert [row.flops for row in result.rows] == [0.25, 0.25]


def test_what_was_refused_in_any_part_is_told_once() -> None:
    x = torch.randn(2, 4)
    parts = nn.Sequential(*[sd.apply(stack(), 0.5, example_inputs=x) for _ in range(2)])
    for given in (None, x):
        assert [name for name, _ in sd.summary(parts, given).refused] == [
            "0.1:linear",
            "1.1:linear",
        ]


class Apart(nn.Module):
    """Its parts are called by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.d = nn.Sequential(nn.Linear(4, 4), Mlp()), nn.Sequential(Leaky())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("first", ["g", "d"])
def test_what_was_refused_stays_told_where_a_part_has_no_branch(first: str) -> None:
    model, x = sd.apply(Apart(), 0.5), torch.randn(2, 4)
    for name in (first, "d" if first == "g" else "g"):
        model.get_submodule(name)(x)
        assert [name for name, _ in sd.summary(model).refused] == ["d.0:linear"]
    assert [branch.name for branch in sd.branches(model)] == ["g.1:linear"]


def test_what_failed_on_trial_is_told_with_its_reason_on_other_inputs_too() -> None:
    class Needy(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = x + self.linear(x)
            if torch.equal(out, x):
                raise ArithmeticError("nothing was added")
            return out

    model, x = nn.Sequential(Mlp(), Needy()), torch.randn(2, 4)
    sd.apply(model, 0.5, example_inputs=x)
    result = sd.summary(model, x)
    assert result.unused == ()
    assert result.refused == sd.summary(model).refused
    assert "the model fails where it is left out: ArithmeticError" in result.refused[0][1]


class Turned(nn.Module):
    """Takes its batch in a dict, with the samples in a dimension of one's choice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"]
        x = x + self.first(x)
        return x + self.second(x)


@pytest.mark.parametrize(
    ("shape", "samples", "size"), [((5, 7, 6), 0, 5), ((7, 5, 6), 1, 5), ((15, 7, 6), (0, 3), 5)]
)
def test_subset_counts_the_samples_where_they_are(shape, samples, size) -> None:
    inputs = ({"x": torch.randn(shape)},)
    options = {"mode": "subset", "schedule": "uniform", "example_inputs": inputs}
    model = sd.apply(Turned(), 0.5, samples=samples, **options)
    model(*inputs)
    dropped = [branch.dropped for branch in sd.branches(model)]
    rows = sd.summary(model, inputs).rows
    assert [row.p for row in rows] == [n / size for n in dropped] == [0.6, 0.6]
    assert [branch.dropped for branch in sd.branches(model)] == dropped


def flops_of(model: nn.Module, x: torch.Tensor, decisions: dict | None = None) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), plain() if decisions is None else forced(decisions):
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("recipe", ["new", "tied", "copy"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_projections_of_wrappers_are_computed_besides(recipe: str, p: float) -> None:
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    inner = sd.StochasticDepth(body, p, projection=recipe)
    model = nn.Sequential(sd.StochasticDepth(nn.Linear(6, 6), 0.5), inner, nn.Linear(8, 2))
    outer = sd.StochasticDepth(model, 0.2, projection="new").eval()
    x, branches = torch.randn(4, 6), sd.branches(outer)
    expected = 0.0
    for dropped in itertools.product([False, True], repeat=len(branches)):
        chosen = zip(branches, dropped, strict=True)
        decisions = {b: (d, 1.0) for b, d in chosen if b.p > 0.0}  # at 0 it is out of the way
        chances = [b.p if d else 1.0 - b.p for b, d in zip(branches, dropped, strict=True)]
        expected += math.prod(chances) * flops_of(outer, x, decisions)
    kept = sd.summary(outer, x).compute_kept
    assert kept == pytest.approx(expected / flops_of(outer, x), rel=1e-12)


class Sized(nn.Module):
    """Its shapes cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 10
        out: torch.Tensor = self.conv(x)
        return out


def test_a_projection_that_the_first_batch_makes_is_counted_and_not_made() -> None:
    layer = sd.StochasticDepth(Sized(), 0.3, projection="new")
    random = torch.get_rng_state()
    result = sd.summary(layer, torch.randn(2, 4, 10, generator=torch.Generator()))
    assert result.compute_kept == pytest.approx(1 / 3 + 0.7)
    assert (layer.projection, layer.recipe) == (None, "new")
    assert torch.equal(torch.get_rng_state(), random)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return x + self.second(h - h.mean(0))


@pytest.mark.filterwarnings("ignore:.*samples cannot be selected:UserWarning")
@pytest.mark.parametrize("mode", ["row", "subset"])
def test_masked_branches_save_nothing(mode: str) -> None:
    x = torch.randn(6, 6)
    model = nn.Sequential(Centred(), nn.Linear(6, 2))
    sd.apply(model, 0.5, mode=mode, samples=0, example_inputs=x)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.train()(x)
    result = sd.summary(model, x)
    assert result.compute_kept == counter.get_total_flops() / flops_of(model, x) == 1.0
    assert "masked          0:" in str(result)
    assert result.expected_depth == 0.5
