"""Intervals of pooled error rates by the bootstrap over utterances (and draws)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvprune.comparison.statistics.columns import Numbers

__all__ = ["RESAMPLES", "expanded_interval", "over_draws", "resampled_sums"]

RESAMPLES = 4000
"""Resamples of the utterances; fewer, but at least 1000, for more than 2000 utterances."""

_CELLS = 8_000_000
"""Resamples times utterances."""


def resampled_sums(values: Numbers) -> Numbers:
    """Return the sum of each row over each resample of the utterances.

    All rows share the resamples: the same utterances, drawn with replacement, as many as there are. Bisani
    and Ney, ICASSP 2004, 409-412, use this bootstrap for word error rates, since words of one utterance are
    not independent but utterances are, and pair it for differences. `scipy.stats.bootstrap` gives the same
    distribution but handles one statistic at a time, which takes minutes for a whole table. The random
    numbers are those of `numpy.random.RandomState(0)`, whose stream is frozen (NEP 19), so that a summary can
    be computed again.

    Args:
        values: One number for each row and utterance, [rows, utterances].

    Returns:
        The sums, [resamples, rows].
    """
    import numpy as np

    return np.concatenate([weights @ values.T for weights in _weights(values.shape[1])])


def _weights(count: int) -> Iterator[Numbers]:
    """Yield how often each utterance is drawn in each resample, [some resamples, utterances]."""
    import numpy as np

    random = np.random.RandomState(0)
    left = max(1000, min(RESAMPLES, _CELLS // count))
    while left:
        size = min(left, max(1, _CELLS // (4 * count)))
        drawn = (random.random_sample((size, count)) * count).astype(np.int64)
        yield np.stack([np.bincount(one, minlength=count) for one in drawn]).astype(np.float64)
        left -= size


def over_draws(values: Numbers) -> Numbers:
    """Return the mean of each resample over resampled draws.

    The draws are resampled independently of the utterances (Owen, Annals of Applied Statistics 1, 2007,
    386-411), one draw less than there are: with all of them, the variance of few draws would be too
    small by (draws - 1) / draws (Rao and Wu, Journal of the American Statistical Association 83, 1988,
    231-241).

    Args:
        values: One number for each resample and draw, [resamples, draws].

    Returns:
        The means, [resamples].
    """
    import numpy as np

    resamples, draws = values.shape
    if draws == 1:
        return values[:, 0]
    chosen = np.random.RandomState(1).randint(0, draws, size=(resamples, draws - 1))
    return np.take_along_axis(values, chosen, axis=1).mean(axis=1)  # type: ignore[no-any-return]


def expanded_interval(
    value: float, resampled: Numbers, utterances: int, quantile: float
) -> tuple[float, float]:
    """Return the ends of the 95 % expanded percentile interval.

    Plain percentiles are too narrow for few utterances. Hesterberg, The American Statistician 69, 2015,
    371-386, takes percentiles farther out, at the normal probability of sqrt(n / (n - 1)) times
    Student's quantile, which makes the interval as wide as a t interval where the distribution is
    normal. BCa intervals are not used: they do not make up for few utterances, and where one utterance with
    an endless repetition has most of the errors, their correction is itself unreliable. The interval is
    widened to hold `value` if it does not.

    Args:
        value: The rate or difference of rates itself.
        resampled: The same of each resample, [resamples].
        utterances: Number of utterances; at least 2.
        quantile: 97.5 % quantile of Student's t.
    """
    import numpy as np
    from scipy.stats import norm

    level = float(norm.cdf(-math.sqrt(utterances / (utterances - 1)) * quantile))
    low, high = np.quantile(resampled, [level, 1 - level])
    return min(value, float(low)), max(value, float(high))
