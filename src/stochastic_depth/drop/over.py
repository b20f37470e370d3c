"""What stands before a block's own site while something of the block is skipped by hand."""

import threading
from typing import Any

from torch import nn

from ..branch import Branch
from .site import Site
from .slot import Slot, here, outer_slot, put, slot_of
from .whole import WholeSite

__all__ = ["Aside", "Over", "WholeAside", "check_not_skipped", "skipped_in"]


class Aside(Site):
    """A site that only skips: the model's own drop modules go on as they are."""

    def install(self) -> None:
        self.replaces = False
        self._renew()

    def _existing(self) -> list[nn.Module]:
        return []


class WholeAside(Aside, WholeSite):
    """The same for a whole block."""


class Over:
    """In the slot of a block: a site of branches that are skipped by hand, and what was there.

    Any number may stand one before the other, each from a ``with`` of its own, on any thread. They
    leave in any order; slots that they put into children go with the last of them.

    Args:
        site: skips the branches.
        fresh: those of its branches that no site under it decides on.
    """

    is_root = False

    def __init__(self, site: Site, fresh: frozenset[Branch]) -> None:
        self.site, self.fresh = site, fresh
        self.under: Any = None

    def is_active(self) -> bool:
        return self._is_asked() or (self.under is not None and self.under.is_active())

    def _is_asked(self) -> bool:
        forced = here.forced
        return forced is not None and any([b in forced for b in self.fresh])

    def run(self, slot: Slot, args: Any, kwargs: Any) -> Any:
        if self._is_asked():
            return self.site.run(slot, args, kwargs)
        return self.under.run(slot, args, kwargs)

    def enter(self) -> None:
        """Stand before what is in the slot."""
        with _lock:
            _open.append(self)
            block = self.site.block
            slots = {id(s): s for s in (put(block), slot_of(block))}
            self.under = put(block).site
            for slot in slots.values():
                slot.site = self
            self.site.install()

    def leave(self) -> None:
        """Go, and take the slots along where nothing else stands there."""
        with _lock:
            _open.remove(self)
            _gone.append(self)
            block = self.site.block
            for slot in (outer_slot(block), slot_of(block)):
                if slot is None:
                    continue
                if slot.site is self:
                    slot.site = self.under
                above = slot.site
                while isinstance(above, Over):
                    if above.under is self:
                        above.under = self.under
                    above = above.under
            if not _open:  # a thread may be in a call of the block with the slots of another
                while _gone:
                    _gone.pop()._clear()

    def _clear(self) -> None:
        slot = slot_of(self.site.block)
        own = None if slot is None else slot.site
        self.site.uninstall()
        if isinstance(own, Site):
            own.install()
        elif own is not None:  # a model that waits for its first batch
            put(self.site.block).site = own
            if isinstance(getattr(own, "site", None), Site):
                own.site._renew()


def skipped_in(block: nn.Module) -> frozenset[Branch]:
    """The branches of a block that stand to be skipped already."""
    slot = outer_slot(block)
    over = None if slot is None else slot.site
    found: frozenset[Branch] = frozenset()
    while isinstance(over, Over):
        found |= over.fresh
        over = over.under
    return found


def check_not_skipped(model: nn.Module, what: str) -> None:
    """Raise where something stands to be skipped, as what is under it cannot change meanwhile.

    ``what`` would change it.
    """
    for name, module in model.named_modules():
        slot = outer_slot(module)
        if slot is not None and isinstance(slot.site, Over):
            raise RuntimeError(
                f"{what} inside `with sd.skip(...)`, which skips something of "
                f"{name or 'the model'}: do this before the `with`"
            )


_lock = threading.RLock()
_open: list[Over] = []
_gone: list[Over] = []
