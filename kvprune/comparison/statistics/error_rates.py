"""Error rates of transcripts, pooled and by utterance, and their paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvprune.comparison.statistics.bootstrap import expanded_interval, over_draws, resampled_sums
from kvprune.comparison.statistics.columns import Columns
from kvprune.comparison.statistics.crossed import crossed
from kvprune.comparison.statistics.paired import PairedDifference
from kvprune.comparison.statistics.rates import Rate, rate

if TYPE_CHECKING:
    from kvprune.comparison.statistics.columns import Numbers

__all__ = ["ErrorRates", "Resampled", "SpeechRates", "deviation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechRates:
    """Error rates of the transcripts of one configuration; rates can exceed 1.

    Attributes:
        word_error_rate: errors in words over all utterances, divided by the words of all references.
        character_error_rate: the same for characters.
        mean_word_error_rate: mean over utterances of each one's word error rate.
        mean_character_error_rate: the same for characters.
        loops: transcripts that repeat themselves endlessly, over all draws.
    """

    word_error_rate: Rate
    character_error_rate: Rate
    mean_word_error_rate: Rate
    mean_character_error_rate: Rate
    loops: int


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """Errors and units of one configuration, and their sums in each resample.

    Attributes:
        errors: errors, [draws, utterances].
        units: words or characters of the reference, [utterances].
        rates: pooled rate of each resample, [resamples, draws].
    """

    errors: Numbers
    units: Numbers
    rates: Numbers

    @property
    def value(self) -> float:
        """The pooled rate, mean over draws."""
        return float(self.errors.sum() / (self.units.sum() * len(self.errors)))

    def rate(self) -> Rate:
        """Return the pooled rate with its interval."""
        draws = len(self.errors)
        low, high = _interval(self.errors, self.units, self.value, over_draws(self.rates))
        hits = float(self.errors.sum())
        return Rate(self.value, max(0.0, low), high, hits, round(self.units.sum()) * draws)

    def minus(
        self, other: Resampled, own_draws: Sequence[int], other_draws: Sequence[int]
    ) -> PairedDifference:
        """Return the difference of two pooled rates over the same utterances, with its paired interval.

        Args:
            other: What to subtract.
            own_draws: Number of the own draw of each pair.
            other_draws: Number of the other's draw of each pair.
        """
        errors = self.errors[list(own_draws)] - other.errors[list(other_draws)]
        value = float(errors.sum() / (self.units.sum() * len(errors)))
        resampled = over_draws(self.rates[:, list(own_draws)] - other.rates[:, list(other_draws)])
        return PairedDifference(value, *_interval(errors, self.units, value, resampled, signed=True))


class ErrorRates:
    """Error rates of many configurations, all from the same resamples of the same utterances.

    Args:
        given: Columns of each configuration by spec, all of transcripts of the same references.
        tasks: Numbers of the utterances of each task.
        order: Order in which utterances are resampled, so that their order in the data does not matter.
    """

    def __init__(
        self, given: Mapping[str, Columns], tasks: Mapping[str, Sequence[int]], order: Sequence[int]
    ) -> None:
        self._speech = {spec: one.speech for spec, one in given.items() if one.speech is not None}
        order = list(order)
        pairs = (("word_errors", "words"), ("character_errors", "characters"))
        parts = [self._part(*pair, order, by_utterance) for by_utterance in (False, True) for pair in pairs]
        self._words, self._characters, self._mean_words, self._mean_characters = _resampled(parts)
        self._tasks = {}
        for task, numbers in tasks.items():
            of_task = set(numbers)
            part = [number for number in order if number in of_task]
            whole = len(part) == len(order)
            self._tasks[task] = (
                self._words if whole else _resampled([self._part("word_errors", "words", part, False)])[0]
            )

    def words(self, spec: str) -> Resampled:
        """Return the word errors of a configuration."""
        return self._words[spec]

    def tasks(self, spec: str) -> dict[str, Rate]:
        """Return the word error rate of each task."""
        return {task: found[spec].rate() for task, found in self._tasks.items()}

    def rates(self, spec: str) -> SpeechRates:
        """Return all error rates of a configuration."""
        return SpeechRates(
            word_error_rate=self._words[spec].rate(),
            character_error_rate=self._characters[spec].rate(),
            mean_word_error_rate=self._mean_words[spec].rate(),
            mean_character_error_rate=self._mean_characters[spec].rate(),
            loops=int(self._speech[spec].loops.sum()),
        )

    def _part(
        self, errors: str, units: str, numbers: list[int], by_utterance: bool
    ) -> tuple[dict[str, Numbers], Numbers]:
        """Return errors [draws, utterances] by spec, and units [utterances], of some utterances.

        Args:
            errors: Which errors.
            units: What they are errors of.
            numbers: The utterances.
            by_utterance: Divide each utterance's errors by its units, and count it once.
        """
        import numpy as np

        tables = {spec: getattr(one, errors)[:, numbers] for spec, one in self._speech.items()}
        weights = getattr(next(iter(self._speech.values())), units)[0, numbers]
        if not by_utterance:
            return tables, weights
        weights = np.maximum(weights, 1)  # so that an utterance without words has a rate
        return {spec: table / weights for spec, table in tables.items()}, np.ones_like(weights)


def _resampled(parts: Sequence[tuple[dict[str, Numbers], Numbers]]) -> list[dict[str, Resampled]]:
    """Return the rates of each resample, for several errors and units of the same utterances."""
    import numpy as np

    rows = [table for tables, weights in parts for table in (*tables.values(), weights[None])]
    sums = iter(np.split(resampled_sums(np.concatenate(rows)), np.cumsum([len(row) for row in rows]), axis=1))
    found = []
    for tables, weights in parts:
        own = {spec: next(sums) for spec in tables}
        totals = np.maximum(next(sums), 1)  # [resamples, 1]
        found.append({spec: Resampled(tables[spec], weights, own[spec] / totals) for spec in tables})
    return found


def deviation(errors: Numbers, units: Numbers) -> float:
    """Return the standard deviation of one utterance's part in a pooled rate (Taylor linearisation).

    Args:
        errors: Errors, or differences of errors, [draws, utterances].
        units: Words of the references, [utterances].
    """
    return float(_linear(errors, units).mean(axis=0).std(ddof=1)) if len(units) > 1 else 0.0


def _linear(errors: Numbers, units: Numbers) -> Numbers:
    """Return numbers whose mean varies as the pooled rate does (Taylor linearisation).

    Args:
        errors: Errors, [draws, utterances].
        units: Words of the references, [utterances].
    """
    pooled = errors.sum() / (units.sum() * len(errors))
    return (errors - pooled * units) / units.mean()  # type: ignore[no-any-return]


def _interval(
    errors: Numbers, units: Numbers, value: float, resampled: Numbers, *, signed: bool = False
) -> tuple[float, float]:
    """Return the interval of a pooled rate, and of a difference of two if `signed`.

    One utterance says nothing about others: the interval is then at least -1..1 (0..1 for a rate). Where no
    utterance has an error (a difference), the bootstrap would shrink to a point. The interval then reaches
    to where the Wilson interval of the share of such utterances ends, each with one error.
    """
    from scipy.stats import t

    draws, utterances = errors.shape
    if utterances < 2:
        most = max(1.0, abs(value))
        return (-most if signed else 0.0), most
    if not errors.any():
        end = rate(0, utterances).high / float(units.mean())
        return (-end if signed else 0.0), end
    freedom = float(utterances - 1)
    if draws > 1:
        freedom = crossed(_linear(errors, units)).freedom or freedom
    return expanded_interval(value, resampled, utterances, float(t.ppf(0.975, freedom)))
