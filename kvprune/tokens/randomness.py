"""Random numbers that depend only on the seed, the layer and the sample's content.

A sample must get the same selection alone and in a batch, on any device (KV10). So the generator is seeded by
a fingerprint of the sample's encoder input, and numbers are drawn on the CPU.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint", "generator", "states_fingerprint", "uniform"]

_STRIDE = 61  # every 61st pixel: a prime that divides no image width, so all rows and channels are sampled
_STEPS_PER_UNIT = 64
_PROJECTIONS, _STEPS_PER_DEVIATION = 6, 32


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
    return _digest(flat.to(torch.int64))


def states_fingerprint(states: Tensor, visible: Tensor) -> Tensor:
    """Return a digest of each sample's encoder states, int64 ``[B]``.

    For models whose encoder may have run anywhere: outputs of the encoder that are passed by hand count as
    the input that they were made from, whatever the encoder has read since. The digest is made of a few
    random projections, each rounded to 1/32 of its standard deviation. So rounding errors (another batch,
    another device) hardly ever change it, while half a second of another sound does. Padding does not change
    it.

    Args:
        states: ``[B, S, C]``.
        visible: bool ``[B, S]``, false at padding.
    """
    columns, width = states.shape[1:]
    signs = torch.Generator().manual_seed(0)
    across = _signs(_PROJECTIONS, width, signs)  # [P, C]
    along = torch.stack([_signs(1, columns, generator(i))[0] for i in range(_PROJECTIONS)])  # [P, S]
    digests = []
    for sample, seen in zip(states, visible.to(states.device), strict=True):  # one float32 copy at a time
        rows = sample[seen].float()  # [n, C]
        sums = along.to(rows.device)[:, seen] @ rows  # [P, C]
        deviation = rows.square().sum().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        steps = (sums * across.to(rows.device)).sum(-1) / deviation * _STEPS_PER_DEVIATION  # [P]
        digests.append(steps.nan_to_num().round().to(torch.int64))
    return _digest(torch.stack(digests))


def _digest(numbers: Tensor) -> Tensor:
    """Return one number for each row, int64 ``[B, n]`` to ``[B]``; zeros at the end change nothing."""
    weights = torch.arange(1, numbers.shape[1] + 1, device=numbers.device) * 2654435761 % 2147483647
    return (numbers * weights).sum(-1)


def _signs(rows: int, length: int, source: torch.Generator) -> Tensor:
    """Draw +1 and -1, float32 ``[rows, length]``; a longer row begins with the same signs if rows is 1."""
    return torch.randint(0, 2, (rows, length), generator=source).float() * 2 - 1


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
