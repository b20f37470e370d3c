"""Random numbers that depend on their purpose alone."""

import hashlib

import torch


def derive(*purpose: object) -> int:
    """A seed for one purpose, unrelated to those for others."""
    return int.from_bytes(hashlib.blake2b(repr(purpose).encode(), digest_size=7).digest())


def permutation(count: int, *purpose: object) -> list[int]:
    """A permutation of range(count) for one purpose."""
    generator = torch.Generator().manual_seed(derive(*purpose))
    return torch.randperm(count, generator=generator).tolist()
