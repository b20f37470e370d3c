"""``verify``: prove on a user's own model what our tests prove on ours."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .calls import call_model
from .coins import Coins
from .executor import BranchState, installed, observe
from .sampling import Mode, decide
from .surgery import branches, remove

__all__ = ["Check", "Verification", "verify"]

_SEED = 0
_RATE = 0.5


@dataclass(frozen=True)
class Check:
    """One thing that was checked; ``failure`` says in words what is wrong, None that it holds."""

    name: str
    failure: str | None


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; ``str()`` of it is a list in words."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.failure is None for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(
            f"ok      {check.name}" if check.failure is None else f"FAILED  {check.name}: {reason}"
            for check in self.checks
            for reason in [check.failure]
        )


def verify(model: nn.Module, example_inputs: Any) -> Verification:
    """Check that stochastic depth does to ``model`` what it promises, on ``example_inputs``.

    The checks run on copies, so the model stays as it is. In those of training, dropout is off
    and BatchNorm uses its running statistics, which makes the rows of a batch independent.

    1. In evaluation the output is the plain model's.
    2. In training with every branch kept, so are output, gradients and buffers.
    3. At p = 1 no module with parameters inside a branch runs.
    4. In ``"batch"`` mode a kept branch counts 1/(1-p) times and a dropped one not at all.
    5. In ``"row"`` mode each row is what it is where all rows are computed and then masked.

    Args:
        model: a model that :func:`stochastic_depth.apply` was called on.
        example_inputs: what the model is called with in training: a tensor, a tuple of arguments
            or a dict of keywords, with at least two different rows.

    Raises:
        ValueError: the model has no stochastic depth, has no values (on the meta device), or fails
            on ``example_inputs``.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> model = sd.apply(torch.nn.TransformerEncoder(layer, 2), p=0.2)
        >>> sd.verify(model, torch.randn(4, 5, 16)).passed
        True
    """
    if not branches(model):
        raise ValueError(
            f"{type(model).__name__} has no stochastic depth to verify; call "
            "stochastic_depth.apply(model) first"
        )
    if any(x.is_meta for x in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, so there are no values to compare; "
            "verify it when it is filled, or a small model of the same kind"
        )
    return Verification(tuple(_Verifier(model, example_inputs).run()))


@dataclass(frozen=True)
class _Outcome:
    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


class _Verifier:
    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.inputs = example_inputs
        self.model = copy.deepcopy(model)
        self.plain = remove(copy.deepcopy(model))
        self.branches = branches(self.model)
        self.forwards = [
            forward for m in self.model.modules() if (forward := installed(m)) is not None
        ]

    def run(self) -> Iterator[Check]:
        yield Check("in evaluation, the plain model's output", self._evaluation())
        self._train()
        kept = self._to_rounding(_Verifier._all_kept)
        yield Check("with every branch kept, the plain model's training step", kept)
        yield Check("at p = 1, no layer of a branch runs", self._all_dropped())
        batch = self._coins("batch")
        yield Check(f"with one coin a call, branches weighed by 0 or {1 / (1 - _RATE):g}", batch)
        yield Check("with a coin a row, all rows computed and masked", self._coins("row"))

    def _train(self) -> None:
        for model in (self.model, self.plain):
            for module in model.modules():
                module.training = not isinstance(module, _BatchNorm)
            for branch in self.branches:
                for name in branch.existing:  # what our coins replace would drop by itself
                    model.get_submodule(name).eval()

    def _to_rounding(self, check: Callable[["_Verifier"], str | None]) -> str | None:
        """What ``check`` says, in float64 where it fails in the model's own precision.

        There a sum that is rounded in another order can move a value over the edge of a ReLU, and
        a network without working normalisation makes much of that.
        """
        failure = check(self)
        if failure is None:
            return None
        try:
            inputs = tree_map(_to_float64, self.inputs)
            precise = _Verifier(copy.deepcopy(self.model).double(), inputs)
            precise._train()
            return check(precise)
        except Exception:  # a model may insist on its precision, in any way
            return failure

    def _evaluation(self) -> str | None:
        scales = {state.scale for f in self.forwards for state in f.states.values()}
        self._set(0.0, "batch") if "eval" in scales else None  # there p counts in evaluation
        outcomes = []
        for model in (self.plain, self.model):
            model.eval()
            with torch.no_grad():
                outcomes.append(self._call(model))
        return _difference("output", outcomes[0], outcomes[1], exact=True)

    def _all_kept(self) -> str | None:
        plain = self._step(self.plain)
        with observe(lambda state, run, inputs: run(*inputs)):
            kept = self._step(self.model)
        # Not bit by bit: an addcmul is taken apart, which rounds once more.
        return _compare(plain, kept, exact=False)

    def _all_dropped(self) -> str | None:
        self._set(1.0, "batch")
        ran: dict[str, None] = {}
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: ran.setdefault(name)
            )
            for branch in self.branches
            for name in branch.modules
            if next(self.model.get_submodule(name).parameters(), None) is not None
        ]
        try:
            self._step(self.model)
        finally:
            for handle in handles:
                handle.remove()
        return f"{', '.join(ran)} ran" if ran else None

    def _coins(self, mode: Mode) -> str | None:
        def fails(*names: str) -> str | None:
            return self._to_rounding(lambda verifier: verifier._coins_of(mode, names))

        names = [branch.name for branch in self.branches]
        failure = fails(*names)
        if failure is None:
            return None
        culprits = [name for name in names if fails(name) is not None]
        return f"{failure} (branches: {', '.join(culprits) or 'only together'})"

    def _coins_of(self, mode: Mode, names: Sequence[str]) -> str | None:
        for seed in range(3):
            self._set(_RATE, mode, names)
            coins = Coins(seed, "shared")
            for forward in self.forwards:
                forward.coins = coins
            dropped = self._step(self.model)
            reference = self._step(
                self.model, observe(_Masked(torch.Generator().manual_seed(seed)))
            )
            failure = _compare(reference, dropped, exact=False)
            if failure is not None:
                return failure
        return None

    def _set(self, p: float, mode: Mode, names: Sequence[str] | None = None) -> None:
        for branch in self.branches:
            branch.p = p if names is None or branch.name in names else 0.0
        for forward in self.forwards:
            for state in forward.states.values():
                state.mode, state.scale = mode, "train"

    def _call(self, model: nn.Module) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            output = call_model(model, self.inputs)
        return [x for x in tree_leaves(output) if isinstance(x, Tensor)]

    def _step(
        self, model: nn.Module, observing: AbstractContextManager[None] | None = None
    ) -> _Outcome:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.zero_grad()
        no_dropout = _NoDropout()  # type: ignore[no-untyped-call]
        with no_dropout, sdpa_kernel(SDPBackend.MATH), observing or nullcontext():
            outputs = self._call(model)
        differentiable = [x for x in outputs if x.requires_grad]
        if differentiable:
            generator = torch.Generator().manual_seed(_SEED)
            loss = sum(
                (x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in differentiable
            )
            loss.backward()  # type: ignore[union-attr]
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        buffers = dict(model.named_buffers())
        outcome = _Outcome(outputs, gradients, {n: b.clone() for n, b in buffers.items()})
        for name, buffer in before.items():
            if name in buffers:
                buffers[name].copy_(buffer)
        return outcome


class _Masked:
    """Computes all of a branch and masks it, with the coins that the executor tosses."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, state: BranchState, run: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        output = run(*inputs)
        dim = state.found.batch_dim
        rows = 1 if state.mode == "batch" else output.shape[dim]
        keep = decide(
            state.p,
            training=True,
            mode=state.mode,
            scale=state.scale,
            batch=rows,
            device=output.device,
            generator=self.generator,
        )
        weights = torch.full((rows,), keep.weight).to(output)
        if keep.rows is not None:
            weights = torch.zeros_like(weights).index_fill(0, keep.rows, keep.weight)
        shape = [1] * output.dim()
        shape[dim] = rows
        weights = weights.view(shape)
        if state.found.kind == "block":  # which holds its shortcut
            return inputs[0] + weights * (output - inputs[0])
        return output * weights


class _NoDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every coin of a dropout shows heads: it would draw other numbers for fewer rows."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(1.0)
        if func is torch.ops.aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


def _compare(expected: _Outcome, got: _Outcome, exact: bool) -> str | None:
    failure = _difference("output", expected.outputs, got.outputs, exact)
    if failure is None and expected.gradients.keys() != got.gradients.keys() and exact:
        failure = f"gradients of {sorted(expected.gradients.keys() ^ got.gradients.keys())[:3]}"
    for name, gradient in got.gradients.items():
        reference = expected.gradients.get(name, torch.zeros_like(gradient))
        failure = failure or _difference(f"the gradient of {name}", [reference], [gradient], False)
    for name, gradient in expected.gradients.items():
        if name not in got.gradients and gradient.any():
            failure = failure or f"{name} has no gradient"
    for name, buffer in expected.buffers.items():
        failure = failure or _difference(f"the buffer {name}", [buffer], [got.buffers[name]], exact)
    return failure


def _difference(what: str, expected: list[Tensor], got: list[Tensor], exact: bool) -> str | None:
    if len(expected) != len(got):
        return f"{len(got)} outputs instead of {len(expected)}"
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape:
            return f"{what} has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
        if (exact and torch.equal(a, b)) or a.numel() == 0:
            continue
        apart = (a.double() - b.double()).abs().max().item()
        size = max(1.0, a.double().abs().max().item())
        tolerance = 0.0 if exact else 1e3 * size * torch.finfo(_floating(a)).eps
        if not apart <= tolerance and not (a.isnan() & b.isnan() | (a == b)).all():
            return f"{what} differs by {apart:.2g}"
    return None


def _to_float64(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _floating(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.float32
