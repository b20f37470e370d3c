"""What a call that is not made would return: asked for only where user code asks for a shape."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._torch import tree_flatten, tree_map_only
from ..find.meet import without_gradients
from ..find.state import untouched

__all__ = ["Forms", "output_form"]

_MOST = 1024  # of the sizes of a sequence, say; then it is asked again
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Forms:
    """The results of calls that are not made, as they were found for arguments of the same form.

    Of others than tensors and plain values (a cache, say) nothing is kept.
    """

    def __init__(self) -> None:
        self.known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["Forms"], tuple[()]]:
        return Forms, ()  # a copy has modules of its own

    def of(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        forms: list[Any] = []
        for x in leaves:
            if isinstance(x, Tensor):
                forms.append((x.shape, x.dtype, x.device.type))
            elif type(x) in _PLAIN:
                forms.append((type(x), x))
            else:
                return output_form(module, args, kwargs)
        known, key = self.known.setdefault(module, {}), (str(structure), *forms)
        found = known.get(key, known)
        if found is known:
            found = output_form(module, args, kwargs)
            if len(known) >= _MOST:
                known.clear()
            known[key] = found
        return found


def output_form(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The result of a call, on the meta device, where nothing is computed.

    Absent values that it is given are there, too. What the module keeps (masks in a cache, say) is
    put back afterwards. A module that does not run there runs for real, once for each size.
    """
    with untouched(module), without_gradients():
        try:
            return _on_meta(module, args, kwargs)
        except Exception:  # of any kind: it looks at values, or holds some that are elsewhere
            return _for_real(module, args, kwargs)


def _on_meta(module: nn.Module, args: Any, kwargs: Any) -> Any:
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    return functional_call(module, meta, args, kwargs)


def _for_real(module: nn.Module, args: Any, kwargs: Any) -> Any:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    args, kwargs = tree_map_only(
        Tensor,
        lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device) if x.is_meta else x,
        (args, kwargs),
    )
    return tree_map_only(Tensor, lambda x: x.to("meta"), module.forward(*args, **kwargs))
