"""Slow reference implementations with plain loops and sets: what text rows see, which columns form a group.

They share no code with `kvprune.tokens.visibility` or `kvprune.scoring`, which are checked against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = [
    "existing",
    "kept_bits",
    "kept_sets",
    "live_rows",
    "same_by_head",
    "seen_by_row",
    "slow_decode",
    "slow_groups",
    "slow_prefill",
    "slow_strata",
    "takers",
    "visibility_of",
]


def kept_sets(selection: Selection) -> list[list[set[int]]]:
    """Return kept columns as sets, by sample and head."""
    return [
        [
            {column for column, is_valid in zip(row, flags, strict=True) if is_valid}
            for row, flags in zip(heads, valid, strict=True)
        ]
        for heads, valid in zip(selection.indices.tolist(), selection.valid.tolist(), strict=True)
    ]


def takers(selection: Selection) -> list[list[dict[int, int]]]:
    """Return by sample and head: for each column that is merged into another one, that column."""
    if selection.merge is None:
        return [[{} for _ in heads] for heads in selection.indices]
    return [
        [
            {
                column: row[entry]
                for column, entry in enumerate(joined)
                if 0 <= entry < len(row) and row[entry] != column
            }
            for row, joined in zip(heads, into, strict=True)
        ]
        for heads, into in zip(selection.indices.tolist(), selection.merge.into.tolist(), strict=True)
    ]


def kept_bits(selection: Selection) -> list[list[set[tuple[int, int]]]]:
    """Return kept columns with their bits as sets of pairs, by sample and head."""
    bits = selection.bits_by_column().tolist()
    return [
        [{(column, bits[sample][head][column]) for column in kept} for head, kept in enumerate(heads)]
        for sample, heads in enumerate(kept_sets(selection))
    ]


def same_by_head(one: Sequence[object], other: Sequence[object]) -> bool:
    """Return whether two samples keep the same in each head. One row for all heads counts for each head."""
    heads = max(len(one), len(other))
    return all(one[min(h, len(one) - 1)] == other[min(h, len(other) - 1)] for h in range(heads))


def existing(visibility: Visibility, sample: int) -> set[int]:
    """Return the columns that exist, which means that they are no padding of a ragged batch."""
    columns = range(visibility.columns)
    if visibility.exists is None:
        return set(columns)
    return {column for column in columns if bool(visibility.exists[sample, column])}


def seen_by_row(visibility: Visibility, sample: int, row: int) -> set[int]:
    """Return the columns that one text row may attend, live or not."""
    rows = visibility.rows[sample].tolist()
    units = visibility.units[0 if len(visibility.units) == 1 else sample].tolist()
    wanted = rows[0 if len(rows) == 1 else row]
    return {column for column in existing(visibility, sample) if wanted[units[column]]}


def live_rows(visibility: Visibility, sample: int) -> list[int]:
    """Return the text rows that count: no padding, and at least one image is seen."""
    return [row for row, flag in enumerate(visibility.live[sample].tolist()) if flag]


def slow_prefill(visibility: Visibility, sample: int) -> set[int]:
    """Return the columns that some live row may attend."""
    return set().union(*(seen_by_row(visibility, sample, row) for row in live_rows(visibility, sample)))


def slow_decode(visibility: Visibility, sample: int) -> set[int]:
    """Return the columns that the last live row may attend."""
    rows = live_rows(visibility, sample)
    return seen_by_row(visibility, sample, rows[-1]) if rows else set()


def slow_groups(visibility: Visibility, sample: int) -> list[set[int]]:
    """Return the visibility groups: sets of columns of one image that the same live rows see."""
    units = visibility.units[0 if len(visibility.units) == 1 else sample].tolist()
    watchers: dict[int, list[int]] = {}
    for row in live_rows(visibility, sample):
        for column in seen_by_row(visibility, sample, row):
            watchers.setdefault(column, []).append(row)
    groups: dict[tuple[int, tuple[int, ...]], set[int]] = {}
    for column, rows in sorted(watchers.items()):
        key = (int(visibility.images[units[column]]), tuple(rows))
        groups.setdefault(key, set()).add(column)
    return list(groups.values())


def slow_strata(visibility: Visibility, sample: int) -> list[set[int]]:
    """Return the sets of columns that a budget counts separately; the one that decoding sees comes first."""
    if not slow_prefill(visibility, sample):
        return [existing(visibility, sample)]
    decode = slow_decode(visibility, sample)
    return [decode, *(group for group in slow_groups(visibility, sample) if not group & decode)]


def visibility_of(inputs: dict[str, Any], columns: int) -> Visibility:
    """Return what the text rows of a model's inputs may attend, computed from the processor's masks.

    Args:
        inputs: Inputs of an Mllama, with ``cross_attention_mask``; or of an encoder-decoder model, whose
            ``attention_mask``, if there is one, is as wide as the encoder's output.
        columns: Number of encoder tokens S in the model's cross-attention cache.
    """
    if "cross_attention_mask" not in inputs:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape[-1] != columns:
            raise ValueError(
                f"a mask of width {mask.shape[-1]} does not say which of {columns} columns are seen"
            )
        if mask is None:
            mask = torch.ones(len(next(iter(inputs.values()))), columns, dtype=torch.int64)
        return Visibility(
            rows=torch.tensor([[[True, False]]]).expand(len(mask), -1, -1),
            units=1 - mask,
            images=torch.zeros(2, dtype=torch.int64),
            live=torch.ones(len(mask), 1, dtype=torch.bool),
        )
    tiles = inputs["cross_attention_mask"].shape[-1]
    rows = inputs["cross_attention_mask"].flatten(2).bool()
    units = torch.arange(rows.shape[-1])
    return Visibility(
        rows=rows,
        units=units.repeat_interleave(columns // len(units))[None],
        images=units // tiles,
        live=rows.any(-1) & inputs["attention_mask"].bool(),
    )
