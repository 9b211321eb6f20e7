"""Divides one budget among layers, or among the heads of a layer (apportionment).

A row is a layer or a head. A rule gives an urgency to the i-th best token of each row. The most urgent tokens
of all rows are kept, as many as the budget allows. So the total is exact, a larger budget keeps a superset
(KV14), and if a row has no more tokens, the next most urgent tokens of other rows are kept instead.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["apportion", "blended", "each", "is_clamped", "proportional"]


def apportion(urgency: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return how many tokens each row keeps, int64 ``[B, R]``.

    Ties between equally urgent tokens are broken by their rank in the row, and then by row. So rows with
    equal urgencies keep equal numbers, or the first of them one more. Urgencies that agree to five digits
    count as equal, because rounding errors depend on the batch and the device and must not decide.
    So give the part that is left rather than minus the part that is taken: close to 1, five digits are few.

    Args:
        urgency: ``[B, R, S]``, urgency of the i-th best token of each row, finite. A token cannot be more
            urgent than a better one of its row: values that rise along S are lowered to the value before.
        least: int64 ``[B, R]``, tokens that a row keeps in any case, at most ``most``.
        most: int64 ``[B, R]``, number of tokens in a row.
        total: int64 ``[B]``, tokens that all rows keep together. It is raised to the sum of ``least`` and cut
            to the sum of ``most``.

    With a larger total, no row keeps fewer tokens. This also holds if ``least`` grows with the total, by no
    more than the total: row r keeps the larger of ``least`` and the number of its tokens whose urgency is
    above a common level, and a larger total cannot raise that level.

    Example:
        >>> urgency = torch.tensor([[[9.0, 5.0, 1.0], [6.0, 2.0, 1.0]]])
        >>> apportion(urgency, torch.tensor([[0, 0]]), torch.tensor([[3, 3]]), torch.tensor([3]))
        tensor([[2, 1]])
    """
    rows, columns = urgency.shape[1:]
    order = _order(urgency, least, most)  # [B, S * R]
    wanted = total.clamp(min=least.sum(-1)).clamp(max=most.sum(-1))
    taken = (torch.arange(rows * columns, device=urgency.device) < wanted[:, None]).to(torch.int64)
    return torch.zeros_like(least).scatter_add_(-1, order % rows, taken)


def _order(urgency: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Return the tokens of all rows from the first that is kept to the last, int64 ``[B, S * R]``.

    The i-th best token of row r has the number i * R + r. Arguments as for `apportion`.
    """
    place = torch.arange(urgency.shape[-1], device=urgency.device)
    asked = _coarse(urgency).masked_fill(place < least[..., None], torch.inf).cummin(-1).values
    asked = asked.masked_fill(place >= most[..., None], -torch.inf)  # [B, R, S]
    # Ordered by rank and then by row, so that a stable sort breaks ties in this way.
    return asked.mT.reshape(len(asked), -1).argsort(dim=-1, descending=True, stable=True)


def _coarse(numbers: Tensor) -> Tensor:
    """Round to 18 significant binary digits, float64."""
    mantissa, exponent = torch.frexp(numbers.double())
    rounded = torch.ldexp((mantissa * 2**18).round() / 2**18, exponent)
    lowest = torch.finfo(rounded.dtype).min
    return rounded.clamp(lowest, -lowest)


def proportional(weights: Tensor, columns: int) -> Tensor:
    """Return urgencies for `apportion` that divide the total in proportion to weights.

    The i-th token of row r has the urgency w_r / (i + 1/2). This is Webster's method (Sainte-Lague): shares
    are rounded to the nearest whole number as far as the total allows. With a larger total no row keeps fewer
    tokens; rounding by largest remainders would not ensure that (the Alabama paradox).

    Args:
        weights: ``[B, R]``, not negative. If all are 0, rows keep equal numbers.
        columns: Number of tokens in a row.

    Returns:
        float64 ``[B, R, columns]``.

    Example:
        >>> urgency = proportional(torch.tensor([[3.0, 1.0]]), 8)
        >>> apportion(urgency, torch.tensor([[0, 0]]), torch.tensor([[8, 8]]), torch.tensor([4]))
        tensor([[3, 1]])
    """
    place = torch.arange(columns, dtype=torch.float64, device=weights.device)
    return weights.double()[..., None] / (place + 0.5)


def blended(urgency: Tensor, most: Tensor, alpha: float) -> Tensor:
    """Return urgencies for `apportion` that mix what each row wins with an even share of the total.

    If n tokens are kept, h_r of them in row r, and R is the number of rows, row r's share is
    (1 - alpha) * h_r + alpha * n / R. A share is rounded to the nearest whole number, a half upward; where
    the rounded shares do not add up to n, the tokens that were due first are kept. So at alpha = 0 a row
    keeps what it wins, at alpha = 1 all rows keep equal numbers, and with a larger total no row keeps fewer.

    Args:
        urgency: As for `apportion`.
        most: As for `apportion`.
        alpha: Part of the total that is shared evenly, in [0, 1]; read as the decimal that it is written as,
            rounded to a fraction with a denominator of at most a million.

    Returns:
        float64 ``[B, R, S]``: minus the smallest n at which the i-th best token of the row is due.

    Example:
        >>> urgency = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [5.0, 4.0, 3.0, 2.0]]])
        >>> most, least, total = torch.tensor([[4, 4]]), torch.tensor([[0, 0]]), torch.tensor([4])
        >>> apportion(blended(urgency, most, 0.5), least, most, total)
        tensor([[3, 1]])
    """
    batch, rows, columns = urgency.shape
    even = Fraction(str(alpha)).limit_denominator(10**6)
    # All is multiplied by 2 * R * denominator, so that it is exact in whole numbers.
    own, shared = 2 * rows * (even.denominator - even.numerator), 2 * even.numerator
    order = _order(urgency, torch.zeros_like(most), most)  # [B, S * R]
    count = torch.arange(1, rows * columns + 1, device=urgency.device).expand(batch, -1)
    wins = torch.empty_like(order).scatter_(-1, order, count)  # how many are kept when a token is won
    wins = wins.view(batch, columns, rows).mT.contiguous()  # [B, R, S], rising along S
    place = torch.arange(columns, device=urgency.device)
    # The row's share just after it won its i-th token, and the share at which its i-th token is due.
    share = own * (place + 1) + shared * wins  # [B, R, S]
    needed = (rows * even.denominator * (2 * place + 1)).expand_as(share).contiguous()  # [B, R, S]
    won = torch.searchsorted(share, needed)  # [B, R, S], tokens that the row has won before that
    next_win = wins.gather(-1, won.clamp(max=columns - 1)).masked_fill(won == columns, rows * columns)
    if shared == 0:
        return -next_win.double()
    # Between two wins the share grows by its even part alone.
    grown = -((own * won - needed) // shared)  # rounded up
    return -torch.minimum(next_win, grown).double()


def is_clamped(weights: Tensor, least: Tensor, most: Tensor, total: Tensor) -> Tensor:
    """Return whether the share of some row is above ``most`` or below ``least``, a bool scalar.

    Args:
        weights: As for `proportional`.
        least: As for `apportion`.
        most: As for `apportion`.
        total: As for `apportion`. Samples that keep all tokens or none are not considered.
    """
    sums = weights.double().sum(-1, keepdim=True)
    equal = torch.full_like(sums, 1 / weights.shape[-1])
    share = torch.where(sums > 0, weights / sums, equal) * total[:, None]  # [B, R]
    outside = (share.round() > most) | (share.round() < least)
    return (outside.any(-1) & (total > 0) & (total < most.sum(-1))).any()


def each(function: Callable[[int], int], counts: Tensor) -> Tensor:
    """Apply a function of whole numbers to each element, in exact Python arithmetic (one host transfer).

    Args:
        function: For example `kvprune.Budget.resolve`.
        counts: int64 ``[B, R]``.

    Returns:
        int64 ``[B, R]``.

    Example:
        >>> each(lambda count: count // 2, torch.tensor([[4, 7]]))
        tensor([[2, 3]])
    """
    computed = [[function(count) for count in row] for row in counts.tolist()]
    return torch.tensor(computed, dtype=torch.int64, device=counts.device).reshape(counts.shape)
