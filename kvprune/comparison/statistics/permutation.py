"""The exact permutation test of paired counts: which of two answers has the errors is a coin flip."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvprune.comparison.statistics.columns import Numbers

__all__ = ["fewest_p", "mcnemar", "sign_flip"]


@lru_cache(maxsize=4096)
def mcnemar(lost: int, gained: int) -> float:
    """Return the p-value of the exact two-sided McNemar test (McNemar, Psychometrika 12, 1947, 153-157).

    Args:
        lost: Questions that only the other one answers rightly.
        gained: Questions that only the own one answers rightly.
    """
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def sign_flip(differences: Numbers) -> float:
    """Return the exact two-sided p-value of paired whole numbers under random signs.

    If two policies err alike, then each utterance's difference is as likely to be -d as +d. The p-value is
    the share of all 2 ** n sign patterns whose sum is at least as far from 0 as the sum found (Fisher, The
    Design of Experiments, 1935, section 21). `scipy.stats.permutation_test` draws patterns at random for more
    than a few utterances. Sums of whole numbers allow all patterns to be counted: the distribution of the sum
    is the inverse Fourier transform of the product of cos(d t) (Pagano and Tritchler, Journal of the American
    Statistical Association 78, 1983, 435-440).

    With k differences other than 0, no p-value is below 2 / 2 ** k: five utterances never reach 0.05.

    Args:
        differences: One whole number for each utterance, [utterances].
    """
    import numpy as np

    sizes, counts = np.unique(np.abs(differences[differences != 0]).astype(np.int64), return_counts=True)
    if not len(sizes):
        return 1.0
    found = abs(int(differences.sum()))
    divisor = int(np.gcd.reduce(sizes))
    sizes, found = sizes // divisor, found // divisor
    most = int((sizes * counts).sum())
    # The sum runs from -most to most in steps of two; (sum + most) / 2 runs from 0 to most.
    length = 1 << most.bit_length()
    angles = np.pi * np.arange(length // 2 + 1) / length
    transform = np.ones(length // 2 + 1)
    for size, count in zip(sizes, counts, strict=True):
        transform *= np.cos(int(size) * angles) ** int(count)
    phase = np.exp(-1j * most * angles)
    chances = np.fft.irfft(transform * phase, length)[: most + 1]
    sums = 2 * np.arange(most + 1) - most
    p = float(chances[np.abs(sums) >= found].sum())
    return min(1.0, max(p, fewest_p(int(counts.sum()))))


def fewest_p(differing: int) -> float:
    """Return the smallest two-sided p-value that k differing examples can give: 2 / 2 ** k, at most 1."""
    return min(1.0, 2.0 ** (1 - differing))
