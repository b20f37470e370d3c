"""One residual branch of a model: where it is, how it is dropped, what happened so far."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch

__all__ = [
    "CHOICES",
    "COUNTS",
    "Branch",
    "DroppedGrad",
    "Kind",
    "Mode",
    "Place",
    "Scale",
    "Spot",
    "block_of",
    "check_choice",
    "check_p",
    "choices",
    "is_below",
    "label_of",
    "name_in_model",
    "put_below",
]

Kind = Literal["identity", "projection", "block"]
Mode = Literal["batch", "row", "subset"]
Scale = Literal["train", "eval", "none"]
DroppedGrad = Literal["none", "zero"]
COUNTS = "decided", "dropped"
CHOICES = {"mode": Mode, "scale": Scale, "dropped_grad": DroppedGrad}


class Place(NamedTuple):
    """Where a tensor has the samples of the batch: ``fold`` entries of ``dim``, in a row, each."""

    dim: int
    fold: int = 1


_FIRST = Place(0)


class Spot(NamedTuple):
    """An expression of the source, by where its code is."""

    file: str
    function: str
    line: int
    column: int
    end: tuple[int, int]  # line and column: a + b begins where a + b + c does


@dataclass(eq=False, repr=False)
class Branch:
    """One residual branch of a model: where it is, its rate, and how often it was dropped.

    Attributes:
        name: the qualified name of its block and, after a colon, which of its branches.
        kind: ``"identity"`` or ``"projection"``, after its shortcut; ``"block"`` for a block that
            is dropped as a whole.
        modules: the qualified names of the modules it calls, in order of execution.
        existing: those of them that used to drop it (a DropPath).
        sums: where it is added to its shortcut, and which term of that sum it is.
        joins: where it enters something that is linear in it and no plain sum (``cat``,
            ``stack``, ``addcmul``): dropped, it enters as zeros.
        in_function: a custom autograd.Function works on it in the block's forward. It passes on
            the gradients of tensors only, so no stand-in may reach it.
        turn: how many sums with other tensors it goes through before its own.
        linear: everything from its last calls to its sum is linear, so that a weight may come in
            at either end.
        place: the dimension of its sum that holds the samples; None if they can't be selected.
        mask: where its sum has the samples if all are computed and the dropped ones masked; a
            negative dimension where that is not known, so that it is dropped for the whole batch.
        reason: why samples can't be selected, and what to do about it.
        weights: the parameters that its block's forward reads for it alone, by name below the
            block.
        parameters: those of them that are read before any call, so that a dropped branch has to
            be kept from them.
        talks: a collective runs in one of its calls, or in its block's forward.
        order: its position in the order of execution.
        mode: what one decision drops: the branch for the whole batch, or single samples.
        scale: whether a kept branch is divided by 1-p in training, multiplied by it in
            evaluation, or neither.
        dropped_grad: the gradient that the parameters of a dropped branch get.
        target: the rate you set; a RateSchedule scales it to get ``p``.
        decided: how many decisions training has made: one per call, or one per sample in the
            modes that choose samples.
        dropped: how many of those dropped.
        knows_samples: whether its samples were looked for, which may be chosen then.
    """

    name: str
    kind: Kind
    modules: tuple[str, ...]
    existing: tuple[str, ...] = ()
    sums: dict[Spot, int] = field(default_factory=dict)
    joins: frozenset[Spot] = frozenset()
    in_function: bool = False
    turn: int = 0
    linear: bool = True
    place: Place | None = None
    mask: Place = _FIRST
    reason: str = ""
    weights: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    talks: bool = False
    order: int = 0
    mode: Mode = "batch"
    scale: Scale = "train"
    dropped_grad: DroppedGrad = "none"
    target: float = 0.0
    decided: int = 0
    dropped: int = 0
    knows_samples: bool = True

    def __post_init__(self) -> None:
        self.set_rate(self.target)

    @property
    def p(self) -> float:
        """The probability to drop, in [0, 1]; may be set at any time."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self.target = check_p(value)
        self.set_rate(self.target)

    @property
    def decides_calls(self) -> bool:
        """Whether one decision is for the whole batch: by its mode, or as samples are unknown."""
        return self.mode == "batch" or (self.place is None and self.mask.dim < 0)

    def check_mode(self, mode: Mode) -> None:
        """Raise where samples would be chosen that nobody has looked for."""
        if mode != "batch" and not self.knows_samples:
            raise ValueError(
                f"mode={mode!r} chooses samples, and apply() with mode='batch' has not looked for "
                f"those of {self.name}: apply with mode={mode!r}"
            )

    def set_rate(self, p: float) -> None:
        """Drop with probability ``p`` from now on, and leave the target as it is."""
        self._p = p = check_p(p)  # a float: of numpy's, decisions would be no bools
        # What compiled graphs read: a tensor, so that a new rate makes no new graph (in float64
        # torch.compile would take it for a number), and flags, as in a graph that is made for any
        # rate what is compared with it is no bool.
        self.rate = torch.tensor(p, dtype=torch.float32, device="cpu")
        self.is_active, self.is_certain, self.is_always = p > 0.0, p in (0.0, 1.0), p == 1.0

    def __repr__(self) -> str:
        return f"Branch({self.name!r}, p={self.p:.4g}, kind={self.kind!r}, mode={self.mode!r})"


class _Choice:
    """Checks what an attribute is set to, and costs nothing where it is read or another is set."""

    def __init__(self, name: str, allowed: object) -> None:
        self.name, self.allowed = name, allowed

    def __set__(self, branch: Branch, value: Any) -> None:
        check_choice(value, self.allowed, self.name)
        if self.name == "mode":
            branch.check_mode(value)
        vars(branch)[self.name] = value


for _name, _allowed in CHOICES.items():
    setattr(Branch, _name, _Choice(_name, _allowed))


class _Named(Protocol):
    @property
    def name(self) -> str:
        """A block, a colon, and a label."""


def block_of(branch: _Named) -> str:
    """The qualified name of the block of a branch, or of what was refused."""
    return branch.name.partition(":")[0]


def label_of(branch: _Named) -> str:
    """Which of its block's it is."""
    return branch.name.partition(":")[2]


def is_below(name: str, other: str) -> bool:
    """Whether a module is another one, or in it, by their qualified names."""
    return not other or name == other or name.startswith(f"{other}.")


def name_in_model(name: str, prefix: str) -> str:
    """What is called ``name`` in a module, or a branch of it, in the model where that is prefix."""
    return f"{prefix}.{name}" if prefix and name and not name.startswith(":") else prefix + name


def put_below(branch: Branch, prefix: str) -> None:
    """Name a branch that was found in a module by itself as one of the model."""
    branch.name = name_in_model(branch.name, prefix)
    branch.modules = tuple(name_in_model(name, prefix) for name in branch.modules)
    branch.existing = tuple(name_in_model(name, prefix) for name in branch.existing)


def choices(branch: Branch) -> dict[str, Any]:
    """What a user may set of a branch."""
    return {name: getattr(branch, name) for name in ("target", *CHOICES)}


def check_p(p: float, name: str = "p") -> float:
    """``p`` as a float in [0, 1].

    Raises:
        TypeError: ``p`` is not a real number.
        ValueError: ``p`` is NaN or outside [0, 1].
    """
    if isinstance(p, bool | str | bytes | complex):
        raise TypeError(f"{name} must be a number in [0, 1], got {p!r}")
    try:
        value = float(p)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number in [0, 1], got {p!r}") from error
    if not 0.0 <= value <= 1.0:  # false for NaN too
        raise ValueError(f"{name} is the probability to drop and must be in [0, 1], got {p!r}")
    return value


def check_choice(value: str, choices: object, name: str) -> str:
    """``value``, if it is one of the choices of a Literal type.

    Raises:
        ValueError: it is none of them.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
    return value
