"""Checks that a merge is a partition that mixes only what belongs together (KV15)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import SelectionError
from kvprune.policy.view import View
from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

__all__ = ["check_merge"]


def check_merge(what: str, selection: Selection, merge: object, view: View, where: str) -> None:
    """Refuse a merge that is no partition, or that mixes what does not belong together (KV15)."""
    shape = [*selection.indices.shape[:2], selection.columns]
    if not isinstance(merge, Merge):
        raise SelectionError(f"KV15: {where}: {what} merges by a {type(merge).__name__}, expected a Merge")
    for name, part, dtypes in (
        ("into", merge.into, (torch.int64,)),
        ("weights", merge.weights, (torch.float32, torch.float64)),
    ):
        if not isinstance(part, Tensor) or part.dtype not in dtypes or list(part.shape) != shape:
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise SelectionError(
                f"KV15: {where}: {what}.merge.{name} is {' or '.join(map(str, dtypes))} {shape}, got {got}"
            )
        if part.device != selection.indices.device:
            raise SelectionError(
                f"KV15: {where}: {what}.merge.{name} is on {part.device}, indices are on "
                f"{selection.indices.device}; they share a device"
            )
    if merge.carried is not None:
        raise SelectionError(f"KV15: {where}: {what}.merge.carried stands in reports; leave it out")
    if what == "onward" and (merge.size_bias or merge.renormalize_keys):
        raise SelectionError(
            f"KV15: {where}: onward merges features, which have no keys and no logits yet; "
            "size_bias and renormalize_keys belong to what a cache merges (Decision(cache=...))"
        )
    into, device = merge.into, merge.into.device
    taken = into >= 0
    anchor = selection.indices.gather(-1, into.clamp(0, selection.indices.shape[-1] - 1))
    kept = selection.to_mask()
    own = torch.where(kept, kept.cumsum(-1) - 1, -1)

    def parted(labels: Tensor) -> Tensor:
        by_head = labels.to(device)[:, None].expand_as(into)
        return taken & (by_head.gather(-1, anchor) != by_head)

    strata = view.strata
    seen = (strata == 0) if what == "cache" else (strata >= 0)
    by_head = seen.to(device)[:, None].expand_as(into)
    beyond, astray, endless, hidden, foreign, early = torch.stack(
        [
            ((into < -1) | (into >= selection.counts[..., None])).any(),
            (kept & (into != own)).any(),
            (taken & ~merge.weights.isfinite()).any(),
            (taken & ~by_head & by_head.gather(-1, anchor)).any(),
            parted(view.images).any(),
            parted(view.groups).any()
            if what == "onward"
            else torch.zeros((), dtype=torch.bool, device=device),
        ]
    ).tolist()
    for broken, message in (
        (beyond, "names an entry that is not kept; into counts the valid entries from 0, and -1 is no entry"),
        (astray, "takes a kept column from its own entry; a kept column goes into its own position"),
        (endless, "has a weight that is NaN or infinite"),
        (hidden, "merges columns that are not seen into seen ones; leave them out (into = -1)"),
        (foreign, "merges columns of one image into another; buckets end where view.images changes"),
        (early, "merges columns that other text rows see; buckets of onward stay within view.groups"),
    ):
        if broken:
            raise SelectionError(f"KV15: {where}: {what} {message}")
