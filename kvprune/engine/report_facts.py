"""What a report knows: the facts of a compression (`ReportFacts`), without the live cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvprune.engine.guidance import GuideReceipt
from kvprune.engine.totals import Totals
from kvprune.policy.spec import PolicySpec
from kvprune.tokens.layout import Unit

__all__ = ["ReportFacts"]


@dataclass
class ReportFacts(Totals):
    """What one compression has done so far.

    Byte counts and layers are those of the latest prefill, less what decode steps have freed since; kept
    fractions are averaged over all prefills, and seconds are added up.

    Attributes:
        policy: Spec of the policy.
        seed: Seed for its random numbers.
        requested: Budget options of the policy by name, such as ``{"keep_ratio": 0.25}``.
        encoder_inputs: Number of forward calls that brought encoder states (an image).
        prefills: Number of these in which the policy's decisions were applied.
        rereads: Number of these after which the last token was read again from the pruned cache
            (``compress(..., reread=True)``).
        layers: One receipt per cross-attention layer.
        kept_per_sample: Tokens that decoding keeps / tokens it could see, for each sample of the latest
            prefill, averaged over layers and heads. NaN for samples that see no image.
        kept_of_stored: Tokens that decoding keeps / tokens that stock transformers holds, padding tiles
            included; mean over samples, layers and heads of the latest prefill.
        bytes_peak: Peak bytes of cross-attention keys and values in the latest prefill.
        seconds: Time that the policy took to decide, over all prefills, without its guide.
        guide: Cost of the guide, over all prefills; None if the policy has none.
        warnings: Warnings for the user, each once, in order of appearance.
        drew: Whether the policy drew random numbers, so that another seed may keep other tokens.
        text_layers: One receipt per self-attention layer, if the policy prunes text. All other byte counts
            are of cross-attention only.
        steps: One receipt per cross-attention layer of the decode steps since the latest prefill, if the
            policy decides in them.
        text_kept_fraction: Text entries kept / text entries before pruning, mean over samples and layers of
            the latest prefill; None if the policy prunes no text.
        unit: What one column of the cache is, for readers.
        seconds_per_column: Seconds of sound that one column adds; None if columns are no sound, or it is
            unknown.
        weights: A sentence about each of the policy's trained weights: on which model they learned.
        loaded: File of the saved cache that this compression began with; None if it began with none.
    """

    policy: PolicySpec
    seed: int
    requested: Mapping[str, float | int] = field(default_factory=dict)
    encoder_inputs: int = 0
    prefills: int = 0
    rereads: int = 0
    kept_per_sample: tuple[float, ...] = ()
    kept_of_stored: float = float("nan")
    bytes_peak: int = 0
    seconds: float = 0.0
    guide: GuideReceipt | None = None
    warnings: tuple[str, ...] = ()
    drew: bool = False
    text_kept_fraction: float | None = None
    unit: Unit = Unit("token")
    seconds_per_column: float | None = None
    weights: tuple[str, ...] = ()
    loaded: str | None = None
    _kept_sum: float = field(default=0.0, repr=False)
    _kept_samples: int = field(default=0, repr=False)

    @property
    def kept_fraction(self) -> float:
        """Tokens that decoding keeps / tokens it could see, mean over samples, layers and heads.

        NaN before the first prefill, and if no sample saw an image.
        """
        return self._kept_sum / self._kept_samples if self._kept_samples else float("nan")

    @property
    def kept_seconds(self) -> tuple[float, float] | None:
        """Seconds of sound that decoding keeps and could see, mean over samples of the latest prefill.

        None where columns are no sound, or nobody knows how long they last.
        """
        seen = [fraction for fraction in self.kept_per_sample if fraction == fraction]
        if self.seconds_per_column is None or not seen:
            return None
        heard = self._visible * self.seconds_per_column
        return heard * sum(seen) / len(seen), heard
