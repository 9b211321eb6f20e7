"""How a budget is shared out among layers, or among the heads of one: one mechanism for all rules.

A rule says how *urgent* the i-th best token of each row (a layer, a head) is; the most urgent tokens of all
rows are kept, as many as the budgets of all rows together allow. So the total is exact, a larger budget keeps
a superset (KV14), and what a row cannot take goes to the next most urgent tokens of the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["apportion", "each", "is_clamped", "proportional"]


def apportion(urgency: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return how many tokens each row keeps, int64 ``[B, R]``.

    Equally urgent tokens are taken by their place in their row, and then by row: rows that ask for the same
    get the same, or the first of them one more. Urgencies that agree to five digits are equal: rounding,
    which depends on the batch and the device, must not decide between rows.

    Args:
        urgency: ``[B, R, S]``, of the i-th best token of each row, finite. A token is never more urgent than
            a better one of its row: what rises along S is cut down to what stands before it.
        least: int64 ``[B, R]``, tokens of a row that come before all others, at most ``most``.
        most: int64 ``[B, R]``, tokens that a row has.
        total: int64 ``[B]``, tokens of all rows. It is raised to the sum of ``least`` and cut to that of
            ``most``.

    A larger total never takes a token from a row, also if ``least`` rises with it by no more than the total
    does: row r keeps max(least, what is above a common level), and that level does not rise.
    """
    batch, rows, columns = urgency.shape
    place = torch.arange(columns, device=urgency.device)
    asked = _coarse(urgency).masked_fill(place < least[..., None], torch.inf).cummin(-1).values
    asked = asked.masked_fill(place >= most[..., None], -torch.inf)
    # By place and then row, so that a stable sort breaks ties that way.
    order = asked.mT.reshape(batch, -1).argsort(dim=-1, descending=True, stable=True)
    wanted = total.clamp(min=least.sum(-1)).clamp(max=most.sum(-1))
    taken = (torch.arange(rows * columns, device=urgency.device) < wanted[:, None]).to(torch.int64)
    return torch.zeros_like(least).scatter_add_(-1, order % rows, taken)


def _coarse(numbers: Tensor) -> Tensor:
    """Round to 18 binary digits, float64."""
    mantissa, exponent = torch.frexp(numbers.double())
    rounded = torch.ldexp((mantissa * 2**18).round() / 2**18, exponent)
    lowest = torch.finfo(rounded.dtype).min
    return rounded.clamp(lowest, -lowest)


def proportional(weights: Tensor, columns: int) -> Tensor:
    """Return urgencies with which rows keep tokens in proportion to weights, float64 ``[B, R, columns]``.

    The i-th token of row r has w_r / (i + 1/2), which is Webster's method: shares are rounded to the nearest
    whole number as far as the total allows, and a larger total takes nothing from anybody, as rounding by
    largest remainders may (the Alabama paradox).

    Args:
        weights: ``[B, R]``, not negative. Where all are 0, rows keep the same.
        columns: Number of tokens for which urgencies are wanted.
    """
    place = torch.arange(columns, dtype=torch.float64, device=weights.device)
    return weights.double()[..., None] / (place + 0.5)


def is_clamped(weights: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return whether some row's share is more than it has or less than its least, a bool scalar.

    Args:
        weights: As for `proportional`.
        least: As for `apportion`.
        most: As for `apportion`.
        total: As for `apportion`. Where it is all that there is, or nothing, no share matters.
    """
    sums = weights.double().sum(-1, keepdim=True)
    equal = torch.full_like(sums, 1 / weights.shape[-1])
    share = torch.where(sums > 0, weights / sums, equal) * total[:, None]
    outside = (share.round() > most) | (share.round() < least)
    return (outside.any(-1) & (total > 0) & (total < most.sum(-1))).any()


def each(function: Callable[[int], int], counts: Tensor) -> Tensor:
    """Apply exact arithmetic to whole numbers, int64 ``[B, R]`` (one host transfer)."""
    computed = [[function(count) for count in row] for row in counts.tolist()]
    return torch.tensor(computed, dtype=torch.int64, device=counts.device).reshape(counts.shape)
