"""The verbs apply, branches and remove on small models: what they change and what they leave."""

import contextlib
import copy
import gc
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from models import (
    SMALL_BRANCHES,
    Block,
    SmallResNet,
    build,
    contents,
    images,
    small,
    small_batch,
)
from stochastic_depth.garbage import few_collections


def rates(model: nn.Module) -> dict[str, float]:
    return {branch.name: branch.p for branch in sd.branches(model)}


def applied(model: nn.Module, p: Any = 0.2, **options: Any) -> Any:
    """``sd.apply`` with a batch for a SmallResNet as its example."""
    x = small_batch(dtype=next(model.parameters()).dtype)
    return sd.apply(model, p, **{"example_inputs": x, **options})


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    start: int = 0,
    between: Callable[[], object] = lambda: None,
) -> list[float]:
    """A few steps on fixed batches, each with decisions from a seed of its own; their losses."""
    losses = []
    for i in range(start, start + steps):
        torch.manual_seed(i)
        loss = model.train()(small_batch(seed=i)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        between()
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


# --- what apply sets


def test_apply_returns_the_model_and_lists_its_branches_in_depth_order() -> None:
    model = small()
    assert sd.branches(model) == []
    assert applied(model) is model
    branches = sd.branches(model)
    assert [branch.name for branch in branches] == SMALL_BRANCHES
    assert [branch.kind for branch in branches] == [
        "identity",
        "identity",
        "projection",
        "identity",
    ]
    assert [branch.p for branch in branches] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert {(branch.mode, branch.scale) for branch in branches} == {("batch", "train")}
    assert branches[1].modules == tuple(
        f"blocks.1.{child}" for child in ("conv1", "norm1", "relu", "conv2", "norm2")
    )


@pytest.mark.parametrize(
    ("schedule", "p", "expected"),
    [
        ("linear", 0.4, [0.1, 0.2, 0.3, 0.4]),
        ("linear-timm", 0.3, [0.0, 0.1, 0.2, 0.3]),
        ("linear-efficientnet", 0.4, [0.0, 0.1, 0.2, 0.3]),
        ("uniform", 0.4, [0.4] * 4),
        ("alternating", 0.4, [0.0, 0.4, 0.0, 0.4]),
        (lambda level, depth: level / (2 * depth), None, [0.125, 0.25, 0.375, 0.5]),
        ([0.0, 0.5, 1.0, 0.25], None, [0.0, 0.5, 1.0, 0.25]),
    ],
    ids=["linear", "timm", "efficientnet", "uniform", "alternating", "function", "list"],
)
def test_every_schedule_reaches_the_branches(
    schedule: Any, p: float | None, expected: list[float]
) -> None:
    model = applied(small(), p, schedule=schedule)
    assert list(rates(model).values()) == pytest.approx(expected, abs=1e-12)


def transformer(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def test_branches_of_one_block_share_its_depth() -> None:
    model = sd.apply(transformer(), None, schedule=[0.1, 0.3], example_inputs=torch.randn(2, 3, 8))
    assert list(rates(model).values()) == [0.1, 0.1, 0.3, 0.3]


def test_depth_counts_the_chosen_blocks_only() -> None:
    model = applied(small(), p=0.4, exclude="blocks.0:*")
    assert list(rates(model)) == SMALL_BRANCHES[1:]
    assert list(rates(model).values()) == pytest.approx([0.4 / 3, 0.8 / 3, 0.4])
    model = applied(small(), None, schedule=[0.5, 0.25], include=["blocks.1*", "blocks.3*"])
    assert rates(model) == {SMALL_BRANCHES[1]: 0.5, SMALL_BRANCHES[3]: 0.25}


class Other(Block):
    """A block of another type."""


@pytest.mark.parametrize(
    ("pattern", "indices"),
    [
        ("blocks.2:conv2", [2]),
        ("*", [0, 1, 2, 3]),
        ("blocks.[01]:*", [0, 1]),
        (Other, [1]),
        (Block, [0, 1, 2, 3]),
        (nn.Module, [0, 1, 2, 3]),
        (lambda branch: branch.name == SMALL_BRANCHES[3], [3]),
        (lambda branch: branch.kind == "projection", [2]),
        (["blocks.0:*", Other], [0, 1]),
        (("blocks.3:*", "blocks.0:*"), [0, 3]),
        (iter(["blocks.0:*"]), [0]),
        ({"blocks.0:*"}, [0]),
    ],
    ids=[
        "name",
        "all",
        "glob",
        "type",
        "base",
        "module",
        "by-branch-name",
        "by-branch-kind",
        "list",
        "tuple",
        "iterator",
        "set",
    ],
)
def test_include_and_exclude_take_globs_types_functions_and_lists(
    pattern: Any, indices: list[int]
) -> None:
    def other() -> SmallResNet:
        model = small()
        model.blocks[1] = Other(4, 4)
        return model

    again = copy.copy(pattern) if hasattr(pattern, "__next__") else pattern
    included = rates(applied(other(), include=pattern))
    assert list(included) == [SMALL_BRANCHES[i] for i in indices]
    rest = [name for i, name in enumerate(SMALL_BRANCHES) if i not in indices]
    if rest:
        assert list(rates(applied(other(), exclude=again))) == rest
    else:
        with pytest.raises(ValueError, match="leaves no branch"):
            applied(other(), exclude=again)


def test_exclude_takes_away_from_include() -> None:
    model = applied(small(), include="blocks.[123]:*", exclude="blocks.2:*")
    assert list(rates(model)) == [SMALL_BRANCHES[1], SMALL_BRANCHES[3]]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["layer4*", nn.Conv2d, lambda *_: False, ["*", "typo*"]])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_what_there_is(
    argument: str, pattern: Any
) -> None:
    with pytest.raises(ValueError, match=f"{argument}=.* matches no branch; there are") as error:
        applied(small(), **{argument: pattern})
    assert ", ".join(SMALL_BRANCHES) in str(error.value)


# --- a failed apply


def fails_at(level: int) -> Callable[[int, int], float]:
    def schedule(at: int, _: int) -> float:
        if at == level:
            raise ZeroDivisionError("the user's own")
        return 0.1

    return schedule


FAILURES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"p": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
    ({"p": -0.1}, ValueError, r"\[0, 1\], got -0.1"),
    ({"p": float("nan")}, ValueError, r"\[0, 1\], got nan"),
    ({"p": "0.2"}, TypeError, "must be a number"),
    ({"p": True}, TypeError, "must be a number"),
    ({"mode": "rows"}, ValueError, "mode must be one of"),
    ({"scale": "test"}, ValueError, "scale must be one of"),
    ({"schedule": "cosine"}, ValueError, "schedule must be one of"),
    ({"p": None, "schedule": 3}, TypeError, "schedule must be"),
    ({"p": None, "schedule": [0.1, 0.2]}, ValueError, "2 rates, but there are 4"),
    ({"p": None, "schedule": [0.1, 0.2, 0.3, 1.3]}, ValueError, r"schedule\[3\].*got 1.3"),
    ({"p": None, "schedule": [0.1, 0.2, 0.3, None]}, TypeError, r"schedule\[3\]"),
    ({"p": None, "schedule": lambda *_: 2.0}, ValueError, r"schedule\(1, 4\)"),
    ({"p": None, "schedule": fails_at(4)}, ZeroDivisionError, "the user's own"),
    ({"p": 0.3, "schedule": [0.1] * 4}, ValueError, "p=0.3"),
    ({"include": "nothing"}, ValueError, "matches no branch"),
    ({"exclude": "nothing"}, ValueError, "matches no branch"),
    ({"exclude": "*"}, ValueError, "leaves no branch"),
    ({"include": 3}, TypeError, "globs"),
    ({"include": lambda: True}, TypeError, "positional argument"),
    ({"example_inputs": torch.zeros(1, 1)}, ValueError, "example_inputs must be"),
    ({"example_inputs": {"y": torch.zeros(1, 3, 8, 8)}}, ValueError, "example_inputs must be"),
    ({"seed": "one"}, TypeError, "seed must be an integer or None, got 'one'"),
    ({"ranks": "same"}, ValueError, r"ranks must be one of \('auto', .* got 'same'"),
]


@pytest.mark.parametrize("before", ["plain", "applied"])
@pytest.mark.parametrize(("arguments", "error", "message"), FAILURES)
def test_a_failed_apply_leaves_the_model_as_it_was(
    before: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = small()
    model.blocks[1].eval()
    if before == "applied":
        applied(model, None, schedule=[0.1, 0.0, 0.3, 0.4], mode="row", scale="eval")
    kept, p = contents(model), rates(model)
    random = torch.get_rng_state()
    with pytest.raises(error, match=message):
        applied(model, **arguments)
    assert contents(model) == kept
    assert rates(model) == p
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("model", [None, "resnet18", nn.Linear, [nn.Linear(2, 2)]])
def test_what_is_no_module_is_an_error(model: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        sd.apply(model, 0.2)


# --- remove


def test_remove_restores_every_dict() -> None:
    model = small()
    before = contents(model)
    applied(model, p=0.5)
    train_mode = model(small_batch())
    assert train_mode.requires_grad
    assert contents(model) != before
    assert sd.remove(model) is model
    assert contents(model) == before
    assert sd.remove(model) is model, "removing nothing is nothing"
    assert contents(model) == before


def test_remove_on_a_part_leaves_the_rest() -> None:
    model = applied(small(), p=0.4, schedule="uniform")
    sd.remove(model.blocks[1])
    assert list(rates(model)) == [SMALL_BRANCHES[i] for i in (0, 2, 3)]


def test_apply_again_sets_everything_anew() -> None:
    model = applied(small(), p=0.4, mode="row", scale="eval", include="blocks.[01]:*")
    applied(model, p=0.8, include="blocks.[123]:*", schedule="uniform")
    assert rates(model) == dict.fromkeys(SMALL_BRANCHES[1:], 0.8)
    assert {(b.mode, b.scale) for b in sd.branches(model)} == {("batch", "train")}
    assert "forward" not in model.blocks[0].__dict__


# --- one training step against a reference that masks


class Watch:
    """Sees which rows entered each branch of a SmallResNet, going by their values."""

    def __init__(self, model: SmallResNet) -> None:
        self.inputs: list[Tensor] = []
        self.seen: dict[int, Tensor] = {}
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(self._note_input)
            block.conv1.register_forward_pre_hook(lambda _, args, i=i: self._note(i, args[0]))

    def _note_input(self, _: nn.Module, args: tuple[Tensor]) -> None:
        self.inputs.append(args[0].detach().clone())

    def _note(self, i: int, rows: Tensor) -> None:
        self.seen[i] = rows.detach().clone()

    def kept(self, i: int) -> Tensor:
        """For each row of the input of block i: whether it entered the branch, once."""
        x = self.inputs[i]
        if i not in self.seen:
            return torch.zeros(len(x), dtype=torch.bool)
        alike = (x[:, None] == self.seen[i][None]).flatten(2).all(2)
        assert (alike.sum(0) == 1).all(), "a row that is not of the batch"
        return alike.sum(1) == 1


def reference(model: SmallResNet, x: Tensor, weights: list[Tensor]) -> Tensor:
    """SmallResNet with each branch computed on all rows and multiplied by a weight a row."""
    x = model.stem(x)
    for block, weight in zip(model.blocks, weights, strict=True):
        branch = block.branch(x) * weight[:, None, None, None]
        x = torch.relu(branch + block.shortcut(x))
    return model.head(x.mean((2, 3)))


@pytest.mark.parametrize("scale", ["train", "eval", "none"])
@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("norm", [False, True], ids=["group norm", "batch norm in evaluation"])
@pytest.mark.parametrize("seed", range(4))
def test_a_training_step_is_that_of_a_reference_that_masks(
    norm: bool, mode: str, scale: str, seed: int
) -> None:
    model, x = small(norm, torch.float64).train(), small_batch(8, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics of a batch would be those of the kept rows
    plain = copy.deepcopy(model)
    p = [0.3, 0.5, 0.4, 0.6]
    applied(model, None, schedule=p, mode=mode, scale=scale, seed=seed)
    watch = Watch(model)
    out = model(x)
    out.square().sum().backward()

    weights = [watch.kept(i).double() / (1 - p[i] if scale == "train" else 1.0) for i in range(4)]
    expected = reference(plain, x, weights)
    expected.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for (name, parameter), (_, wanted) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        if parameter.grad is None:  # a branch that did not run; the mask's gradient is zero
            assert not watch.kept(int(name.split(".")[1])).any(), name
            assert not wanted.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    counted = [(b.decided, b.decided - b.dropped) for b in sd.branches(model)]
    if mode == "row":
        assert counted == [(8, int(watch.kept(i).sum())) for i in range(4)]
    else:
        assert counted == [(1, int(watch.kept(i).all())) for i in range(4)]


def test_the_steps_compared_above_both_keep_and_drop() -> None:
    kept = []
    for seed in range(4):
        model = applied(small(), None, schedule=[0.3, 0.5, 0.4, 0.6], seed=seed)
        watch = Watch(model)
        model(small_batch())
        kept.append([bool(watch.kept(i).all()) for i in range(4)])
    assert all(len(set(column)) == 2 for column in zip(*kept, strict=True))


def test_a_dropped_branch_leaves_batch_norm_alone_and_a_kept_one_updates_it_as_ever() -> None:
    model, x = small(), small_batch()
    plain = copy.deepcopy(model)
    applied(model, None, schedule=[0.0, 1.0, 0.0, 1.0])
    model(x)
    reference(plain, x, [torch.full((6,), float(keep)) for keep in (1, 0, 1, 0)])
    fresh = small()
    for i, source in enumerate([plain, fresh, plain, fresh]):
        for name in ("norm1", "norm2"):
            ours, theirs = (getattr(m.blocks[i], name) for m in (model, source))
            assert torch.equal(ours.running_mean, theirs.running_mean)
            assert torch.equal(ours.running_var, theirs.running_var)
            assert ours.num_batches_tracked == theirs.num_batches_tracked == 1 - i % 2


# --- evaluation


def test_evaluation_with_scale_eval_weighs_the_branches() -> None:
    model, x = small(False, torch.float64), small_batch(4, torch.float64)
    plain = copy.deepcopy(model)
    applied(model, None, schedule=[0.1, 0.2, 0.3, 1.0], scale="eval").eval()
    weights = [torch.full((4,), 1 - p, dtype=torch.float64) for p in (0.1, 0.2, 0.3, 1.0)]
    torch.testing.assert_close(model(x), reference(plain, x, weights), rtol=1e-12, atol=1e-12)


def test_evaluating_in_the_middle_of_training_changes_nothing() -> None:
    model, other = applied(small(), p=0.5), applied(small(), p=0.5)
    optimizer, other_optimizer = sgd(model), sgd(other)

    def evaluate() -> None:
        plain = small()
        plain.load_state_dict(model.state_dict())
        random = torch.get_rng_state()
        with torch.no_grad():
            out = model.eval()(small_batch(seed=99))
            assert torch.equal(out, plain.eval()(small_batch(seed=99)))
        assert torch.equal(torch.get_rng_state(), random)

    assert train(model, optimizer, 4, between=evaluate) == train(other, other_optimizer, 4)
    assert_same_state(model, other)


@pytest.mark.parametrize(("training", "p"), [(False, 0.5), (True, 0.0), (True, 0.5), (True, 1.0)])
def test_the_block_s_own_forward_runs_whatever_is_dropped(
    training: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = applied(small(), p=p, schedule="uniform")
    forward, called = Block.forward, []

    def count(block: Block, x: Tensor) -> Tensor:
        called.append(1)
        return forward(block, x)

    monkeypatch.setattr(Block, "forward", count)
    for _ in range(2):
        model.train(training)(small_batch())
    assert len(called) == 8


def test_a_block_frozen_in_evaluation_mode_is_not_dropped() -> None:
    model = applied(small(), p=1.0, schedule="uniform").train()
    model.blocks[1].eval()
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.conv1.register_forward_hook(lambda *_, i=i: ran.append(i))
    model(small_batch())
    assert ran == [1]


# --- rates that change, decisions


def test_p_can_be_set_at_any_time() -> None:
    model, x = applied(small(), p=0.0), small_batch()
    branch = sd.branches(model)[1]
    ran: list[float] = []
    model.blocks[1].conv2.register_forward_hook(lambda *_: ran.append(branch.p))
    for p in (0.0, 1.0, 0, 1, 0.0):
        branch.p = p
        model(x)
    assert ran == [0.0, 0.0, 0.0]
    assert rates(model)[SMALL_BRANCHES[1]] == 0.0


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "0.1", None, True])
def test_a_bad_p_is_an_error_and_is_not_set(p: Any) -> None:
    branch = sd.branches(applied(small(), p=0.3, schedule="uniform"))[0]
    with pytest.raises((TypeError, ValueError), match="p "):
        branch.p = p
    assert branch.p == 0.3


def pattern(model: nn.Module, calls: int = 12) -> list[list[int]]:
    """Which branches dropped, call by call."""
    branches = sd.branches(model)
    seen = []
    for _ in range(calls):
        before = [branch.dropped for branch in branches]
        model(small_batch())
        seen.append([b.dropped - d for b, d in zip(branches, before, strict=True)])
    return seen


def seeded(seed: int | None, mode: str) -> nn.Module:
    return applied(small(), p=0.5, schedule="uniform", mode=mode, seed=seed)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_seed_fixes_the_decisions_whatever_else_is_drawn(mode: str) -> None:
    torch.manual_seed(1)
    first = pattern(seeded(7, mode))
    torch.manual_seed(2)
    random = torch.get_rng_state()
    second = pattern(seeded(7, mode))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random)
    assert first != pattern(seeded(8, mode))
    assert len({tuple(call) for call in first}) > 1


@pytest.mark.parametrize("options", [{}, {"ranks": "shared"}, {"draw": "balanced"}])
def test_seeds_differ_in_all_of_their_bits(options: dict[str, Any]) -> None:
    given = {"p": 0.5, "schedule": "uniform", **options}
    runs = [pattern(applied(small(), seed=seed, **given)) for seed in (1, 1 + (1 << 32), 1)]
    assert runs[0] == runs[2] != runs[1]


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_without_a_seed_torch_s_own_generator_fixes_the_decisions(mode: str) -> None:
    patterns = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        patterns.append(pattern(seeded(None, mode)))
    assert patterns[0] == patterns[1] != patterns[2]


def test_branches_toss_decisions_of_their_own() -> None:
    columns = list(zip(*pattern(seeded(0, "batch"), 20), strict=True))
    assert len(set(columns)) == 4


TRIPS = [("deepcopy", None), *itertools.product(("pickle", "torch.save"), (None, 5))]


def test_a_deep_copy_of_a_seeded_model_draws_for_itself() -> None:
    model = seeded(7, "batch")
    twin = copy.deepcopy(model)
    assert pattern(twin) != pattern(model) == pattern(seeded(7, "batch"))
    assert pattern(copy.deepcopy(seeded(7, "batch"))) == pattern(copy.deepcopy(seeded(7, "batch")))


@pytest.mark.parametrize(
    "look",
    [sd.verify, lambda model, x: sd.shallow(model, remove="blocks.1:conv1", example_inputs=x)],
)
def test_copies_draw_the_same_whatever_has_looked_at_the_model(look: Any) -> None:
    model = seeded(7, "batch")
    look(model, small_batch())
    assert pattern(copy.deepcopy(model)) == pattern(copy.deepcopy(seeded(7, "batch")))


@pytest.mark.parametrize(("trip", "seed"), TRIPS)
def test_a_copy_trains_on_like_the_original_and_apart_from_it(trip: str, seed: int | None) -> None:
    model = applied(small(), p=0.5, schedule="uniform", seed=seed)
    train(model, sgd(model), 2)  # its programs are built
    if trip == "deepcopy":
        twin = copy.deepcopy(model)
    elif trip == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert rates(twin) == rates(model)
    frozen = copy.deepcopy(model.state_dict())
    losses = train(twin, sgd(twin), 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, frozen[key]), key
    assert losses == train(model, sgd(model), 3)
    assert_same_state(twin, model)
    sd.branches(twin)[0].p = 1.0
    assert sd.branches(model)[0].p == 0.5


def test_several_forwards_before_one_backward_add_up() -> None:
    model, apart = (applied(small(False, torch.float64), p=0.5, seed=3) for _ in range(2))
    batches = [small_batch(4, torch.float64, seed) for seed in range(4)]
    sum(model(x).square().sum() for x in batches).backward()
    for x in batches:
        apart(x).square().sum().backward()
    ran = 0
    for (name, p), q in zip(model.named_parameters(), apart.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
            ran += 1
    assert ran > 0


# --- state, optimizers, checkpoints


@pytest.mark.parametrize("strict", [True, False])
def test_state_goes_from_plain_to_applied_and_back(strict: bool) -> None:
    model, plain = applied(small(seed=1), p=0.5), small(seed=2)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=strict)
    assert_same_state(model, plain)
    assert rates(model) == rates(applied(small(), p=0.5))
    model.load_state_dict(model.state_dict(), strict=strict)
    sd.remove(model).load_state_dict(plain.state_dict(), strict=strict)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_resumes_with_the_optimizer_s_state_by_index(
    kind: type[torch.optim.Optimizer],
) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return kind(model.parameters(), lr=0.05, weight_decay=0.01, **momentum)

    model = applied(small(), p=0.5)
    optimizer = make(model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses = train(model, optimizer, 3, start=3)

    saved = torch.load(io.BytesIO(file.getvalue()))
    resumed = applied(small(seed=5), p=0.5)
    resumed.load_state_dict(saved["model"])
    again = make(resumed)
    again.load_state_dict(saved["optimizer"])
    assert train(resumed, again, 3, start=3) == losses
    assert_same_state(resumed, model)


def test_frozen_parameters_stay_frozen_in_and_out_of_branches() -> None:
    model = small()
    frozen = ["stem.weight", "blocks.0.conv1.weight", "blocks.2.project.weight", "head.bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    applied(model, p=0.3, schedule="uniform")
    before = copy.deepcopy(dict(model.named_parameters()))
    train(model, sgd(model), 5)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in frozen), name
        assert p.requires_grad == (name not in frozen), name


class Checkpointed(SmallResNet):
    """SmallResNet that recomputes its blocks during backward."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def checkpointed(reentrant: bool | None) -> Checkpointed:
    torch.manual_seed(0)
    model = Checkpointed(norm=False)
    model.reentrant = reentrant
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["batch", "row", "subset"])
@pytest.mark.parametrize("scale", ["train", "eval"])
def test_gradient_checkpointing_changes_no_bit_of_training(
    reentrant: bool, mode: str, scale: str
) -> None:
    models = [checkpointed(None), checkpointed(reentrant)]
    for model in models:
        applied(model, p=0.5, schedule="uniform", mode=mode, scale=scale)
    losses = [train(model, sgd(model), 15) for model in models]
    assert losses[0] == losses[1]
    assert_same_state(*models)
    counts = [[(b.decided, b.dropped) for b in sd.branches(model)] for model in models]
    assert counts[0] == counts[1], "a recomputed branch was counted again"
    assert 0 < sum(dropped for _, dropped in counts[0]) < sum(decided for decided, _ in counts[0])


# --- hooks, sharing, nesting


def test_hooks_on_blocks_and_inside_of_branches_keep_firing() -> None:
    model, x = small(), small_batch()
    fired: list[str] = []
    names = ["blocks.0", "blocks.0.conv1", "blocks.0.norm2", "blocks.2.project", "blocks"]
    for when in ("before", "after"):
        for name in names:
            module = model.get_submodule(name)
            note = lambda *_, text=f"{when} {name}": fired.append(text)  # noqa: E731
            module.register_forward_hook(note)
            module.register_forward_pre_hook(note)
            if name != "blocks.0.norm2":  # torch forbids it where a sum in place follows
                module.register_full_backward_hook(note)
        if when == "before":
            applied(model, p=0.0, schedule="uniform")
            sd.branches(model)[0].p = 1e-30
            fired.clear()  # those of the run that apply watched
    model(x).sum().backward()
    expected = 3 * [f"{w} {n}" for w in ("before", "after") for n in names]
    for when in ("before", "after"):
        expected.remove(f"{when} blocks.0.norm2")
    assert sorted(fired) == sorted(expected)

    fired.clear()
    sd.branches(model)[0].p = 1.0
    model(x).sum().backward()
    outside = ["blocks.0", "blocks.2.project", "blocks"]
    assert sorted(fired) == sorted(3 * [f"{w} {n}" for w in ("before", "after") for n in outside])


def test_a_forward_hook_may_replace_a_block_s_output() -> None:
    model, x = applied(small(), p=1.0, schedule="uniform"), small_batch()
    model.blocks[3].register_forward_hook(lambda *_: torch.ones(6, 8, 4, 4))
    assert torch.equal(model(x), model.head(torch.ones(6, 8)))


def test_a_layer_replaced_after_apply_is_the_one_that_runs() -> None:
    model, x = applied(small(), p=1e-30, scale="none"), small_batch()
    model(x)
    model.blocks[0].conv1 = nn.Conv2d(4, 4, 3, 1, 1)
    plain = sd.remove(copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = Block(8, 8, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.blocks(self.backbone.stem(x))
        return self.neck(x)


def test_branches_follow_an_applied_backbone_into_a_bigger_model() -> None:
    backbone = applied(small(), p=0.4)
    detector = Detector(backbone)
    # Branches are the same objects from wherever they are asked for, and keep their names.
    assert sd.branches(detector) == sd.branches(backbone)
    assert list(rates(detector)) == SMALL_BRANCHES
    sd.branches(detector)[0].p = 1.0
    assert sd.branches(backbone)[0].p == 1.0

    applied(detector, p=0.5)
    names = [*(f"backbone.{name}" for name in SMALL_BRANCHES), "neck:conv1"]
    assert rates(detector) == pytest.approx(
        dict(zip(names, [0.1, 0.2, 0.3, 0.4, 0.5], strict=True))
    )
    assert sd.branches(backbone) == sd.branches(detector)[:4]
    detector.train()(small_batch())
    sd.remove(detector)
    assert sd.branches(backbone) == []


def test_a_layer_shared_between_a_branch_and_the_rest_runs_where_it_is_not_dropped() -> None:
    model = small()
    model.blocks[1].conv1 = model.blocks[0].conv1
    applied(model, None, schedule=[1.0, 0.0, 0.0, 0.0])
    calls: list[object] = []
    model.blocks[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    model(small_batch()).sum().backward()
    assert len(calls) == 1
    assert model.blocks[0].conv1.weight.grad is not None
    assert model.blocks[0].conv2.weight.grad is None


def test_channels_last_stays_channels_last() -> None:
    model = build("resnet18").to(memory_format=torch.channels_last)
    x = images("resnet18", 4).to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    applied(model, p=0.5, schedule="uniform", mode="row", seed=0)
    for block in [*model.layer1, *model.layer2]:
        block.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    model.train()(x)
    assert layouts == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(dtype: torch.dtype) -> None:
    model = applied(small(False, dtype), p=0.5, schedule="uniform", mode="row", seed=0)
    out = model(small_batch(8, dtype))
    assert out.dtype is dtype
    out.float().square().sum().backward()
    assert all(p.grad is None or p.grad.dtype is dtype for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_autocast_trains(mode: str) -> None:
    model = applied(small(False), p=0.5, schedule="uniform", mode=mode, seed=0)
    for seed in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(small_batch(seed=seed)).float().square().mean()
        loss.backward()
        assert torch.isfinite(loss)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_batch_of_one_trains_in_either_mode() -> None:
    for mode in ("batch", "row"):
        model = applied(small(), p=0.5, schedule="uniform", mode=mode, seed=0)
        outputs = [model(small_batch(1, seed=seed)) for seed in range(6)]
        assert all(torch.isfinite(out).all() for out in outputs)
        assert 0 < sum(branch.dropped for branch in sd.branches(model)) < 24


def test_a_model_built_on_the_meta_device_can_be_applied_first_and_filled_later() -> None:
    with torch.device("meta"):
        model = SmallResNet()
    x = small_batch().to("meta")
    applied(model, p=1.0, schedule="uniform", example_inputs=x)
    model.to_empty(device="cpu").load_state_dict(small().state_dict())
    assert_same_state(model, small())
    assert torch.equal(model.eval()(small_batch()), small().eval()(small_batch()))
    ran: list[object] = []
    model.blocks[0].conv1.register_forward_hook(lambda *_: ran.append(1))
    model.train()(small_batch())
    assert ran == []


class Collected(nn.Module):
    """Notes what a full collection needs while it is watched."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.linear, self.see = nn.Linear(4, 4), lambda: seen.append(gc.get_threshold()[2])

    def forward(self, x: Tensor) -> Tensor:
        self.see()
        return x + self.linear(x)


@pytest.mark.parametrize("inputs", [torch.randn(2, 4), torch.randn(2, 3)], ids=["fits", "fails"])
def test_collections_are_few_in_apply_and_no_longer(inputs: Tensor) -> None:
    before, seen = gc.get_threshold(), []
    with contextlib.suppress(ValueError):
        sd.apply(Collected(seen), 0.5, example_inputs=inputs)
    assert min(seen) > 100 * before[2]
    assert gc.get_threshold() == before


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_apply_leaves_nothing_for_a_collection(mode: sd.Mode) -> None:
    model = small()
    gc.collect()
    gc.disable()
    try:
        applied(model, mode=mode)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = {type(x) for x in gc.garbage if type(x).__module__.startswith("stochastic_depth")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours


def test_the_last_of_several_puts_collections_back() -> None:
    before = gc.get_threshold()
    first, second = few_collections(), few_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() != before
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before
