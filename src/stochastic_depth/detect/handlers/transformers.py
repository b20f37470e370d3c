"""Handlers for transformers."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import register_handler


def _weights_for_nobody(module: nn.Module, given: Mapping[str, Any]) -> dict[int, Any]:
    """Attention weights that the blocks hand up, where the model ignores them."""
    return {1: None} if given.get("output_attentions") is False else {}


for _model, _class in {
    "codegen": "CodeGenAttention",
    "gptj": "GPTJAttention",
    "gpt_neox_japanese": "GPTNeoXJapaneseAttention",
    "megatron_bert": "MegatronBertSelfAttention",
    "rembert": "RemBertSelfAttention",
    "roformer": "RoFormerSelfAttention",
}.items():
    register_handler(
        f"transformers.models.{_model}.modeling_{_model}.{_class}", _weights_for_nobody
    )


def _position_bias(module: nn.Module, given: Mapping[str, Any]) -> dict[int, Any]:
    """The bias that T5's first layer computes for all others, which pass it on.

    The first layer has to run; so has any layer whose bias is not given.
    """
    if given["position_bias"] is None or given.get("output_attentions"):
        return {}
    return {1: given["position_bias"], 2: None}


for _model, _class in {
    "t5": "T5Attention",
    "mt5": "MT5Attention",
    "switch_transformers": "SwitchTransformersAttention",
}.items():
    register_handler(f"transformers.models.{_model}.modeling_{_model}.{_class}", _position_bias)

for _class in ("LongT5Attention", "LongT5LocalAttention", "LongT5TransientGlobalAttention"):
    register_handler(f"transformers.models.longt5.modeling_longt5.{_class}", _position_bias)


def _position_bias_last(module: nn.Module, given: Mapping[str, Any]) -> dict[int, Any]:
    """The same in WavLM, behind weights that its layers ignore."""
    return {} if given["position_bias"] is None else {1: None, 2: given["position_bias"]}


register_handler("transformers.models.wavlm.modeling_wavlm.WavLMAttention", _position_bias_last)
