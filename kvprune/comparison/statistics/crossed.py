"""Means over questions and draws, where both are samples of many that could have been taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvprune.comparison.statistics.columns import Numbers

__all__ = ["FEWEST", "Crossed", "crossed"]

FEWEST = 5
"""Where fewer questions than this differ from the rest, a t interval is not trusted alone."""


@dataclass(frozen=True, slots=True)
class Crossed:
    """The mean of a table of questions and draws, and how sure it is.

    Attributes:
        mean: mean over all cells.
        variance: estimated variance of this mean.
        freedom: degrees of freedom of that estimate; 0 where it cannot be estimated.
    """

    mean: float
    variance: float
    freedom: float

    def interval(self) -> tuple[float, float]:
        """Return the ends of the 95 % t interval."""
        half = self.quantile() * math.sqrt(self.variance)
        return self.mean - half, self.mean + half

    def quantile(self) -> float:
        """Return the 97.5 % quantile of Student's t; 0 where there is no variance."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom)) if self.freedom else 0.0

    def p_value(self) -> float:
        """Return the two-sided p-value of the t test that the mean is 0; 1 where there is no variance."""
        from scipy.stats import t

        if not self.freedom:
            return 1.0
        return float(2 * t.sf(abs(self.mean) / math.sqrt(self.variance), self.freedom))


def crossed(values: Numbers) -> Crossed:
    """Return the mean over questions and draws, and its variance if both were drawn anew.

    Two-way random-effects analysis of variance with one value per cell (Searle, Casella and McCulloch,
    Variance Components, 1992, chapter 4): with mean squares Q of questions, D of draws and R of the
    remainder, the variance of the mean is (Q + D - R) / (questions * draws). Q - R and D - R estimate
    variances of questions and draws and are taken as 0 if negative. Its degrees of freedom follow
    Satterthwaite, Biometrics Bulletin 2, 1946, 110-114.

    By simulation, the interval covers the truth in 94 to 97 % of cases, whatever the share of the draws'
    luck, from five draws on. Where that luck outweighs the questions' by far, it covers 93 % with three draws
    and 88 % with two: two draws cannot tell how different draws are.

    Args:
        values: One number for each draw and question, [draws, questions]; at least two draws.

    Returns:
        The mean; without variance and degrees of freedom if all values are equal, or there is one question.

    Raises:
        ValueError: If there are fewer than two draws.
    """
    draws, questions = values.shape
    if draws < 2:
        raise ValueError(f"the variance of draws needs at least two of them, got {draws}")
    mean = float(values.mean())
    if questions < 2:
        return Crossed(mean, 0.0, 0.0)
    by_question = values.mean(axis=0) - mean  # [questions]
    by_draw = values.mean(axis=1) - mean  # [draws]
    rest = values - mean - by_question[None, :] - by_draw[:, None]  # [draws, questions]
    remainder = float((rest**2).sum()) / ((questions - 1) * (draws - 1))
    question = max(remainder, draws * float((by_question**2).sum()) / (questions - 1))
    draw = max(remainder, questions * float((by_draw**2).sum()) / (draws - 1))
    total = question + draw - remainder
    if total <= 1e-18:
        return Crossed(mean, 0.0, 0.0)
    spread = question**2 / (questions - 1) + draw**2 / (draws - 1)
    spread += remainder**2 / ((questions - 1) * (draws - 1))
    return Crossed(mean, total / (questions * draws), total**2 / spread)
