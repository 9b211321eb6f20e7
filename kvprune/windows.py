"""Attention from the end of the prompt: what methods look at that rank tokens by the last text rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune import scoring
from kvprune.view import LayerView

__all__ = ["window_mass"]


def window_mass(view: LayerView, rows: int) -> Tensor:
    """Attention that each column receives from the last text rows, summed over them, ``[B, Hq, S]``.

    Each stratum has a window of its own: the last live rows that see it. So an earlier image of an
    interleaved chat is ranked by the rows that ended its turn, and not by rows that cannot see it.

    Args:
        view: Of a policy that needs "queries".
        rows: Length of the window; all rows where there are fewer.

    Returns:
        float32 (float64 for float64 inputs); 0 for unseen columns. Over the columns that a window's rows
        see, a head's sum is the number of these rows, if they see one stratum only.

    Raises:
        ScoreError: If attention is not finite.
    """
    batch, heads = view.queries.shape[:2]
    dtype = torch.float64 if view.keys.dtype == torch.float64 else torch.float32
    mass = torch.zeros(batch, heads, view.columns, dtype=dtype, device=view.keys.device)
    for members in scoring.each_stratum(view.strata):
        window = scoring.last_rows(view.visibility, rows, members)
        mass = torch.where(members[:, None], view.attention_mass(window), mass)
    return mass
