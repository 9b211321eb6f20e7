"""Random numbers that depend only on the seed, the layer and the sample's content.

A sample must get the same selection alone and in a batch, on any device (KV10). So the generator is seeded by
a fingerprint of the sample's encoder input, and numbers are drawn on the CPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint", "generator", "uniform"]

_STRIDE = 61  # every 61st pixel: a prime that divides no image width, so all rows and channels are sampled
_STEPS_PER_UNIT = 64


def fingerprint(encoder_input: Tensor) -> Tensor:
    """Return a digest of each sample's encoder input, int64 ``[B]``.

    The computation uses whole numbers, so every device gets the same result. Zeros at the end (images that
    only other samples of the batch have) do not change it.

    Args:
        encoder_input: ``[B, ...]``, pixels, audio features or token ids.
    """
    flat = encoder_input.flatten(1)
    if flat.is_floating_point():
        flat = (flat[:, ::_STRIDE].float() * _STEPS_PER_UNIT).round()
    weights = torch.arange(1, flat.shape[1] + 1, device=flat.device) * 2654435761 % 2147483647
    return (flat.to(torch.int64) * weights).sum(-1)


def generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded by whole numbers, hashed so that similar seeds give unrelated numbers."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform(seed: int, rank: int, fingerprints: Tensor, heads: int, columns: int) -> Tensor:
    """Draw uniform numbers from [0, 1), float32 ``[B, heads, columns]`` on the CPU, sample by sample.

    Columns are drawn in order, so columns appended at the end (padding) do not change earlier ones.

    Args:
        seed: The seed of the run.
        rank: Rank of the layer, so that layers get different numbers.
        fingerprints: int64 ``[B]``, see `fingerprint`.
        heads: Number of heads.
        columns: Number of columns S.
    """
    draws = [
        torch.rand(columns, heads, generator=generator(seed, rank, value)) for value in fingerprints.tolist()
    ]
    return torch.stack(draws).transpose(1, 2)
