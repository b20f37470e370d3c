"""Where values have the samples of the batch, and whether these stay apart: seen in two more runs.

One has a sample more: what grows by one has the samples in that dimension, what grows by a multiple
has so many entries of each. The other has the samples in other positions, and every second one
replaced: a branch keeps samples apart if all that are left are what they were.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..branch import Branch, Place, name_in_model
from .batch import Batch, Samples, mapped, ways_to_batch
from .flow import Flow, Key
from .frames import Frame
from .meet import record
from .plan import Findings, Gate
from .plans import Planned
from .record import Recorder
from .regions import Region
from .remembering import held_in, remembering
from .tensors import tensors_within
from .zeros import without, zeros_in

__all__ = ["NOWHERE", "place_samples"]

NOWHERE = Place(-1)  # the branch is dropped for the whole batch; of an argument, no tensor's
_WHOLE = ", so it is dropped for the whole batch"
_NO_SAMPLES = f"no tensor of example_inputs has a dimension of samples{_WHOLE}"
_STREWN = f"the entries of a sample are not next to each other in it{_WHOLE}"
_PARTS = 256  # numbers by which a sample of a value is compared


@dataclass
class _Evidence:
    """What the runs say of each value that was looked at.

    Attributes:
        places: where it has the samples.
        unclear: why that cannot be said.
        changed: those of which samples changed that were only moved.
        alike: those that are the same for all samples.
        strewn: those that have the samples' entries apart, but not next to each other.
        remembering: the names of modules whose next call reads what they keep of this one.
    """

    places: dict[int, Place | None]
    unclear: dict[int, str]
    changed: set[int]
    alike: set[int]
    strewn: set[int]
    remembering: set[str]


class _Watching(Recorder):
    """Also looks at the samples of some values, which it finds again by where they are made."""

    def __init__(
        self, model: nn.Module, constants: list[Tensor], small: Flow, watched: set[int], size: int,
        drawn: dict[Key | None, int],
    ) -> None:  # fmt: skip
        super().__init__(model, constants)
        self.small, self.size, self.drawn = small, size, drawn
        self.watched: dict[Key | None, int] = {small.nodes[n].key: n for n in watched}
        self.places: dict[int, Place | None] = {}
        self.unclear: dict[int, str] = {}
        self.samples: dict[int, Tensor] = {}
        self.strewn: dict[int, Tensor] = {}  # the same, were the entries of a sample not in a row

    def _name(self, t: Tensor, node: int) -> None:
        super()._name(t, node)
        at = self.watched.get(self.flow.nodes[node].key)
        if at is None:
            return
        try:
            place = _grown(self.small.nodes[at].shape, tuple(t.shape), self.size)
        except LookupError as error:
            self.unclear[at] = str(error)
            return
        self.places[at] = place
        if place is not None:
            self.paused = True
            self.samples[at] = _digest(t.detach(), place, self.size + 1)
            if place.fold > 1:
                self.strewn[at] = _digest(t.detach(), place, self.size + 1, in_a_row=False)
            self.paused = False

    def after(self, name: str, given: list[Tensor], made: list[Tensor], number: int) -> None:
        """Move the numbers that are drawn for each sample with it."""
        at = self.drawn.get(self.flow.nodes[number].key)
        if at is None:
            return
        try:
            place = _grown(self.small.nodes[at].shape, tuple(made[0].shape), self.size)
        except LookupError:
            return
        if place is not None:
            made[0].copy_(made[0].roll(place.fold, place.dim))


def _grown(small: tuple[int, ...], large: tuple[int, ...], size: int) -> Place | None:
    """Where a value has the samples; LookupError where that is not clear."""
    if len(small) != len(large):
        raise LookupError("the number of dimensions depends on the number of samples")
    apart = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if not apart:
        return None
    if len(apart) > 1:
        raise LookupError("several dimensions grow with the number of samples")
    a, b = small[apart[0]], large[apart[0]]
    if a % size or a * (size + 1) != b * size:
        raise LookupError("a dimension does not grow as the number of samples does")
    return Place(apart[0], a // size)


def _digest(t: Tensor, place: Place, size: int, in_a_row: bool = True) -> Tensor:
    """Some numbers for each sample, in which any change of it shows; of large values no copy."""
    t = torch.view_as_real(t) if t.is_complex() else t
    split = (size, place.fold) if in_a_row else (place.fold, size)
    shape = (*t.shape[: place.dim], *split, *t.shape[place.dim + 1 :])
    t = t.reshape(shape).movedim(place.dim + (not in_a_row), 0).reshape(size, -1)
    each = t.shape[1] // _PARTS
    parts = t[:, : each * _PARTS].reshape(size, -1, max(each, 1))
    numbers = torch.cat([parts.sum(2), parts[:, :, 0], t[:, each * _PARTS :]], 1)
    return numbers.cpu().double().nan_to_num()


def place_samples(
    model: nn.Module, args: Any, kwargs: Any, flow: Flow, planned: Planned, known: Samples
) -> None:
    """Say of each branch where its samples are, or why they cannot be selected."""
    branches, planned.findings.samples = planned.findings.branches, known
    best: dict[Branch, tuple[Place | None, str]] = {}
    chosen: _Evidence | None = None
    reason = ""
    for batch in ways_to_batch((args, kwargs), known) if branches else ():
        try:
            evidence = _evidence(model, args, kwargs, flow, planned, batch)
        except Exception as error:  # of any kind: the model does not take it
            told = (str(error) or type(error).__name__).splitlines()[0][:120]
            reason = reason or f"the model cannot be run with one sample more ({told}){_WHOLE}"
            continue
        judged = {b: _judge(flow, planned.regions[b], evidence) for b in branches}
        apart = sum(place is not None for place, _ in judged.values())
        if chosen is None or apart > sum(place is not None for place, _ in best.values()):
            best, chosen = judged, evidence
            planned.findings.batched = frozenset(batch.dims.values())
        if apart == len(branches) or any(told == _STREWN for _, told in judged.values()):
            break  # in another dimension there would be something else than samples
    for branch in branches:
        branch.place, branch.reason = best.get(branch, (None, reason or _NO_SAMPLES))
        branch.mask = NOWHERE
        if chosen is not None:
            branch.mask = _mask(planned.regions[branch], chosen)
            if branch.mask == NOWHERE and _WHOLE not in branch.reason:
                branch.reason += _WHOLE
    if chosen is not None:
        for frame in reversed(planned.frames):  # of several calls, as the first one has it
            _fill(flow, frame, planned.findings, chosen)


def _evidence(
    model: nn.Module, args: Any, kwargs: Any, flow: Flow, planned: Planned, batch: Batch
) -> _Evidence:
    watched = set(_watched(flow, planned))
    drawn = {x.key: n for n, x in enumerate(flow.nodes) if x.random and not x.sources}

    def run(change: Any, drawn: dict[Key | None, int]) -> _Watching:
        given, named = mapped((args, kwargs), batch, partial(change, rows=batch.rows))
        watch: _Watching = record(
            model,
            given,
            named,
            recorder=lambda m, constants: _Watching(m, constants, flow, watched, batch.size, drawn),
            constants=flow.constants,
        ).watch
        return watch

    if any(t.is_meta for t in tensors_within((args, kwargs), 0)):
        raise ValueError("there are no values on the meta device")
    with without(zeros_in(model)):
        more, other = run(_one_more, {}), run(_moved, drawn)
    unclear = dict(more.unclear)
    for node in watched:
        if node not in other.places or (node not in more.places and node not in unclear):
            unclear.setdefault(node, "what the model does depends on the number of samples")
    regions = [region for found in planned.regions.values() for region in found]
    evidence = _Evidence(
        more.places, unclear, set(), set(), set(), remembering(model, args, kwargs, flow, regions)
    )
    for node, samples in more.samples.items():
        made = flow.nodes[node]
        eps = torch.finfo(made.dtype).eps if made.is_continuous and made.dtype else 0.0
        moved = other.samples.get(node)
        if moved is not None and _is_moved(samples, moved, eps):
            if torch.equal(samples.roll(1, 0)[1::2], moved[1::2]):
                evidence.alike.add(node)
        elif moved is not None and _is_alike(samples, moved, eps):
            evidence.alike.add(node)
        else:
            evidence.changed.add(node)
            before, after = more.strewn.get(node), other.strewn.get(node)
            if before is not None and after is not None and _is_moved(before, after, eps):
                evidence.strewn.add(node)
    return evidence


def _is_alike(samples: Tensor, moved: Tensor, eps: float) -> bool:
    """Whether those that were replaced, too, are as they were, but for rounding."""
    return float((samples.roll(1, 0) - moved).abs().max()) <= 4 * eps * float(samples.abs().max())


def _is_moved(samples: Tensor, moved: Tensor, eps: float) -> bool:
    """Whether the samples that were only moved are as they were."""
    apart = (samples.roll(1, 0) - moved).abs()
    kept, replaced = float(apart[::2].max()), float(apart[1::2].max())
    # Where samples hardly differ, what another place in the batch rounds is not much less.
    is_rounding = kept <= 4 * eps * float(samples.abs().max()) and 20 * kept <= replaced
    return is_rounding or kept <= max(1e-3, 10 * eps) * replaced


def _other(t: Tensor, dim: int, rows: int, factor: float) -> Tensor:
    """Other samples of the same kind; of numbers that may mean something, those of others."""
    last = t.dim() - 1
    if last == 0 and not t.is_floating_point():
        return t.flip(0)
    t = t.roll(rows, dim)
    if last != dim:
        t = t.flip(last)
    elif last:
        t = t.flip(last - 1)
    return t * factor + 0.1 if t.is_floating_point() else t


def _one_more(t: Tensor, dim: int, rows: int) -> Tensor:
    return torch.cat([t, _other(t.narrow(dim, 0, rows), dim, rows, 0.9)], dim)


def _moved(t: Tensor, dim: int, rows: int) -> Tensor:
    """The same, each one on, and every second one replaced by a larger one, which max() takes."""
    more = _one_more(t, dim, rows)
    moved = more.roll(rows, dim)
    odd = torch.arange(more.shape[dim], device=t.device).view(-1, rows)[1::2].flatten()
    return moved.index_copy(dim, odd, _other(more, dim, rows, 3.1).index_select(dim, odd))


def _watched(flow: Flow, planned: Planned) -> Iterator[int]:
    for regions in planned.regions.values():
        for region in regions:
            yield from (region.sum, region.shortcut, *_values(flow, region), *held_in(flow, region))
    for frame in planned.frames:
        for c in frame.gate_of:
            yield from (n for n in (*flow.calls[c].given, *flow.calls[c].made) if n is not None)


def _entries(flow: Flow, region: Region) -> set[int]:
    """What enters a branch."""
    nodes = flow.nodes
    return {
        i if nodes[x].dtype is None else x  # of a split, its parts
        for i in region.nodes
        for x in nodes[i].sources
        if nodes[x].varies and x not in region.nodes
    }


def _values(flow: Flow, region: Region) -> set[int]:
    """What a branch is given, what its calls give each other, and what comes out."""
    calls = [flow.calls[c] for c in region.calls]
    between = {n for call in calls for n in (*call.given, *call.made) if n is not None}
    return _entries(flow, region) | between | {region.output}


def _judge(flow: Flow, regions: list[Region], seen: _Evidence) -> tuple[Place | None, str]:
    """The place of a branch's samples, or None and the reason."""
    places = {seen.places.get(region.sum) for region in regions}
    if len(places) > 1:
        return None, "its calls have the samples in different dimensions"
    (place,) = places
    for region in regions:
        entries, values = _entries(flow, region), _values(flow, region)
        for n in (region.sum, region.shortcut, *values):
            if n in seen.unclear:
                return None, f"{seen.unclear[n]}, so samples cannot be told apart"
        output, shortcut = (seen.places.get(n) for n in (region.output, region.shortcut))
        if place is None or output != place or shortcut not in (place, None):
            return None, "its sum does not grow with the number of samples"
        if not seen.strewn.isdisjoint((*entries, region.shortcut)):
            return None, _STREWN
        if not seen.changed.isdisjoint((*entries, region.shortcut)):
            return None, "samples have mixed before it, or are not next to each other"
        if not seen.changed.isdisjoint((*values, region.sum)):
            return None, "its samples depend on each other (statistics over the batch, neighbours)"
        for n in held_in(flow, region):
            if flow.held[n] in seen.remembering and (n in seen.unclear or seen.places.get(n)):
                return None, (
                    f"{flow.held[n]} keeps a value of the samples in an attribute, where those of "
                    "the next call, which may be others, would find it"
                )
        if all(n in seen.alike for n in entries if seen.places.get(n)):
            return None, "the samples of example_inputs are alike: give some that differ"
    return place, ""


def _mask(regions: list[Region], seen: _Evidence) -> Place:
    """Where the samples of a branch can be masked, all being computed."""
    places = {seen.places.get(region.sum) for region in regions}
    place = places.pop()
    if places or place is None:
        return NOWHERE
    if place.fold > 1 and any(region.sum in seen.changed for region in regions):
        return NOWHERE  # the entries of a sample may be anywhere
    return place


def _fill(flow: Flow, frame: Frame, findings: Findings, seen: _Evidence) -> None:
    """Give the gates of a frame's plan the places of what they are given and return."""
    block = flow.calls[frame.call]
    plan = findings.plans[block.name][block.form]
    count: dict[int, int] = {}
    module_of = flow.calls[0].module.get_submodule
    names = {id(module_of(name_in_model(name, block.name))): name for name in plan.gates}
    filled: dict[str, list[Gate]] = {name: list(gates) for name, gates in plan.gates.items()}
    for c in frame.met:
        call = flow.calls[c]
        name = names.get(id(call.module))
        if name is None:
            continue
        at = count[id(call.module)] = count.get(id(call.module), -1) + 1
        gate = filled[name][at]
        if gate.branch is None:
            continue
        given = tuple(NOWHERE if n is None else seen.places.get(n) for n in call.given)
        returned = tuple(
            leaf._replace(place=None if n is None else seen.places.get(n))
            for leaf, n in zip(gate.returned, call.made, strict=True)
        )
        dims = {place.dim for place in given if place is not None and place.dim >= 0}
        single = tuple(
            (i, dim)
            for i, (n, place) in enumerate(zip(call.given, given, strict=True))
            for dim in dims
            if n is not None and place is None and flow.nodes[n].shape[dim : dim + 1] == (1,)
        )
        filled[name][at] = replace(gate, given=given, single=single, returned=returned)
    plan.gates = {name: tuple(gates) for name, gates in filled.items()}
