"""``verify``: prove on a user's own model what our tests prove on ours."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._torch import tensor_leaves, tree_flatten, tree_map_only, tree_unflatten
from ..applied import branches, names_in, owners, sites
from ..branch import Branch
from ..drop.collectives import existing_of
from ..drop.draws import ASIDE
from ..drop.force import forced, plain
from ..drop.layer import StochasticDepth
from ..drop.site import Site
from ..find import find, run_weighed
from ..find.noise import NoNoise
from ..find.plan import Findings
from ..find.state import NORMS, copied, in_mode, untouched
from ..options import call_of
from .noise import ByName, NoDropout, Rounding
from .outcome import Outcome, compare, differ
from .verification import Check, Verification

__all__ = ["verify"]

_SEED = 0
_UNSEEN = "this call does not show it: verify the module that apply was given, as it is called"


def verify(model: nn.Module, example_inputs: Any) -> Verification:
    """Check that stochastic depth does to ``model`` what it promises, on ``example_inputs``.

    The model stays as it is. It is compared in double precision, unless it cannot be run so, or
    gives NaN. In the checks of training, dropout is off and BatchNorm uses its running statistics,
    which keeps the samples of a batch apart.

    1. In evaluation the output is the plain model's; with ``scale="eval"``, that in which each
       branch counts 1-p times.
    2. In training with every branch kept, so are output, gradients and buffers.
    3. At p = 1 no module with parameters inside a branch runs.
    4. A branch that is dropped alone leaves what the plain model gives without that one sum, and
       one that counts twice, what it gives with that sum counted twice. A block that is dropped as
       a whole leaves its input, or goes twice as far from it. What cannot be compared is listed.
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
    values = [*tensor_leaves((args, kwargs)), *model.parameters(), *model.buffers()]
    if any(t.is_meta for t in values):
        raise ValueError("verify compares values, and tensors on the meta device have none")
    with untouched(model):
        verifier = _Verifier(model, args, kwargs)
        return Verification(tuple(verifier.checks()), tuple(verifier.unchecked.items()))


class _Verifier:
    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.model = model
        self.args, self.kwargs = args, kwargs
        try:  # rounding says least in double precision
            self.model = copy.deepcopy(model, {ASIDE: None}).double()
            self.args, self.kwargs = tree_map_only(Tensor, _double, (args, kwargs))
            runs = not self._step(plain()).has_nan()
        except Exception:  # of any kind: it cannot be copied, or does not run so
            runs = False
        if not runs:
            self.model, self.args, self.kwargs = model, args, kwargs
        self.branches, self.names = branches(self.model), names_in(self.model)
        self.unchecked: dict[str, str] = {}
        with torch.no_grad(), plain(), Rounding() as rounding:
            self._call(self.model)
        self.eps = rounding.eps

    def checks(self) -> Iterator[Check]:
        weighed = [b for b in self.branches if b.scale == "eval" and b.is_active]
        how = ", with branches weighed by 1-p" if weighed else ""
        yield self._check(f"evaluation is the plain model's{how}", self._evaluation, weighed)
        yield self._check("training with all branches kept is the plain model's", self._kept)
        yield self._check("a dropped branch is not executed", self._dropped)
        alone = self._check("a branch dropped or weighed alone changes just its sum", self._alone)
        if len(self.unchecked) < len(self.branches):
            yield alone
        selected = [b for b in self.branches if b.place is not None and b.kind != "block"]
        if selected:
            name = "selected samples are what they are where masked"
            yield self._check(name, self._samples, selected)

    def _check(self, name: str, check: Callable[..., str | None], *args: Any) -> Check:
        with untouched(self.model), in_mode(self.model, False):
            try:
                return Check(name, check(*args))
            except Exception as error:  # of any kind: it is the answer
                return Check(name, f"{type(error).__name__}: {error}".split("\n")[0][:300])

    def _evaluation(self, weighed: list[Branch]) -> str | None:
        if weighed:
            found, same = self._found()
            weights = {same[b]: 1.0 - b.p for b in weighed if b in same}
            others = {b: (False, 1.0) for b in weighed if b not in same}
            return self._differs(found, weights, others)
        with torch.no_grad():
            with untouched(self.model):
                got = self._call(self.model)
            with plain():
                expected = self._call(self.model)
        return differ("the output", expected, got, exact=True)

    def _found(self) -> tuple[Findings, dict[Branch, Branch]]:
        """What this call of the plain model shows, and by branch the same one in it, or a block."""
        with plain():
            found = find(self.model, self.args, self.kwargs, samples=None)
        by_name = {branch.name: branch for branch in found.branches}
        same = {b: b if b.kind == "block" else by_name.get(self.names[b]) for b in self.branches}
        return found, {b: shown for b, shown in same.items() if shown is not None}

    def _differs(
        self,
        found: Findings,
        weights: dict[Branch, float],
        decisions: dict[Branch, tuple[bool, float]],
    ) -> str | None:
        """Where evaluation with decisions differs from the plain model with weighed branches."""
        own = owners(self.model)
        sums = {branch: weight for branch, weight in weights.items() if branch not in own}
        with torch.no_grad(), _seeded(), NoNoise():  # type: ignore[no-untyped-call]
            with plain(), ExitStack() as stack:
                for block in weights.keys() - sums.keys():
                    stack.enter_context(_weighed_block(own[block], weights[block]))
                expected = run_weighed(self.model, self.args, self.kwargs, sums, found)
            with forced(decisions) if decisions else nullcontext():
                got = self._call(self.model)
        return differ("the output", tensor_leaves(expected), got, exact=False, eps=self.eps)

    def _kept(self) -> str | None:
        kept = dict.fromkeys(self.branches, (False, 1.0))
        expected = self._step(plain())
        if expected.has_nan():
            return "the plain model gives NaN, in its output or its gradients"
        return compare(expected, self._step(forced(kept)), exact=True)

    def _dropped(self) -> str | None:
        users: Counter[nn.Module] = Counter()  # how many branches call a module
        for branch, owner in owners(self.model).items():
            inside = {m for module in owner.modules_of(branch) for m in module.modules()}
            users.update(m for m in inside if any(True for _ in m.parameters(recurse=False)))
        elsewhere = self._also_called_elsewhere(users) | self._in_projections()
        dropped = dict.fromkeys(self.branches, (True, 1.0))
        with torch.no_grad(), forced(dropped):
            self._call(self.model)  # a block that is called in a new form is watched, and runs
            with _called(users.keys() - elsewhere) as ran:
                self._call(self.model)
        names = sorted(name for name, m in self.model.named_modules() if ran[m])
        return f"{', '.join(names[:5])} ran" if names else None

    def _also_called_elsewhere(self, users: Counter[nn.Module]) -> set[nn.Module]:
        """The modules that the plain model runs more often than its branches do."""
        with torch.no_grad(), plain(), _called(users) as counts:
            self._call(self.model)
        return {m for m, n in counts.items() if n > 1 and n != users[m]}

    def _in_projections(self) -> set[nn.Module]:
        """The modules that wrappers call in the place of what they drop, which may be in it."""
        wrappers = [m for m in self.model.modules() if isinstance(m, StochasticDepth)]
        projections = [w.projection for w in wrappers if isinstance(w.projection, nn.Module)]
        return {m for projection in projections for m in projection.modules()}

    def _alone(self) -> str | None:
        found, same = self._found()
        reasons = {refused.name: refused.reason for refused in found.refused}
        kept = dict.fromkeys(self.branches, (False, 1.0))
        for branch in self.branches:
            name = self.names[branch]
            if branch not in same:
                self.unchecked[name] = reasons.get(name, _UNSEEN)
                continue
            for weight, decision in ((0.0, (True, 1.0)), (2.0, (False, 2.0))):
                failure = self._differs(found, {same[branch]: weight}, {**kept, branch: decision})
                if failure:
                    how = "dropped" if weight == 0.0 else "counted twice"
                    return f"{name}, {how}: {failure}"
        return None

    def _samples(self, selected: list[Branch]) -> str | None:
        failure = self._samples_of(selected)
        if failure is None:
            return None
        culprits = [self.names[b] for b in selected if self._samples_of([b]) is not None]
        return f"{failure} (branches: {', '.join(culprits) or 'only together'})"

    def _samples_of(self, selected: list[Branch]) -> str | None:
        for seed in range(3):
            outcomes = []
            for select in (False, True):
                with self._drawing(seed, selected, select):
                    # Buffers may hold statistics, of the samples that are computed.
                    outcomes.append(replace(self._step(), buffers={}))
            failure = compare(outcomes[0], outcomes[1], exact=False, eps=self.eps)
            if failure is not None:
                return failure
        return None

    @contextmanager
    def _drawing(self, seed: int, drawn: list[Branch], select: bool) -> Iterator[None]:
        """Draw decisions for samples of these branches, and select or mask what is dropped."""
        with ExitStack() as stack:
            for branch in self.branches:
                before = dict(vars(branch))
                stack.callback(vars(branch).update, before)
                vars(branch).update(mode="row", scale="train")
                branch.set_rate(0.5 if branch in drawn else 0.0)
                if not select and branch.place is not None:
                    branch.mask, branch.place = branch.place, None
            for site in sites(self.model):
                stack.callback(setattr, site, "draws", site.draws)
                site.draws = ByName(seed, self.names)
            yield

    def _call(self, model: nn.Module) -> list[Tensor]:
        with _seeded():
            args, kwargs = copied((self.args, self.kwargs))
            return tensor_leaves(model(*args, **kwargs))

    def _step(self, decisions: AbstractContextManager[None] | None = None) -> Outcome:
        """Outputs, gradients and buffers of a step of training."""
        model = self.model
        still: list[nn.Module] = [m for m in model.modules() if isinstance(m, NORMS)]
        for site in sites(model):  # and the DropPath of branches, which drop in the plain model
            still += [m for b in site.branches for _, m in existing_of(b, site.block)]
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
                torch.stack([t.cpu().double() for t in terms]).sum().backward()  # type: ignore[no-untyped-call]
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return Outcome([x.detach() for x in outputs], gradients, buffers)


@contextmanager
def _weighed_block(owner: Site | StochasticDepth, weight: float) -> Iterator[None]:
    """Move what a block returns away from its shortcut, ``weight`` times as far as it is."""
    block = owner.block if isinstance(owner, Site) else owner

    def moved(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        if isinstance(owner, Site):  # a block has one shortcut, the first tensor that fits
            shortcuts = [x for x in tensor_leaves((args, kwargs)) if x.is_floating_point()][:1]
        else:
            project = owner.projection
            shortcuts = tensor_leaves(args[0] if project is None else project(args[0]))
        leaves, structure = tree_flatten(out)
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        for i, shortcut in zip(places, shortcuts, strict=False):
            if weight == 0:
                leaves[i] = shortcut.clone()
            elif leaves[i].is_floating_point():
                leaves[i] = shortcut + weight * (leaves[i] - shortcut)
        return tree_unflatten(leaves, structure)

    with block.register_forward_hook(moved, with_kwargs=True):
        yield


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        yield


@contextmanager
def _called(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Count the calls of modules, but for those on the meta device, which ask for a form only."""
    counts: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: Any) -> None:
        counts[module] += not any(p.is_meta for p in module.parameters(recurse=False))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(note))
        yield counts


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
