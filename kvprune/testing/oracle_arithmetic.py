"""Merged and quantized tensors as the master oracle expects them, computed by plain loops in float64.

Nothing here shares code with `kvprune.tokens.merging` or `kvprune.cache.quantization`, which are checked
against it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["as_held", "logit_bias", "merged_features", "replaced_features", "with_merges"]


def as_held(
    full: Tensor, selection: Selection, known: dict[tuple[Any, ...], list[float]] | None = None
) -> Tensor:
    """Return keys or values after quantization to the bits that a selection asks for.

    Args:
        full: ``[B, Hkv, S, D]``, as the stock cache holds them.
        selection: Selects among these S columns, or among more. Columns that it drops, or keeps in the
            model's own dtype, are returned unchanged.
        known: Vectors that were quantized before, by bits and numbers, so that none is computed twice.
    """
    known = {} if known is None else known
    bits = selection.bits_by_column().tolist()  # [B, H or 1, S]
    held = full.detach().to(torch.float64).clone()
    for sample, heads in enumerate(held.tolist()):
        for head, columns in enumerate(heads):
            widths = bits[sample][head if len(bits[sample]) > 1 else 0]
            for column, vector in enumerate(columns):
                if widths[column] == 16:
                    continue
                key = (widths[column], *vector)
                if key not in known:
                    known[key] = _quantized(vector, widths[column])
                held[sample, head, column] = torch.tensor(known[key], dtype=torch.float64)
    return held.to(full.dtype)


def _quantized(vector: list[float], bits: int) -> list[float]:
    """Round each number to the nearest of evenly spaced levels between the smallest and largest of its group.

    A group is the largest number of neighbouring channels, at most 64, that divides the vector evenly; the
    whole vector if that would be fewer than 16.
    """
    size = max(size for size in range(1, 65) if len(vector) % size == 0)
    size = len(vector) if size < 16 else size
    levels: list[float] = []
    for first in range(0, len(vector), size):
        group = vector[first : first + size]
        step = (max(group) - min(group)) / (2**bits - 1)
        for number in group:
            code = round((number - min(group)) / step) if step else 0
            levels.append(min(group) + code * step)
            if abs(levels[-1] - number) > step * 0.500001:  # the documented bound: half a step
                raise AssertionError(f"{number} became {levels[-1]} with steps of {step}")
    return levels


def logit_bias(selection: Selection, heads: int) -> Tensor:
    """Return what a merge adds to the logits of kept columns, ``[B, 1 or heads, 1, S]`` in float64.

    Args:
        selection: With a merge.
        heads: Number of query heads.
    """
    merge = selection.merge
    assert merge is not None
    batch, own_heads, _ = selection.indices.shape
    bias = torch.zeros(batch, own_heads, selection.columns, dtype=torch.float64)
    for sample in range(batch):
        for head in range(own_heads):
            into = merge.into[sample, head].tolist()
            for position, column in _entries(selection, sample, head):
                carried = 0.0 if merge.carried is None else float(merge.carried[sample, head, position])
                size = into.count(position) if merge.size_bias else 1
                bias[sample, head, column] = carried + math.log(size)
    if own_heads > 1:
        bias = bias.repeat_interleave(heads // own_heads, dim=1)
    return bias[:, :, None]


def _entries(selection: Selection, sample: int, head: int) -> list[tuple[int, int]]:
    """Return position and column of each kept entry of one head."""
    columns = selection.indices[sample, head].tolist()
    valid = selection.valid[sample, head].tolist()
    return [
        (position, column) for position, (column, real) in enumerate(zip(columns, valid, strict=True)) if real
    ]


def replaced_features(states: Tensor, replacement: Replacement) -> Tensor:
    """Return encoder features with new tokens in their places, in the shape in which they came.

    Args:
        states: ``[B, S, width]``, or another shape of as many numbers, such as one with an axis for images.
        replacement: For these columns, or for columns of which these are the last.
    """
    places = replacement.places
    changed = states.reshape(len(places.indices), -1, states.shape[-1]).clone()  # [B, S, width]
    first = places.columns - changed.shape[1]
    for sample in range(len(changed)):
        for position, column in _entries(places, sample, 0):
            changed[sample, column - first] = replacement.features[sample, position]
    return changed.reshape(states.shape)


def merged_features(states: Tensor, selection: Selection) -> Tensor:
    """Return encoder features with those of kept columns merged, in the shape in which they came.

    Args:
        states: ``[B, S, width]``, or another shape of as many numbers, such as one with an axis for images.
        selection: With a merge of features, the same for all heads.
    """
    by_sample = states.reshape(len(selection.indices), 1, -1, states.shape[-1])  # [B, 1, S, width]
    first = selection.columns - by_sample.shape[2]
    return with_merges(by_sample, selection, first=first).reshape(states.shape)


def with_merges(full: Tensor, selection: Selection, *, keys: bool = False, first: int = 0) -> Tensor:
    """Return the tokens of all columns, with merged ones in the place of those that a selection keeps.

    Args:
        full: ``[B, Hkv, S, D]``.
        selection: With a merge. What it says about columns before ``first`` is ignored.
        keys: Whether these are keys, whose length may be restored.
        first: The column with which ``full`` begins.
    """
    merge = selection.merge
    assert merge is not None
    changed = full.clone()
    own_heads = selection.indices.shape[1]
    for sample in range(full.shape[0]):
        for head in range(full.shape[1]):
            own = min(head, own_heads - 1)
            into = merge.into[sample, own].tolist()
            weights = merge.weights[sample, own].tolist()
            for position, anchor in _entries(selection, sample, own):
                if anchor < first:
                    continue
                members = [column for column, entry in enumerate(into) if entry == position]
                places = torch.tensor([column - first for column in members], dtype=torch.int64)
                merged = _weighted_sum(
                    full[sample, head, places].double(),  # [members, D]
                    [weights[column] for column in members],
                    restore_length=keys and merge.renormalize_keys,
                )
                changed[sample, head, anchor - first] = merged.to(full.dtype)
    return changed


def _weighted_sum(tokens: Tensor, weights: list[float], *, restore_length: bool) -> Tensor:
    """Return the weighted sum of tokens ``[N, D]``, if asked for with the weighted mean of their norms."""
    total = tokens.new_zeros(tokens.shape[-1])
    length = share = 0.0
    for token, weight in zip(tokens, weights, strict=True):
        total = total + weight * token
        length += abs(weight) * float(token.norm())
        share += abs(weight)
    if restore_length and share > 0 and float(total.norm()) > 0:
        total = total / float(total.norm()) * (length / share)
    return total
