"""Example inputs made from what a model says of itself, and tried."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .state import in_mode, untouched
from .tensors import tensors_within
from .unwritten import unwritten

__all__ = ["guess_inputs"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_SIZES = ("img_size", "image_size", "input_size", "crop_size", "resolution")
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase)
_COMMON = (32, 64, 224, 256, 299, 384, 240, 28)
_TRIES = 16


def guess_inputs(model: nn.Module) -> Inputs | None:
    """Arguments that ``model`` takes, as (args, kwargs); None where no guess was right.

    They are small and real: two samples, of the size that the model names, or else of the first
    that it takes.
    """
    parameter = next(model.parameters(), None)
    device = "cpu" if parameter is None else parameter.device
    if torch.device(device).type == "meta":
        return None
    dtype = torch.float32 if parameter is None else parameter.dtype
    for tries, (args, kwargs) in enumerate(_candidates(model)):
        if tries == _TRIES:
            return None
        args = tuple(_placed(x, device, dtype) for x in args)
        kwargs = {name: _placed(x, device, dtype) for name, x in kwargs.items()}
        try:
            with untouched(model), in_mode(model, False), unwritten(model), torch.no_grad():
                made = tensors_within(model(*args, **kwargs), 4)
        except Exception:  # of any kind: the guess was wrong
            continue
        if next(iter(made), None) is not None:
            return args, kwargs
    return None


def _placed(x: Any, device: Any, dtype: torch.dtype) -> Any:
    if not isinstance(x, Tensor):
        return x
    floats = x.is_floating_point() and dtype.is_floating_point
    return x.to(device, dtype) if floats else x.to(device)


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    yield from _as_configured(model)
    first = next((m for m in model.modules() if isinstance(m, _LAYERS)), None)
    if first is None:
        return
    count = max(_required(model), 1)
    sizes = dict.fromkeys([*_named_sizes(model), *_COMMON])
    if isinstance(first, nn.Conv2d):
        for size in sizes:
            yield (_noise(2, first.in_channels, size, size),) * count, {}
    elif isinstance(first, nn.Conv1d):
        for length in (64, 512, 4096):
            yield (_noise(2, first.in_channels, length),) * count, {}
    elif isinstance(first, nn.Conv3d):
        for size in sizes:
            yield (_noise(2, first.in_channels, 16, size, size),) * count, {}
    elif isinstance(first, nn.Embedding):
        yield (_tokens(first.num_embeddings, 16),) * count, {}
        yield (_tokens(first.num_embeddings, 16)[:, 0],) * count, {}
    else:
        width = first.in_features if isinstance(first, nn.Linear) else first.input_size
        yield (_noise(2, width),) * count, {}
        yield (_noise(2, 16, width),) * count, {}
        for size in sizes:  # patches, flattened
            yield (_noise(2, 3, size, size),) * count, {}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), device="cpu")


def _tokens(words: int, length: int) -> Tensor:
    numbers = torch.arange(2 * length, device="cpu").reshape(2, length)
    return numbers * 7 % max(words - 4, 1) + min(3, words - 1)


def _required(model: nn.Module) -> int:
    """How many arguments its forward cannot do without."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is p.empty and p.kind not in fixed for p in parameters)


def _named_sizes(model: nn.Module) -> Iterator[int]:
    for name in _SIZES:
        for module in model.modules():
            size = getattr(module, name, None)
            size = size[-1] if isinstance(size, tuple | list) and size else size
            if isinstance(size, int) and not isinstance(size, bool) and size > 4:
                yield size
                break


def _as_configured(model: nn.Module) -> Iterator[Inputs]:
    """What timm's and transformers' models say of what they take."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, dict) and "input_size" in config:
            channels, *size = config["input_size"]
            if config.get("min_input_size") and not config.get("fixed_input_size"):
                yield (_noise(2, channels, *config["min_input_size"][1:]),), {}
            yield (_noise(2, channels, *size),), {}
    config = getattr(model, "config", None)
    if config is None or isinstance(config, dict):
        return
    taken = set(inspect.signature(model.forward).parameters)
    options = {"use_cache": False} if "use_cache" in taken else {}
    main = getattr(model, "main_input_name", "")
    words: Any = getattr(config, "vocab_size", None) or getattr(
        getattr(config, "text_config", None), "vocab_size", 100
    )
    known: dict[str, Tensor] = {}
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in taken:
        size = getattr(vision, "image_size", None) or 224
        size = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(vision, "num_channels", 3)
        frames = getattr(config, "num_frames", None)
        shape = (2, frames, channels, *size) if frames else (2, channels, *size)
        known["pixel_values"] = _noise(*shape)
    if "input_features" in taken:
        bins: Any = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        length = 2 * getattr(config, "max_source_positions", 50)
        known["input_features"] = _noise(2, bins, length)
    if "input_values" in taken:
        bins = getattr(config, "num_mel_bins", None)
        length = getattr(config, "max_length", 1024)
        known["input_values"] = _noise(2, length, bins) if bins else _noise(2, 4000)
    if "input_ids" in taken:
        known["input_ids"] = _tokens(words, 16)
    if "decoder_input_ids" in taken:
        known["decoder_input_ids"] = _tokens(words, 8)
    if known:
        yield (), {**known, **options}
        if main in known:
            yield (), {main: known[main], **options}
            decoder = {k: v for k, v in known.items() if k == "decoder_input_ids"}
            yield (), {main: known[main], **decoder, **options}
        if main == "input_features" and main in known:  # time before features
            yield (), {**known, main: known[main].transpose(1, 2), **options}
            width = known[main].shape[1] * 2
            yield (), {**known, main: _noise(2, 30, width), **options}
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception:  # of any kind: it is a property of theirs
        dummy = None
    if isinstance(dummy, dict):
        yield (), {**dummy, **options}
