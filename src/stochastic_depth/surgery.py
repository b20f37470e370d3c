"""The whole-model verbs: apply, remove, branches."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from .calls import watch_calls
from .coins import Coins, check_sharing, is_flattened
from .detect import Findings, Found, Refused, find_branches, whole_blocks
from .detect.existing import existing_rate
from .executor import BranchState, ResidualForward, installed, slot
from .functional import check_dropped_grad
from .sampling import Mode, Scale, check_mode, check_p, check_scale
from .schedules import Schedule, depth_rates

__all__ = ["Branch", "Filter", "apply", "branches", "detect", "remove"]

M = TypeVar("M", bound=nn.Module)
Pattern = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Filter = Pattern | Iterable[Pattern] | None


class Branch:
    """One droppable residual branch of a model.

    Attributes:
        name: the qualified name of the block and, after a colon, which of its branches.
        kind: ``"identity"`` or ``"projection"``, the kind of its shortcut, or ``"block"`` for a
            block that is dropped as a whole.
        modules: the qualified names of the submodules that the branch runs, in order.
        existing: those of them that dropped the branch before (a DropPath) and now do nothing.
        mode, scale: how it is dropped.
        p: probability to drop; may be set at any time.
        target: the rate that was set last, of which a RateSchedule makes ``p``.
        decided: how many decisions were taken in training since ``apply``: calls, or rows in the
            modes that choose rows.
        dropped: how many of them dropped.
    """

    def __init__(self, block: str, forward: ResidualForward, state: BranchState) -> None:
        self._block = block
        self._forward = forward
        self._state = state

    @property
    def name(self) -> str:
        return branch_name(self._block, self._state.found.label)

    @property
    def kind(self) -> str:
        return self._state.found.kind

    @property
    def modules(self) -> tuple[str, ...]:
        return self._qualified(self._state.found.modules)

    @property
    def existing(self) -> tuple[str, ...]:
        return self._qualified(self._state.found.existing)

    def _qualified(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        prefix = f"{self._block}." if self._block else ""
        return tuple(prefix + m for m in modules)

    @property
    def mode(self) -> Mode:
        return self._state.mode

    @property
    def scale(self) -> Scale:
        return self._state.scale

    @property
    def p(self) -> float:
        return self._state.p

    @p.setter
    def p(self, value: float) -> None:
        self._state.p = check_p(value)
        self._state.target = None

    @property
    def target(self) -> float:
        """The rate that was set, of which a RateSchedule makes ``p``."""
        return self._state.p if self._state.target is None else self._state.target

    @property
    def applied(self) -> bool:
        """Whether it still stands in its model: not after remove(), nor applying again."""
        return installed(self._forward.block) is self._forward

    @property
    def decided(self) -> int:
        return self._state.decided

    @property
    def dropped(self) -> int:
        return self._state.dropped

    def compile(self, **options: Any) -> None:
        """Compile this branch by itself, its coin staying outside.

        For ``"batch"`` mode, where compiling the model as a whole would either break its graph at
        every coin or have to compute what is dropped.

        Args:
            options: of :func:`torch.compile`.

        Example:
            >>> import torchvision, stochastic_depth as sd
            >>> model = sd.apply(torchvision.models.resnet18())
            >>> for branch in sd.branches(model):
            ...     branch.compile()
        """
        self._forward.compile(self._state.found.label, options)

    def __repr__(self) -> str:
        return f"Branch({self.name!r}, p={self.p:.4g}, kind={self.kind!r}, mode={self.mode!r})"


def branch_name(block: str, label: str) -> str:
    """The name of a branch: its block, and which one of it."""
    return f"{block}:{label}"


def apply(
    model: M,
    p: float | None = None,
    schedule: Schedule = "linear",
    mode: str = "batch",
    scale: str = "train",
    include: Filter = None,
    exclude: Filter = None,
    whole: Filter = None,
    example_inputs: Any = None,
    seed: int | None = None,
    coins: str = "auto",
    dropped_grad: str = "none",
) -> M:
    """Add stochastic depth to every residual branch of ``model``, in place.

    Parameters, buffers, their names, the types of all modules and, with the default ``scale``,
    the output in evaluation stay exactly as they are: only the forward of the blocks with
    residual branches changes, and only in training. Applying again sets everything anew. Where
    anything is wrong, the model is left as it was.

    Args:
        model: any module. DropPath and StochasticDepth modules inside its branches are replaced
            by our coins until :func:`remove`.
        p: the rate that ``schedule`` scales, in [0, 1]: the probability to drop, 0.2 if None.
        schedule: how the rate grows with depth: ``"linear"`` (the paper's), ``"linear-timm"``,
            ``"linear-efficientnet"``, ``"uniform"``, a function (l, L) -> p with l = 1..L, or a
            list; see :func:`stochastic_depth.schedules.depth_rates`. ``"model"`` keeps the rates
            of the DropPath modules that the model already has (0 where a branch has none), and
            takes no p. Depth counts the blocks
            that are dropped from, in the order of the model's modules; the branches of one
            block share its depth.
        mode: ``"batch"``, one coin for a branch and call; ``"row"``, one for each sample, of
            which only the kept ones are computed; or ``"subset"``, a fixed number of samples,
            the nearest to B (1-p) of B. A single kept sample takes another one along through a
            branch with BatchNorm, whose statistics need more than one.
        scale: ``"train"``, a kept branch is divided by 1-p; ``"eval"``, the branch is multiplied
            by 1-p in evaluation (the paper); ``"none"``.
        include: which branches: globs on their names, block types, functions
            (block name, block) -> bool, or a list of these. None is all.
        exclude: which of them not.
        whole: blocks to drop as a whole (LayerDrop), and nothing else: globs on the names of
            modules, types, functions (name, module) -> bool, or a list of these. A dropped block
            returns the first tensor that it is given and changes nothing else, no cache either.
            Needs no tracing, so it is also the way for
            forwards that cannot be traced. With scale ``"train"`` a kept block's change of its
            input is divided by 1-p; LayerDrop has ``"none"``.
        example_inputs: what the model is called with: a tensor, a tuple of arguments or a dict
            of keywords. The model runs on them in evaluation, to see how its blocks are called
            and which tensors have the batch's rows; needed where residual branches depend on
            optional arguments, and to select rows of more than one tensor (a mask, say).
        seed: draw the coins from a generator of the model's own, seeded with this, instead of
            torch's default one. Cannot be used inside torch.compile.
        coins: in a process group, ``"shared"`` tosses the same coins on all ranks, whatever else
            these draw, and ``"separate"`` lets each rank toss its own: from torch's default
            generator, or with a ``seed`` from one seeded with that and the rank. ``"auto"`` shares
            them in ``"batch"`` mode where FSDP shards a block or modules of its branch, or where
            the branch holds SyncBatchNorm, and nowhere else. Where coins are shared without a seed,
            the first rank chooses one when the first is tossed, so that all have to take part;
            after that all ranks have to make the same calls with batches of the same size.
        dropped_grad: the gradient of the parameters of a dropped branch. ``"none"``: none, so
            the optimizer leaves them as they are; ``"zero"``: zeros, as from a mask, so momentum
            goes on moving them and weight decay shrinks them. In a process group
            (torch.distributed) it is always zeros, which the other ranks' gradients are
            averaged with.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: a bad argument; no residual branch found; a pattern that matches
            nothing.

    Example:
        >>> import torch, stochastic_depth as sd
        >>> layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        >>> model = sd.apply(torch.nn.TransformerEncoder(layer, 2), p=0.2)
        >>> [round(branch.p, 3) for branch in sd.branches(model)]
        [0.1, 0.1, 0.2, 0.2]

    Reference:
        Huang et al., Deep Networks with Stochastic Depth, ECCV 2016 (arXiv:1603.09382); Fan et
        al., Reducing Transformer Depth on Demand with Structured Dropout (LayerDrop), ICLR 2020
        (arXiv:1909.11556).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    checked_mode, checked_scale = check_mode(mode), check_scale(scale)
    checked_grad = check_dropped_grad(dropped_grad)
    if seed is not None and not isinstance(seed, int):
        raise TypeError(f"seed must be an integer or None, got {seed!r}")
    source = Coins(seed, check_sharing(coins))
    if any(map(is_flattened, model.parameters())):
        raise ValueError(
            "FullyShardedDataParallel has flattened the model's parameters, so that its blocks "
            "cannot be traced: apply first and wrap then (fully_shard may come first)"
        )
    if whole is None:
        findings = detect(model, example_inputs)
        chosen = _choose(model, findings, include, exclude)
    elif include is not None or exclude is not None:
        raise ValueError(
            "whole says which blocks are dropped; include and exclude are for branches"
        )
    else:
        findings = _whole(model, whole, example_inputs)
        chosen = findings.branches
    names = list(dict.fromkeys(found.block for found in chosen))
    if schedule == "model":
        rates = _own_rates(model, chosen, p)
    else:
        by_block = dict(zip(names, depth_rates(schedule, p, len(names)), strict=True))
        rates = [by_block[found.block] for found in chosen]
    if checked_mode != "batch":
        _warn_of_masking(chosen, checked_mode)
    states: dict[str, list[BranchState]] = {name: [] for name in names}
    for found, rate in zip(chosen, rates, strict=True):
        state = BranchState(found, rate, checked_mode, checked_scale, checked_grad)
        states[found.block].append(state)
    remove(model)
    for name in names:
        block = model.get_submodule(name)
        call, labels = findings.calls[name], findings.labels[name]
        forward = ResidualForward(block, states[name], labels, source, call)
        if whole is None:
            forward.prepare(call)
        forward.install()
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`: every block has its own forward again.

    Args:
        model: a module; one without stochastic depth is left alone.

    Returns:
        The model.

    Example:
        >>> import torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18())
        >>> sd.branches(sd.remove(model))
        []
    """
    for _, forward in _forwards(model):
        forward.uninstall()
    return model


def branches(model: nn.Module) -> list[Branch]:
    """The droppable branches of ``model`` in depth order; empty where nothing is applied.

    Example:
        >>> import torchvision, stochastic_depth as sd
        >>> model = sd.apply(torchvision.models.resnet18(), p=0.2)
        >>> sd.branches(model)[-1]
        Branch('layer4.1:conv1', p=0.2, kind='identity', mode='batch')
        >>> sd.branches(model)[0].p = 0.0  # never drop the first
    """
    return [
        Branch(name, forward, state)
        for name, forward in _forwards(model)
        for state in forward.states.values()
    ]


def detect(model: nn.Module, example_inputs: Any = None) -> Findings:
    """The residual branches that ``apply`` can drop, and what it refuses."""
    calls = None if example_inputs is None else watch_calls(model, example_inputs)
    findings = find_branches(model, calls)
    free: list[Found] = []
    refused = list(findings.refused)
    for found in findings.branches:
        if _is_free(model.get_submodule(found.block)):
            free.append(found)
        else:
            name = branch_name(found.block, found.label)
            refused.append(Refused(name, _REPLACED))
    return Findings(free, refused, findings.labels, findings.calls)


_REPLACED = "something else has replaced the block's forward"


def _is_free(block: nn.Module) -> bool:
    own = block.__dict__.get(slot(block))
    # accelerate keeps the block's own method
    of_class = getattr(own, "__func__", None) is type(block).forward
    return own is None or of_class or isinstance(own, ResidualForward)


def _whole(model: nn.Module, patterns: Filter, example_inputs: Any) -> Findings:
    """The blocks that ``whole`` names, each as one branch."""
    named = dict(model.named_modules())
    names: dict[str, None] = {}
    for pattern in _patterns(patterns):
        hits = [n for n, m in named.items() if _matches(n, n, m, pattern, "whole")]
        if not hits:
            raise ValueError(f"whole={pattern!r} matches no module of {type(model).__name__}")
        names |= dict.fromkeys(hits)
    for name in names:
        if not _is_free(named[name]):
            raise ValueError(f"whole names {name!r}, but {_REPLACED}")
    calls = None if example_inputs is None else watch_calls(model, example_inputs)
    return whole_blocks(model, [name for name in named if name in names], calls)


def _forwards(model: nn.Module) -> Iterator[tuple[str, ResidualForward]]:
    for name, block in model.named_modules():
        forward = installed(block)
        if forward is not None:
            yield name, forward


def _choose(model: nn.Module, findings: Findings, include: Filter, exclude: Filter) -> list[Found]:
    if not findings.branches:
        reasons = "".join(f"\n  {r.name or 'the model'}: {r.reason}" for r in findings.refused[:10])
        raise ValueError(
            f"no residual branch found in {type(model).__name__}: stochastic depth needs sums of "
            "a shortcut and a branch. Where the model decides by its arguments, give "
            "example_inputs; to drop blocks as a whole, name them with whole=."
            + (f" Refused:{reasons}" if reasons else "")
        )
    chosen = findings.branches
    if include is not None:
        chosen = _matching(model, chosen, include, "include")
    if exclude is not None:
        excluded = _matching(model, chosen, exclude, "exclude")
        chosen = [found for found in chosen if found not in excluded]
        if not chosen:
            raise ValueError(f"exclude={exclude!r} leaves no branch")
    return chosen


def _matching(model: nn.Module, found: list[Found], patterns: Filter, name: str) -> list[Found]:
    """The branches that a pattern matches; every pattern must match one."""
    matched: set[Found] = set()
    for pattern in _patterns(patterns):
        hits = set()
        for f in found:
            block = model.get_submodule(f.block)
            if _matches(branch_name(f.block, f.label), f.block, block, pattern, name):
                hits.add(f)
        if not hits:
            known = ", ".join(branch_name(f.block, f.label) for f in found[:8])
            more = ", ..." if len(found) > 8 else ""
            raise ValueError(f"{name}={pattern!r} matches no branch; there are {known}{more}")
        matched |= hits
    return [f for f in found if f in matched]


def _own_rates(model: nn.Module, chosen: list[Found], p: float | None) -> list[float]:
    """The rates of the branches' DropPath modules."""
    if p is not None:
        raise ValueError(f"p={p!r} and schedule='model', which keeps the model's rates: give one")
    if not any(found.existing for found in chosen):
        raise ValueError(
            f"schedule='model' keeps the rates of a model's DropPath modules, but "
            f"{type(model).__name__} has none in its residual branches; give p"
        )
    rates = []
    for found in chosen:
        drops = [model.get_submodule(found.block).get_submodule(name) for name in found.existing]
        rates.append(max((existing_rate(drop) or 0.0 for drop in drops), default=0.0))
    return rates


def _patterns(given: Filter) -> Iterable[Pattern]:
    if isinstance(given, str | type) or not isinstance(given, Iterable):
        return [given]  # type: ignore[list-item]
    return given


def _matches(full: str, name: str, block: nn.Module, pattern: Pattern, argument: str) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(full, pattern)
    if isinstance(pattern, type):
        return isinstance(block, pattern)
    if callable(pattern):
        return bool(pattern(name, block))
    raise TypeError(
        f"{argument} must be globs on names, module types or functions (name, block) -> bool, "
        f"got {pattern!r}"
    )


def _warn_of_masking(chosen: list[Found], chosen_mode: Mode) -> None:
    masked = [branch_name(f.block, f.label) for f in chosen if not f.rows_known]
    if masked:
        warnings.warn(
            f"mode={chosen_mode!r}: it cannot be told which of the tensors that enter these "
            "branches have the batch's rows, so all are computed and the dropped left out: "
            f"{', '.join(masked)}",
            stacklevel=3,
        )
