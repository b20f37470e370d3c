"""Handlers for timm."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from . import register_handler


def _pooled_size(module: nn.Module, given: Mapping[str, Any]) -> dict[int, list[int]]:
    """The height and width that MViT's attention leaves, which follow from what it is given."""
    size = given["feat_size"]
    if not all(isinstance(n, int) for n in size):
        return {}
    pool: Any = module.pool_q
    if pool is None:
        return {1: list(size)}
    shape = zip(size, *map(_pair, (pool.kernel_size, pool.stride, pool.padding)), strict=True)
    return {1: [(n + 2 * padding - kernel) // stride + 1 for n, kernel, stride, padding in shape]}


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


for _class in ("MultiScaleAttention", "MultiScaleAttentionPoolFirst"):
    register_handler(f"timm.models.mvitv2.{_class}", _pooled_size)
