"""One row of a summary: everything that is known about one configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvprune.comparison.plan.grid import GuideRole
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.statistics.error_rates import SpeechRates
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.speed import Speed

__all__ = ["Row"]

_TOLERANCE = 0.03
"""Fractions farther from the requested one are noticed. In small images rounding up may add 0.02."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one configuration.

    Attributes:
        spec: spec of the configuration; see `Configuration`.
        label: the spec without its budget.
        budget: the requested budget as text; empty where the policy has none.
        keep_ratio: the requested fraction of visible tokens; None where the budget is not a fraction.
        reach: the policy's option `reach`; None where it has no such option.
        is_reference: whether the policy looks at the answer before it prunes: the row then shows what is
            possible, is no method, and is not ranked.
        guide: what the guide of the comparison does: it "guides" in place of the model itself, or "answers"
            alone with its full cache; None where it takes no part.
        self_guided: where it guides, the spec of the same policy and budget if the model guides itself; None
            where there is no such row.
        seeds: the seeds that the policy drew with; empty where it drew nothing.
        kept_fraction: measured fraction of visible tokens kept, mean over examples and draws.
        read_fraction: measured fraction of visible tokens that a decode step reads, mean over the same; None
            where it reads all that is kept.
        bytes_held: measured size of the cross-attention cache of one example in bytes, mean over the same.
        bytes_full: its size in stock transformers.
        accuracy: share of right answers; for speech, of transcripts without a wrong word.
        speech: error rates; None for pictures.
        tasks: accuracy by task; for speech, word error rate by task.
        agreement: share of answers equal to those of the full cache.
        versus_full: comparison with the full cache; None for the full cache itself.
        versus_baseline: comparison with `Summary.partner` at the same budget; None where there is no such
            row, and for that row itself.
        versus_answer_attention: comparison with the row that may look at the answer, at the same budget; None
            where there is no such row, and for that row itself.
        versus_self_guided: comparison with the row `self_guided`; None where there is none.
        unfinished: number of answers that were cut at the limit on new tokens, over all draws.
        speed: measured times; None where nothing was timed.
        is_contrast: whether the full cache answers beside the pruned one: such a row saves nothing, and is
            not ranked.
    """

    spec: str
    label: str
    budget: str
    keep_ratio: float | None
    reach: str | None
    is_reference: bool
    guide: GuideRole | None
    self_guided: str | None
    seeds: tuple[int, ...]
    kept_fraction: float
    read_fraction: float | None
    bytes_held: float
    bytes_full: float
    accuracy: Rate
    speech: SpeechRates | None
    tasks: Mapping[str, Rate]
    agreement: Rate
    versus_full: Contrast | None
    versus_baseline: Contrast | None
    versus_answer_attention: Contrast | None
    versus_self_guided: Contrast | None
    unfinished: int
    speed: Speed | None
    is_contrast: bool = False

    @property
    def main(self) -> Rate:
        """What rows are ranked and compared by: accuracy, or for speech the word error rate."""
        return self.accuracy if self.speech is None else self.speech.word_error_rate

    @property
    def badness(self) -> float:
        """`main` as a number that is lower for better rows: right answers count negatively."""
        return -self.main.value if self.speech is None else self.main.value

    @property
    def misses_budget(self) -> bool:
        """Whether it read noticeably more or less than asked, and so cannot be compared at its budget."""
        return self.keep_ratio is not None and abs(self.read - self.keep_ratio) > _TOLERANCE

    @property
    def competes(self) -> bool:
        """Whether it is ranked among the rows of its budget."""
        return self.keep_ratio is not None and not self.is_reference and not self.is_contrast

    @property
    def read(self) -> float:
        """Fraction of visible tokens that a decode step reads."""
        return self.kept_fraction if self.read_fraction is None else self.read_fraction

    @property
    def draws(self) -> int:
        """How often each example was answered."""
        return len(self.seeds) or 1

    @property
    def lost(self) -> int:
        """Answers that are worse than those of the full cache; see `Contrast`."""
        return self.versus_full.lost if self.versus_full else 0

    @property
    def gained(self) -> int:
        """Answers that are better than those of the full cache."""
        return self.versus_full.gained if self.versus_full else 0

    @property
    def p_value(self) -> float:
        """P-value of the difference to the full cache."""
        return self.versus_full.p_value if self.versus_full else 1.0
