"""Randomness that depends on the seed, the layer and the sample's content, and on nothing else.

A sample must select alone what it selects in a batch, on any device (KV10). So randomness is seeded by a
fingerprint of what the encoder read for that sample, and drawn on the CPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint", "generator", "uniform"]

_STRIDE = 61  # of pixels: a prime that does not divide image widths, so all rows and channels are sampled
_STEPS_PER_UNIT = 64


def fingerprint(encoder_input: Tensor) -> Tensor:
    """Return an int64 ``[B]`` digest of what the encoder reads (pixels, audio features or token ids).

    Whole numbers throughout, so every device computes the same one. Zeros at the end (images that only
    other samples of the batch have) do not change it.
    """
    flat = encoder_input.flatten(1)
    if flat.is_floating_point():
        flat = (flat[:, ::_STRIDE].float() * _STEPS_PER_UNIT).round()
    weights = torch.arange(1, flat.shape[1] + 1, device=flat.device) * 2654435761 % 2147483647
    return (flat.to(torch.int64) * weights).sum(-1)


def generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded by whole numbers, mixed so that neighbours are unrelated."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform(seed: int, rank: int, fingerprints: Tensor, heads: int, columns: int) -> Tensor:
    """Draw from [0, 1), float32 ``[B, heads, columns]`` on the CPU, for each sample on its own.

    Columns are drawn in order, so more columns at the end (padding) change nothing before them.
    """
    draws = [
        torch.rand(columns, heads, generator=generator(seed, rank, value)) for value in fingerprints.tolist()
    ]
    return torch.stack(draws).transpose(1, 2)
