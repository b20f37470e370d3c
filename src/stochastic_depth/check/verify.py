"""``verify``: prove on a user's own model what our tests prove on ours."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch import tree_leaves, tree_map_only
from ..applied import branches, sites
from ..branch import Branch
from ..calls import call_of
from ..drop.collectives import existing_of
from ..drop.force import forced, plain
from ..find import find, run_weighed
from ..find.state import NORMS, copied, in_mode, untouched
from ..tables import table_html
from .noise import ByName, NoDropout, NoNoise, Rounding
from .outcome import Outcome, compare, differ

__all__ = ["Check", "Verification", "verify"]

_SEED = 0


@dataclass(frozen=True)
class Check:
    """One thing that was checked; ``failure`` says in words what is wrong, None that it holds."""

    name: str
    failure: str | None


@dataclass(frozen=True, repr=False)
class Verification:
    """What :func:`verify` found; prints as a list in words."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.failure is None for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(
            f"ok      {check.name}"
            if check.failure is None
            else f"FAILED  {check.name}: {check.failure}"
            for check in self.checks
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [(check.name, check.failure or "ok") for check in self.checks]
        return table_html([("check", "result"), *lines])


def verify(model: nn.Module, example_inputs: Any) -> Verification:
    """Check that stochastic depth does to ``model`` what it promises, on ``example_inputs``.

    The model stays as it is. It is compared in double precision, unless it cannot be run so, or
    gives NaN. In the checks of training, dropout is off and BatchNorm uses its running statistics,
    which keeps the samples of a batch apart.

    1. In evaluation the output is the plain model's.
    2. In training with every branch kept, so are output, gradients and buffers.
    3. At p = 1 no module with parameters inside a branch runs.
    4. A branch that is dropped alone leaves what the plain model gives without that one sum, and
       one that counts twice, what it gives with that sum counted twice.
    5. Where samples are selected, each sample is what it is where all are computed and the dropped
       ones masked. (Statistics of those that are computed, in buffers, are not.)

    Args:
        model: a model that :func:`stochastic_depth.apply` was called on.
        example_inputs: what the model is called with in training: a tensor, a tuple of arguments
            or a dict of keywords, with at least two different samples.

    Raises:
        ValueError: the model has no stochastic depth, or no values (on the meta device).

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
            "stochastic_depth.apply(model, p) first, and if its branches are only found in the "
            "first training call, with example_inputs"
        )
    args, kwargs = call_of(example_inputs)
    values = [*tree_leaves((args, kwargs)), *model.parameters(), *model.buffers()]
    if any(isinstance(t, Tensor) and t.is_meta for t in values):
        raise ValueError("verify compares values, and tensors on the meta device have none")
    with untouched(model):
        return Verification(tuple(_Verifier(model, args, kwargs).checks()))


class _Verifier:
    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.model = model
        self.args, self.kwargs = args, kwargs
        try:  # rounding says least in double precision
            self.model = copy.deepcopy(model).double()
            self.args, self.kwargs = tree_map_only(Tensor, _double, (args, kwargs))
            runs = not self._step(plain()).has_nan()
        except Exception:  # of any kind: it cannot be copied, or does not run so
            runs = False
        if not runs:
            self.model, self.args, self.kwargs = model, args, kwargs
        self.branches = branches(self.model)
        with torch.no_grad(), plain(), Rounding() as rounding:
            self._call(self.model)
        self.eps = rounding.eps

    def checks(self) -> Iterator[Check]:
        yield self._check("evaluation is the plain model's", self._evaluation)
        yield self._check("training with all branches kept is the plain model's", self._kept)
        yield self._check("a dropped branch is not executed", self._dropped)
        yield self._check("a branch dropped or weighed alone changes just its sum", self._alone)
        selected = [b for b in self.branches if b.place is not None and b.kind != "block"]
        if selected:
            yield self._check("selected samples are what they are where masked", self._samples)

    def _check(self, name: str, check: Callable[[], str | None]) -> Check:
        with untouched(self.model), in_mode(self.model, False):
            try:
                return Check(name, check())
            except Exception as error:  # of any kind: it is the answer
                return Check(name, f"{type(error).__name__}: {error}".split("\n")[0][:300])

    def _evaluation(self) -> str | None:
        with torch.no_grad():
            with untouched(self.model):
                got = self._call(self.model)
            with plain():
                expected = self._call(self.model)
        if any(branch.scale == "eval" and branch.is_active for branch in self.branches):
            return None  # which is that of the weighed model, by choice
        return differ("the output", expected, got, exact=True)

    def _kept(self) -> str | None:
        kept = dict.fromkeys(self.branches, (False, 1.0))
        expected = self._step(plain())
        if expected.has_nan():
            return "the plain model gives NaN, in its output or its gradients"
        return compare(expected, self._step(forced(kept)), exact=True)

    def _dropped(self) -> str | None:
        ran: set[str] = set()
        handles = []
        names = {id(m): name for name, m in self.model.named_modules()}
        inside = {
            m
            for site in sites(self.model)
            for branch in site.branches
            for module in site.modules_of(branch)
            for m in module.modules()
            if any(True for _ in m.parameters(recurse=False))
        }
        elsewhere = self._also_called_elsewhere(inside)
        dropped = dict.fromkeys(self.branches, (True, 1.0))
        with torch.no_grad(), forced(dropped):
            self._call(self.model)  # a block that is called in a new form is watched, and runs
        for m in inside - elsewhere:
            handles.append(
                m.register_forward_pre_hook(
                    lambda m, args: None if _is_form(m) else ran.add(names[id(m)])
                )
            )
        try:
            with torch.no_grad(), forced(dropped):
                self._call(self.model)
        finally:
            for handle in handles:
                handle.remove()
        return f"{', '.join(sorted(ran)[:5])} ran" if ran else None

    def _also_called_elsewhere(self, inside: set[nn.Module]) -> set[nn.Module]:
        """The modules that the plain model runs more often than its branches do."""
        counts = dict.fromkeys(inside, 0)
        handles = [
            m.register_forward_pre_hook(lambda m, _: counts.__setitem__(m, counts[m] + 1))
            for m in inside
        ]
        try:
            with torch.no_grad(), plain():
                self._call(self.model)
            plain_counts = dict(counts)
            found = find(self.model, self.args, self.kwargs, samples=None)
            for m in counts:
                counts[m] = 0
            weights = dict.fromkeys(found.branches, 0.0)
            run_weighed(self.model, self.args, self.kwargs, weights, found)
        finally:
            for handle in handles:
                handle.remove()
        shared = {m for m, n in plain_counts.items() if n > 1}
        return {m for m in shared if len(self._users(m)) != plain_counts[m]}

    def _users(self, module: nn.Module) -> list[Branch]:
        return [
            branch
            for site in sites(self.model)
            for branch in site.branches
            if any(m is module for own in site.modules_of(branch) for m in own.modules())
        ]

    def _alone(self) -> str | None:
        found = find(self.model, self.args, self.kwargs, samples=None)
        by_name = {branch.name: branch for branch in found.branches}
        kept = dict.fromkeys(self.branches, (False, 1.0))
        for branch in self.branches:
            same = by_name.get(branch.name)
            if same is None:
                continue  # a block as a whole, or found in another form of call
            for weight, decision in ((0.0, (True, 1.0)), (2.0, (False, 2.0))):
                with torch.no_grad(), _seeded(), NoNoise():  # type: ignore[no-untyped-call]
                    weights = {same: weight}
                    expected = run_weighed(self.model, self.args, self.kwargs, weights, found)
                    with forced({**kept, branch: decision}):
                        got = self._call(self.model)
                reference = [x for x in tree_leaves(expected) if isinstance(x, Tensor)]
                failure = differ("the output", reference, got, exact=False, eps=self.eps)
                if failure:
                    how = "dropped" if weight == 0.0 else "counted twice"
                    return f"{branch.name}, {how}: {failure}"
        return None

    def _samples(self) -> str | None:
        names = [b.name for b in self.branches if b.place is not None and b.kind != "block"]
        failure = self._samples_of(names)
        if failure is None:
            return None
        culprits = [name for name in names if self._samples_of([name]) is not None]
        return f"{failure} (branches: {', '.join(culprits) or 'only together'})"

    def _samples_of(self, names: list[str]) -> str | None:
        for seed in range(3):
            outcomes = []
            for select in (False, True):
                with self._drawing(seed, names, select):
                    # Buffers may hold statistics, of the samples that are computed.
                    outcomes.append(replace(self._step(), buffers={}))
            failure = compare(outcomes[0], outcomes[1], exact=False, eps=self.eps)
            if failure is not None:
                return failure
        return None

    @contextmanager
    def _drawing(self, seed: int, names: list[str], select: bool) -> Iterator[None]:
        """Draw decisions for samples of these branches, and select or mask what is dropped."""
        with ExitStack() as stack:
            for branch in self.branches:
                before = dict(vars(branch))
                stack.callback(vars(branch).update, before)
                vars(branch).update(mode="row", scale="train")
                branch.set_rate(0.5 if branch.name in names else 0.0)
                if not select and branch.place is not None:
                    branch.mask, branch.place = branch.place, None
            for site in sites(self.model):
                stack.callback(setattr, site, "draws", site.draws)
                site.draws = ByName(seed)
            yield

    def _call(self, model: nn.Module) -> list[Tensor]:
        with _seeded():
            args, kwargs = copied((self.args, self.kwargs))
            output = model(*args, **kwargs)
        return [x for x in tree_leaves(output) if isinstance(x, Tensor)]

    def _step(self, decisions: AbstractContextManager[None] | None = None) -> Outcome:
        """Outputs, gradients and buffers of a step of training."""
        model = self.model
        still: list[nn.Module] = [m for m in model.modules() if isinstance(m, NORMS)]
        still += _own_drops(model)
        grads = [(p, p.grad) for p in model.parameters()]
        with ExitStack() as stack:
            stack.enter_context(untouched(model))
            stack.enter_context(in_mode(model, True))
            for module in still:
                module.training = False
                stack.callback(setattr, module, "training", True)
            if decisions is not None:
                stack.enter_context(decisions)
            for p, grad in grads:
                stack.callback(setattr, p, "grad", grad)
                p.grad = None
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            with NoDropout():  # type: ignore[no-untyped-call]
                outputs = self._call(model)
            differentiable = [x for x in outputs if x.requires_grad]
            if differentiable:
                source = torch.Generator().manual_seed(_SEED)
                terms = [
                    (x * torch.randn(x.shape, generator=source, device="cpu").to(x)).sum()
                    for x in differentiable
                ]
                torch.stack([t.to(torch.float64) for t in terms]).sum().backward()  # type: ignore[no-untyped-call]
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return Outcome([x.detach() for x in outputs], gradients, buffers)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


def _own_drops(model: nn.Module) -> list[nn.Module]:
    """The DropPath modules of the branches, which drop in the plain model alone."""
    found = [existing_of(branch, site.block) for site in sites(model) for branch in site.branches]
    return [module for existing in found for _, module in existing]


def _is_form(module: nn.Module) -> bool:
    """Whether a call computes on the meta device, for the form of what a branch would return."""
    return any(p.is_meta for p in module.parameters(recurse=False))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
