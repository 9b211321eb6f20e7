"""What a policy merges: who goes into whom, and that nothing of it is lost (KV15).

The first check is a function of a policy and a `LayerProblem`, the second of a policy and a `Setting`.
"""

from __future__ import annotations

import math

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.layers.decisions import answer, pose
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import existing, slow_groups, slow_prefill, slow_strata
from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

__all__ = ["check_partition", "merges"]


def merges(policy: CrossKVPolicy, problem: LayerProblem) -> bool:
    """Whether the policy merges anything, here."""
    decision = answer(policy, pose(policy, problem))
    parts = (decision.cache, decision.onward)
    return any(part is not None and part.merge is not None for part in parts)


def check_partition(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV15: every column goes into one kept entry or none, and only into one of its kind."""
    view = pose(policy, problem)
    decision = answer(policy, view)
    for part, selection in (("cache", decision.cache), ("onward", decision.onward)):
        if selection is not None and selection.merge is not None:
            _well_formed(part, selection)
            for sample in range(view.batch):
                for head in range(selection.indices.shape[1]):
                    _together(part, selection, view, sample, head)


def _well_formed(part: str, selection: Selection) -> None:
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
        raise Violation("onward to merge features and nothing else", "renormalize_keys or size_bias")


def _together(part: str, selection: Selection, view: FeatureView | LayerView, sample: int, head: int) -> None:
    """Raise unless each column of a sample goes where it may."""
    see, merge = view.visibility, selection.merge
    assert merge is not None
    where = f"{part}, sample {sample}, head {head}: "
    into, weights = merge.into[sample, head].tolist(), merge.weights[sample, head].tolist()
    count = int(selection.valid[sample, head].sum())
    kept = selection.indices[sample, head].tolist()[:count]
    units = see.units[0 if len(see.units) == 1 else sample].tolist()
    images = see.images.tolist()
    if part == "onward":
        seen = slow_prefill(see, sample) or existing(see, sample)
    else:
        seen = slow_strata(see, sample)[0]
    group_of = {column: number for number, group in enumerate(slow_groups(see, sample)) for column in group}
    for position, column in enumerate(kept):
        if into[column] != position:
            raise Violation(f"{where}kept column {column} in its own entry {position}", f"{into[column]}")
    for column, entry in enumerate(into):
        if entry == -1:
            continue
        if not 0 <= entry < count:
            raise Violation(f"{where}column {column} in one of {count} kept entries, or -1", f"{entry}")
        if not math.isfinite(weights[column]):
            raise Violation(f"{where}a finite weight of column {column}", f"{weights[column]}")
        anchor = kept[entry]
        if column not in seen and anchor in seen:
            raise Violation(
                f"{where}only seen columns in the entry of column {anchor}", f"{column}, which is not seen"
            )
        if images[units[column]] != images[units[anchor]]:
            raise Violation(
                f"{where}only columns of image {images[units[anchor]]} in the entry of column {anchor}",
                f"column {column} of image {images[units[column]]}",
            )
        if part == "onward" and group_of.get(column) != group_of.get(anchor):
            raise Violation(
                f"{where}only columns that the same rows see in the entry of column {anchor}", f"{column}"
            )
