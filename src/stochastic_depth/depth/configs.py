"""A transformers model's configuration follows what was taken out of its lists of layers."""

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .surgery import Cuts, Undo

__all__ = ["configured", "follow", "rebuilt"]

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


def configured(model: nn.Module) -> nn.Module | None:
    """The outermost transformers model in ``model``, if there is one."""
    kind: Any = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    return next((m for m in model.modules() if isinstance(m, kind)), None)


def follow(model: nn.Module, cuts: Cuts, undo: Undo) -> None:
    """Change the configurations, and the numbers of layers that modules keep.

    Raises:
        ValueError: no entry of the configuration says how many layers there were.
    """
    outer = configured(model)
    name_of_outer = next((n for n, m in model.named_modules() if m is outer), "")
    for home, (old, kept) in cuts.kept.items():
        around = list(_around(model, cuts.name(home)))
        for module in around:
            for name in (*_OF_ALL, *_OF_ENCODER, *_OF_DECODER):
                if vars(module).get(name) is not None and _is_number(vars(module)[name], old):
                    undo.keep(vars(module))[name] = len(kept)
        if outer is None or not (home == name_of_outer or _is_in(home, name_of_outer)):
            continue
        configs = {id(c): c for m in around if _is_config(c := vars(m).get("config"))}
        inner = next(iter(configs.values()), None)
        done = [_follow(c, home, old, kept, undo, is_inner=c is inner) for c in configs.values()]
        if not any(done):
            raise ValueError(
                f"no entry of {type(outer.config).__name__} says that {home!r} has {old} layers, "
                "so its configuration cannot follow: remove the branches of these layers instead, "
                "or give config=False, and prune again after from_pretrained, before the weights "
                "are loaded"
            )


def _is_in(home: str, outer: str) -> bool:
    return not outer or home.startswith(f"{outer}.")


def _is_config(x: Any) -> bool:
    return hasattr(x, "to_dict") and hasattr(x, "model_type")


def _is_number(x: Any, n: int) -> bool:
    return type(x) is int and x == n


def _around(model: nn.Module, home: str) -> Iterator[nn.Module]:
    """The modules around a list, from the inside."""
    parts = home.split(".")
    for i in range(len(parts), -1, -1):
        yield model.get_submodule(".".join(parts[:i]))


def _follow(config: Any, home: str, old: int, kept: list[int], undo: Undo, is_inner: bool) -> bool:
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
    if both and decoder:
        names: tuple[str, ...] = _OF_DECODER
        if is_inner and not _get(config, "is_encoder_decoder"):  # T5's stacks have one of their own
            names += _OF_ALL
    elif both:
        names = (*_OF_ENCODER, *_OF_ALL)
    else:
        names = (*_OF_ENCODER, *_OF_ALL)
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
            own[name] = type(value)(value[i] for i in kept)
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


def rebuilt(model: nn.Module) -> nn.Module:
    """A model made of the configuration as it would be saved, with the weights of ``model``.

    Raises:
        ValueError: the configuration makes another model.
    """
    name = type(model).__name__
    config: Any = model.config
    how = (
        "; remove other layers, or branches, or give config=False to leave the configuration as it "
        "is, and prune again after from_pretrained"
    )
    try:
        again = type(config).from_dict(copy.deepcopy(config.to_dict()))
    except Exception as error:
        raise ValueError(
            f"the configuration of {name} would not load again: {error}{how}"
        ) from error
    if (attention := getattr(config, "_attn_implementation", None)) is not None:
        again._attn_implementation = attention
    state = model.state_dict()
    with torch.random.fork_rng(devices=[]):
        fresh = _made(lambda: type(model)(copy.deepcopy(again)), state, model)
        if isinstance(fresh, Exception):
            raise ValueError(
                f"the configuration of {name} makes another model than the pruned one: {fresh}{how}"
            ) from fresh
    return fresh.train(model.training)


def _made(
    make: Callable[[], nn.Module], state: dict[str, Tensor], like: nn.Module
) -> nn.Module | Exception:
    """Made without memory of its own, where its class can be."""
    problem: Exception
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                fresh = make()
            fresh.load_state_dict(state, strict=True, assign=True)
            buffers = dict(like.named_buffers())
            for module_name, module in fresh.named_modules():
                for key, buffer in module._buffers.items():
                    full = f"{module_name}.{key}" if module_name else key
                    if buffer is not None and buffer.is_meta:
                        module._buffers[key] = buffers[full]
            tie: Any = getattr(fresh, "tie_weights", None)
            if callable(tie):
                tie()
            return fresh
        except Exception as error:
            problem = error
            if "size mismatch" in str(error) or "key(s) in state_dict" in str(error):
                return RuntimeError(" ".join(str(error).split())[:300])
    return problem
