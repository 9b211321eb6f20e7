"""What `visionzip` and `prumerge` share: patches that are dropped merge into similar ones that are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvprune import Decision, FeatureView, Selection, scoring


def class_columns(view: FeatureView) -> Tensor:
    """Mark the class tokens of the encoder, bool ``[B, S]``; none where the layout has none."""
    classes = view.class_tokens
    return torch.zeros_like(view.visible) if classes is None else classes.expand_as(view.visible)


def merge_into_most_similar(
    view: FeatureView, kept: Tensor, targets: Tensor, merge: Callable[[Tensor, Tensor], Selection]
) -> Decision:
    """Keep columns for all layers, and merge each dropped patch into the most similar target.

    Similarity is the cosine of projected features. A patch merges only into a target of its own visibility
    group; if there is none, it is dropped. Class tokens neither merge nor are merged into.

    Args:
        view: What the policy decides about.
        kept: bool ``[B, 1, S]``.
        targets: bool ``[B, S]``, kept columns into which others may merge.
        merge: Makes the selection of ``kept`` and the buckets, int64 ``[B, 1, S]``: the kept column that each
            column belongs to, or -1 where it is dropped. Not called if nothing merges.
    """
    patches = ~class_columns(view)  # [B, S]
    cells = torch.where((view.strata >= 0) & patches, view.groups, -1)  # [B, S]
    joined = scoring.most_alike(view.features, targets & patches, ~kept[:, 0], cells)  # [B, S]
    if not bool((joined >= 0).any()):
        return Decision(onward=Selection.from_mask(kept))
    columns = torch.arange(view.columns, device=view.device)
    buckets = torch.where(kept, columns, joined[:, None])  # [B, 1, S]
    return Decision(onward=merge(kept, buckets))
