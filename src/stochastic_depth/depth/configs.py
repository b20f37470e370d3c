"""A transformers model's configuration follows what was taken out of its lists of layers."""

import copy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..branch import Branch, block_of, is_below, name_in_model
from .record import CONFIG_KEY
from .surgery import Cuts, Undo

__all__ = ["PerLayer", "configured", "follow", "follow_branches", "own_configs"]

# The number of layers, under the names that configurations and models have for it.
_OF_ENCODER = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers")
_OF_DECODER = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
_OF_ALL = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "n_head_layers", "depth",
    "num_blocks", "num_encoder_blocks",
)  # fmt: skip
# Lists that may be as long as there are layers, and are about something else.
_OTHERS = {
    "architectures", "hidden_sizes", "depths", "num_heads", "num_attention_heads", "patch_sizes",
    "strides", "sr_ratios", "mlp_ratios", "conv_dim", "conv_stride", "conv_kernel", "image_mean",
    "image_std", "out_features", "out_indices", "stage_names", "eos_token_id", "image_size",
    "suppress_tokens", "begin_suppress_tokens", "keys_to_ignore_at_inference", "patch_size",
    "attention_types", "focal_levels", "focal_windows", "encoder_hidden_sizes", "neck_hidden_sizes",
    "reassemble_factors", "tubelet_size", "rope_parameters", "embed_dim", "num_channels",
}  # fmt: skip
_NUMBERS_OF_LAYERS = {
    "mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "global_attn_idx",
    "attention_layers_idx", "cross_attention_layers", "moe_layers",
}  # fmt: skip


@dataclass(eq=False)
class PerLayer:
    """A list in a configuration that may have an entry for each layer that there was.

    Attributes:
        own: what the configuration says.
        name: of the list.
        kept: the numbers of the layers that stay.
    """

    own: dict[str, Any]
    name: str
    kept: list[int]

    def __post_init__(self) -> None:
        self.whole = self.own[self.name]
        self.says_so = "layer" in self.name or "block" in self.name

    def cut(self, is_cut: bool) -> None:
        """Leave the entries of these layers alone, or the list as it was."""
        own, whole = self.own, self.whole
        own[self.name] = type(whole)(whole[i] for i in self.kept) if is_cut else whole


def configured(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models in ``model``, by name."""
    kind: Any = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind) and not any(is_below(name, other) for other in found):
            found[name] = module
    return found


def own_configs(model: nn.Module, undo: Undo) -> None:
    """Copy the configurations, which other models may have, too, wherever they are kept."""
    copies: dict[int, Any] = {}
    for module in model.modules() if configured(model) else ():
        for name, value in list(vars(module).items()):
            if _is_config(value):
                undo.keep(vars(module))[name] = copy.deepcopy(value, copies)


def follow(model: nn.Module, cuts: Cuts, undo: Undo) -> list[PerLayer]:
    """Change the configurations, and the numbers of layers that modules keep.

    Returns:
        Lists in the configurations, which are cut if their name says that they are by layer.

    Raises:
        ValueError: no entry of the configuration says how many layers there were.
    """
    outermost = configured(model)
    lists: list[PerLayer] = []
    for home, (old, kept) in cuts.kept.items():
        around = list(_around(model, cuts.name(home)))
        for module in around:
            for name in (*_OF_ALL, *_OF_ENCODER, *_OF_DECODER):
                if vars(module).get(name) is not None and _is_number(vars(module)[name], old):
                    undo.keep(vars(module))[name] = len(kept)
        outer = next((m for name, m in outermost.items() if is_below(cuts.name(home), name)), None)
        if outer is None:
            continue
        configs = {id(c): c for m in around if _is_config(c := vars(m).get("config"))}
        inner = next(iter(configs.values()), None)
        done = [_follow(c, home, old, kept, undo, c is inner, lists) for c in configs.values()]
        if not any(done):
            raise ValueError(
                f"no entry of {type(outer.config).__name__} says that {home!r} has {old} layers, "
                "so its configuration cannot follow: remove the branches of these layers instead, "
                "or give config=False, and prune again after from_pretrained, before the weights "
                "are loaded"
            )
    return lists


def follow_branches(
    model: nn.Module, cuts: Cuts, gone: Iterable[str], alone: Iterable[Branch], undo: Undo
) -> None:
    """List branches that were removed alone, now or before, for whoever loads the model.

    Args:
        model: the model, already cut.
        cuts: what became of its lists of blocks.
        gone: the old names of the blocks that were removed.
        alone: the branches that were removed now.
        undo: takes note of what changes.
    """
    gone, alone = list(gone), list(alone)
    for now, inner in configured(model).items():
        own, before = undo.keep(vars(inner.config)), cuts.old_name(now)
        names = [name_in_model(name, before) for name in own.get(CONFIG_KEY, ())]
        names += [branch.name for branch in alone if is_below(block_of(branch), before)]
        blocks = [name.partition(":") for name in dict.fromkeys(names)]
        stay = [
            cuts.name(block) + colon + label
            for block, colon, label in blocks
            if not any(is_below(block, other) for other in gone)
        ]
        if stay:
            own[CONFIG_KEY] = [name[len(now) :].removeprefix(".") for name in stay]
        else:
            own.pop(CONFIG_KEY, None)


def _is_config(x: Any) -> bool:
    return hasattr(x, "to_dict") and hasattr(x, "model_type")


def _is_number(x: Any, n: int) -> bool:
    return type(x) is int and x == n


def _around(model: nn.Module, home: str) -> Iterator[nn.Module]:
    """The modules around a list, from the inside."""
    parts = home.split(".")
    for i in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:i]))


def _follow(
    config: Any, home: str, old: int, kept: list[int], undo: Undo, is_inner: bool,
    lists: list[PerLayer],
) -> bool:  # fmt: skip
    """Change what one configuration says of a list of layers; whether it says anything."""
    own = undo.keep(vars(config))
    depths = own.get("depths")
    stages = [int(part) for part in home.split(".") if part.isdigit()]
    if isinstance(depths, list | tuple) and stages and stages[-1] < len(depths):
        if not _is_number(depths[stages[-1]], old):
            return False
        changed = list(depths)
        changed[stages[-1]] = len(kept)
        own["depths"] = changed
        return True
    decoder = "decoder" in home.rpartition("encoder")[2] and "decoder" in home
    both = any(_get(config, n) is not None for n in _OF_DECODER)
    names: tuple[str, ...] = (*_OF_ENCODER, *_OF_ALL)
    if both and decoder:
        names = _OF_DECODER
        if is_inner and not _get(config, "is_encoder_decoder"):  # T5's stacks have one of their own
            names += _OF_ALL
    changed_any = False
    for name in names:
        if _is_number(_get(config, name), old):
            try:
                setattr(config, name, len(kept))
            except (AttributeError, TypeError):  # derived from others
                continue
            changed_any = True
    if not changed_any:
        return False
    for name, value in list(own.items()):
        if name.startswith("_") or name in _OTHERS or (both and decoder != ("decoder" in name)):
            continue
        if name in _NUMBERS_OF_LAYERS and isinstance(value, list):
            own[name] = [kept.index(i) for i in value if i in kept]
        elif isinstance(value, list | tuple) and len(value) == old and all(map(_is_plain, value)):
            lists.append(PerLayer(own, name, kept))
            lists[-1].cut(lists[-1].says_so)
    if own.get("attention_types") and isinstance(own.get("attention_layers"), list):  # GPT-Neo's
        own["attention_types"] = [[own["attention_layers"], 1]]
    first = own.get("first_k_dense_replace")
    if type(first) is int:
        own["first_k_dense_replace"] = sum(i < first for i in kept)
    _follow_backbone(own, old, len(kept))
    return True


def _follow_backbone(own: dict[str, Any], old: int, new: int) -> None:
    """The stages that a backbone names after its layers."""
    if len(own.get("stage_names") or ()) == old + 1:
        own["stage_names"] = own["stage_names"][: new + 1]
        for name, last, now in (
            ("_out_indices", old, new),
            ("_out_features", f"stage{old}", f"stage{new}"),
        ):
            if list(own.get(name) or ()) == [last]:
                own[name] = [now]


def _get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # of any kind: it is a property of theirs
        return None


def _is_plain(x: Any) -> bool:
    return isinstance(x, str | int | float | bool)
