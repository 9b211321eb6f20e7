"""Receipts: what was really kept and held, measured from the tensors in the cache and never estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kvprune.spec import PolicySpec

__all__ = ["CompressionReport", "LayerReceipt"]

_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class LayerReceipt:
    """One cross-attention layer after the latest prefill.

    Args:
        layer_idx: Index of the decoder layer.
        columns: Tokens per sample that stock transformers would hold.
        width: Tokens per sample and KV head that are held, padding of ragged batches included.
        bytes_held: Bytes of keys and values that are held.
        bytes_full: Bytes of keys and values that stock transformers would hold.
        bytes_of_bookkeeping: Bytes of column numbers and validity flags.
    """

    layer_idx: int
    columns: int
    width: int
    bytes_held: int
    bytes_full: int
    bytes_of_bookkeeping: int


@dataclass
class CompressionReport:
    """What one compression did so far.

    Byte counts and layers are those of the latest prefill; kept fractions are averaged over all of them.

    Attributes:
        policy: The spec that ran.
        seed: The seed it ran with.
        encoder_inputs: Forward calls that brought encoder states (an image).
        prefills: Those of them after which the policy's decisions were applied.
        layers: One receipt per cross-attention layer.
        kept_per_sample: Tokens that decoding keeps / tokens it could see, for each sample of the latest
            prefill, averaged over layers and heads. NaN for samples that see no image.
    """

    policy: PolicySpec
    seed: int
    encoder_inputs: int = 0
    prefills: int = 0
    layers: tuple[LayerReceipt, ...] = ()
    kept_per_sample: tuple[float, ...] = ()
    _kept_sum: float = field(default=0.0, repr=False)
    _kept_samples: int = field(default=0, repr=False)

    def count_encoder_input(self) -> None:
        """Note that encoder states arrived."""
        self.encoder_inputs += 1

    def add_prefill(
        self, layers: Sequence[LayerReceipt], kept: Sequence[Sequence[float]], visible: Sequence[int]
    ) -> None:
        """Add the receipts of one prefill.

        Args:
            layers: One receipt per layer.
            kept: Tokens kept among those that decoding could see, by layer and sample, averaged over heads.
            visible: Tokens that decoding could see, by sample.
        """
        self.prefills += 1
        self.layers = tuple(layers)
        fractions = []
        for sample, seen in enumerate(visible):
            if seen == 0:
                fractions.append(float("nan"))
                continue
            fraction = sum(by_sample[sample] for by_sample in kept) / len(kept) / seen
            fractions.append(fraction)
            self._kept_sum += fraction
            self._kept_samples += 1
        self.kept_per_sample = tuple(fractions)

    @property
    def kept_fraction(self) -> float:
        """Tokens that decoding keeps / tokens it could see, mean over samples, layers and heads.

        NaN before the first prefill and if no sample saw an image.
        """
        return self._kept_sum / self._kept_samples if self._kept_samples else float("nan")

    @property
    def bytes_held(self) -> int:
        """Bytes of cross-attention keys and values held after the latest prefill."""
        return sum(layer.bytes_held for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes of cross-attention keys and values that stock transformers would hold."""
        return sum(layer.bytes_full for layer in self.layers)

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of column numbers and validity flags beside the keys and values."""
        return sum(layer.bytes_of_bookkeeping for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready data; fractions that do not exist are null."""
        return {
            "policy": self.policy.to_dict(),
            "spec": str(self.policy),
            "seed": self.seed,
            "encoder_inputs": self.encoder_inputs,
            "prefills": self.prefills,
            "kept_fraction": _or_none(self.kept_fraction),
            "kept_per_sample": [_or_none(fraction) for fraction in self.kept_per_sample],
            "bytes_held": self.bytes_held,
            "bytes_full": self.bytes_full,
            "bytes_of_bookkeeping": self.bytes_of_bookkeeping,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        if not self.prefills:
            return f"{self.policy}: nothing compressed yet ({self.encoder_inputs} encoder inputs seen)"
        share = self.bytes_held / self.bytes_full
        lines = [
            f"{self.policy}  seed {self.seed}  prefills {self.prefills}",
            f"kept {self.kept_fraction:.1%} of visible tokens; cross-attention cache "
            f"{self.bytes_held / _MIB:.2f} MiB of {self.bytes_full / _MIB:.2f} MiB stock ({share:.1%})",
            f"{'layer':>5}  {'held':>6}  {'stock':>6}  {'MiB held':>9}  {'MiB stock':>9}",
        ]
        lines += [
            f"{layer.layer_idx:>5}  {layer.width:>6}  {layer.columns:>6}  "
            f"{layer.bytes_held / _MIB:>9.3f}  {layer.bytes_full / _MIB:>9.3f}"
            for layer in self.layers
        ]
        return "\n".join(lines)


def _or_none(value: float) -> float | None:
    return None if value != value else value
