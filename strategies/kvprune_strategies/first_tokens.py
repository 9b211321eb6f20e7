"""What `vatp` and `expected` share: the first tokens stay, whatever their scores."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune import LayerView, scoring


def keep_first(scores: Tensor, view: LayerView, count: int) -> Tensor:
    """Give the first tokens of each stratum a score above all others of their head.

    Args:
        scores: ``[B, H, S]``, finite and at least 0.
        view: What the scores are of.
        count: Number of tokens that decoding can see; in an interleaved chat, also of those that only earlier
            rows see.

    Returns:
        ``[B, H, S]``; ``scores`` itself if ``count`` is 0.
    """
    if not count:
        return scores
    first = torch.zeros_like(view.visible)  # [B, S]
    for members in scoring.each_stratum(view.strata):  # [B, S]
        first |= members & (members.cumsum(-1) <= count)
    # Above the highest score of the head, and near it, so that means over heads still compare the others.
    above = (2 * scores.amax(-1, keepdim=True) + 1).clamp(max=torch.finfo(scores.dtype).max)  # [B, H, 1]
    return torch.where(first[:, None], above, scores)
