"""What a policy merges in one layer: each column into one kept entry of its image, or into none (KV15)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.answers import answer, pose, selections_of
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import existing, slow_groups, slow_prefill, slow_strata
from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

__all__ = ["check_partition", "merges"]


def merges(policy: CrossKVPolicy, problem: LayerProblem) -> bool:
    """Return whether the policy merges anything in this problem."""
    decision = answer(policy, pose(policy, problem))
    return any(selection.merge is not None for _, selection in selections_of(decision))


def check_partition(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV15: every column goes into one kept entry or none, and only into one that it may be merged with."""
    view = pose(policy, problem)
    decision = answer(policy, view)
    for part, selection in selections_of(decision):
        if selection.merge is not None:
            _require_tensors(part, selection)
            for sample in range(view.batch):
                columns = _Columns.of(part, view, sample)
                for head in range(selection.indices.shape[1]):
                    _require_partition(part, selection, columns, sample, head)


def _require_tensors(part: str, selection: Selection) -> None:
    """Raise unless a merge has tensors of the right dtype and shape."""
    merge, shape = selection.merge, [*selection.indices.shape[:2], selection.columns]
    if not isinstance(merge, Merge):
        raise Violation(f"a Merge as {part}.merge", type(merge).__name__)
    if merge.into.dtype != torch.int64 or list(merge.into.shape) != shape:
        raise Violation(f"{part}.merge.into of int64 {shape}", f"{merge.into.dtype} {list(merge.into.shape)}")
    if merge.weights.dtype not in (torch.float32, torch.float64) or list(merge.weights.shape) != shape:
        raise Violation(
            f"{part}.merge.weights of float32 or float64 {shape}",
            f"{merge.weights.dtype} {list(merge.weights.shape)}",
        )
    if part == "onward" and (merge.renormalize_keys or merge.size_bias):
        raise Violation(
            "onward.merge with neither renormalize_keys nor size_bias: it merges features",
            "renormalize_keys or size_bias",
        )


@dataclass(frozen=True)
class _Columns:
    """What decides which columns of a sample may be merged.

    Attributes:
        seen: Columns that are seen: in decode for "cache", in prefill for "onward".
        images: Image of each column.
        groups: Visibility group of each column that has one.
    """

    seen: set[int]
    images: list[int]
    groups: dict[int, int]

    @classmethod
    def of(cls, part: str, view: FeatureView | LayerView, sample: int) -> _Columns:
        see = view.visibility
        units = see.units[0 if len(see.units) == 1 else sample].tolist()
        images = see.images.tolist()
        if part == "onward":
            seen = slow_prefill(see, sample) or existing(see, sample)
        else:
            seen = slow_strata(see, sample)[0]
        groups = {column: number for number, group in enumerate(slow_groups(see, sample)) for column in group}
        return cls(seen, [images[unit] for unit in units], groups)


def _require_partition(part: str, selection: Selection, columns: _Columns, sample: int, head: int) -> None:
    """Raise unless each column of a sample is merged into an entry that it may be merged into."""
    merge = selection.merge
    assert merge is not None
    where = f"{part}, sample {sample}, head {head}: "
    into, weights = merge.into[sample, head].tolist(), merge.weights[sample, head].tolist()
    count = int(selection.valid[sample, head].sum())
    kept = selection.indices[sample, head].tolist()[:count]
    for position, column in enumerate(kept):
        if into[column] != position:
            raise Violation(f"{where}kept column {column} in its own entry {position}", f"{into[column]}")
    for column, entry in enumerate(into):
        if entry == -1:
            continue
        if not 0 <= entry < count:
            raise Violation(f"{where}column {column} in one of {count} kept entries, or -1", f"{entry}")
        if not math.isfinite(weights[column]):
            raise Violation(f"{where}a finite weight for column {column}", f"{weights[column]}")
        _require_related(where, part, columns, column, kept[entry])


def _require_related(where: str, part: str, columns: _Columns, column: int, anchor: int) -> None:
    """Raise unless a column may be merged into the entry of another."""
    if column not in columns.seen and anchor in columns.seen:
        raise Violation(
            f"{where}only seen columns in the entry of column {anchor}", f"column {column}, which is not seen"
        )
    if columns.images[column] != columns.images[anchor]:
        raise Violation(
            f"{where}only columns of image {columns.images[anchor]} in the entry of column {anchor}",
            f"column {column} of image {columns.images[column]}",
        )
    if part == "onward" and columns.groups.get(column) != columns.groups.get(anchor):
        raise Violation(
            f"{where}only columns in the entry of column {anchor} that the same text rows see",
            f"column {column}",
        )
