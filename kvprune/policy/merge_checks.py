"""Checks that a merge is a partition of columns that may be merged with each other (KV15)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.policy.view import View
from kvprune.tokens.merging import Merge
from kvprune.tokens.reindexing import positions
from kvprune.tokens.selection import Selection

__all__ = ["check_merge"]


def check_merge(what: str, selection: Selection, merge: object, view: View, where: str) -> None:
    """Refuse a merge that is not a partition, or that merges columns that must stay apart (KV15).

    Args:
        what: "cache" or "onward": the part of the decision that has the merge.
        selection: The selection that has the merge.
        merge: The merge.
        view: The view that the policy saw.
        where: Policy and layer, for messages.

    Raises:
        SelectionError: If KV15 is broken.
    """
    if not isinstance(merge, Merge):
        raise SelectionError(f"KV15: {where}: {what} merges by a {type(merge).__name__}, expected a Merge")
    _check_tensors(f"{where}: {what}", selection, merge)
    if merge.carried is not None:
        raise SelectionError(f"KV15: {where}: {what}.merge.carried is only for reports; leave it out")
    if what == "onward" and (merge.size_bias or merge.renormalize_keys):
        raise SelectionError(
            f"KV15: {where}: onward merges features, which have no keys and no logits yet; "
            "use size_bias and renormalize_keys in Decision(cache=...) only"
        )
    _check_partition(what, selection, merge, view, where)


def _check_tensors(where: str, selection: Selection, merge: Merge) -> None:
    """Check dtype, shape and device of what a merge holds."""
    shape = [*selection.indices.shape[:2], selection.columns]  # [B, H or 1, S]
    for name, part, dtypes in (
        ("into", merge.into, (torch.int64,)),
        ("weights", merge.weights, (torch.float32, torch.float64)),
    ):
        if not isinstance(part, Tensor) or part.dtype not in dtypes or list(part.shape) != shape:
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise SelectionError(
                f"KV15: {where}.merge.{name} is {' or '.join(map(str, dtypes))} {shape}, got {got}"
            )
        if part.device != selection.indices.device:
            raise SelectionError(
                f"KV15: {where}.merge.{name} is on {part.device}, but indices are on "
                f"{selection.indices.device}; both must be on one device"
            )


def _check_partition(what: str, selection: Selection, merge: Merge, view: View, where: str) -> None:
    """Check the values of a merge, with one host transfer for all questions."""
    into, device = merge.into, merge.into.device  # [B, H or 1, S]
    taken = into >= 0
    # The kept column that each column is merged into; an index out of range is reported below.
    anchor = selection.indices.gather(-1, into.clamp(0, selection.indices.shape[-1] - 1))
    own = positions(selection)  # [B, H or 1, S], -1 for dropped columns

    def crosses(labels: Tensor) -> Tensor:
        """Return where a column is merged into one with another label; ``labels`` are ``[B, S]``."""
        by_head = labels.to(device)[:, None].expand_as(into)
        return taken & (by_head.gather(-1, anchor) != by_head)

    seen = (view.decode_strata if what == "cache" else view.strata) >= 0  # [B, S]
    seen_by_head = seen.to(device)[:, None].expand_as(into)
    no = torch.zeros((), dtype=torch.bool, device=device)
    answers = torch.stack(
        [
            ((into < -1) | (into >= selection.counts[..., None])).any(),
            ((own >= 0) & (into != own)).any(),
            (taken & ~merge.weights.isfinite()).any(),
            (taken & ~seen_by_head & seen_by_head.gather(-1, anchor)).any(),
            crosses(view.images).any(),
            crosses(view.groups).any() if what == "onward" else no,
        ]
    ).tolist()
    for broken, message in zip(answers, _RULES, strict=True):
        if broken:
            raise SelectionError(f"KV15: {where}: {what} {message}")


_RULES = (
    "names an entry that is not kept; into counts the valid entries from 0, and -1 means no entry",
    "merges a kept column into another entry; a kept column goes into its own position",
    "has a weight that is NaN or infinite",
    "merges unseen columns into seen ones; leave unseen columns out (into = -1)",
    "merges columns of one image into another; buckets end where view.images changes",
    "merges columns that other text rows see; buckets of onward stay within view.groups",
)
"""What is wrong if an answer of `_check_partition` is true, in the same order."""
