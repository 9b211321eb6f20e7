"""Receipts: what one layer holds after a prefill, measured from its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvprune.tokens.selection import OWN_BITS

__all__ = [
    "LayerReceipt",
    "LayerSums",
    "StepReceipt",
    "TextReceipt",
    "Window",
    "WindowReceipt",
    "read_of_visible",
]


@dataclass(frozen=True, kw_only=True)
class LayerReceipt:
    """One cross-attention layer after the latest prefill.

    Args:
        layer_idx: Index of the decoder layer.
        columns: Tokens per sample that stock transformers would hold.
        width: Tokens per sample and KV head that are held, padding of ragged batches included.
        bytes_held: Bytes of keys and values that are held; quantized ones count as codes and group bounds.
        bytes_full: Bytes of keys and values that stock transformers would hold.
        bytes_of_bookkeeping: Bytes of column numbers and validity flags.
        decisions: Number of decisions of the policy about this layer so far.
        seconds: Run time of the latest decision.
        widths: Entries by the number of bits in which they are held; "16" means the cache's own dtype.
    """

    layer_idx: int
    columns: int
    width: int
    bytes_held: int
    bytes_full: int
    bytes_of_bookkeeping: int
    decisions: int = 1
    seconds: float = 0.0
    widths: Mapping[str, int] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether some entries are held in fewer bits than the cache's own dtype has."""
        return any(bits != str(OWN_BITS) for bits in self.widths)


@dataclass(frozen=True, kw_only=True)
class TextReceipt:
    """One self-attention layer after the latest prefill, for policies that prune text.

    Args:
        layer_idx: Index of the decoder layer.
        tokens: Text tokens per sample that stock transformers would hold, padding included.
        width: Text entries per sample and KV head that are held, padding of ragged batches included.
        bytes_held: Bytes of their keys and values.
        bytes_full: Bytes that stock transformers would hold.
    """

    layer_idx: int
    tokens: int
    width: int
    bytes_held: int
    bytes_full: int


@dataclass(frozen=True, kw_only=True)
class StepReceipt:
    """One cross-attention layer in the decode steps after the latest prefill, for policies that decide there.

    Reading fewer entries frees nothing: `bytes_held` says what stays in memory, `bytes_read_per_step` what a
    step's attention reads of it.

    Args:
        layer_idx: Index of the decoder layer.
        steps: Decode steps so far, without those of rejected drafts (assisted decoding). An encoder-decoder
            model does not say what becomes of the last drafts of a call, so these count as steps.
        entries_read: Entries that a text row and KV head reads, mean over steps, rows and heads. Rejected
            drafts have read, too, and count here.
        entries_held: Entries that it could have read, mean as above.
        bytes_read_per_step: Bytes of keys and values that one step reads, all rows together, mean over steps.
        width: Entries per sample and KV head that the layer holds after the latest step.
        bytes_held: Bytes of their keys and values.
        bytes_of_bookkeeping: Bytes of column numbers and validity flags.
        bytes_of_state: Bytes of what the policy knows about the layer between steps, in addition.
        rejected: Steps of rejected drafts.
        bytes_on_host: How much of `bytes_held` lies in host memory while the layer decodes (`offload` of
            `attnpred`); all or nothing.
        bytes_staged: Bytes of the largest copy of chosen entries that was on the device, in addition to
            `bytes_held`. A step that reads everything copies all of one layer while this attends.
    """

    layer_idx: int
    steps: int
    entries_read: float
    entries_held: float
    bytes_read_per_step: int
    width: int
    bytes_held: int
    bytes_of_bookkeeping: int
    bytes_of_state: int
    rejected: int = 0
    bytes_on_host: int = 0
    bytes_staged: int = 0

    @property
    def any_steps(self) -> bool:
        """Whether anything was read in a step."""
        return self.steps + self.rejected > 0

    def of(self, layer: LayerReceipt) -> LayerReceipt:
        """Return the receipt of a layer after these steps."""
        if self.width == layer.width:
            return layer
        return replace(
            layer,
            width=self.width,
            widths={str(OWN_BITS): self.width},
            bytes_held=self.bytes_held,
            bytes_of_bookkeeping=self.bytes_of_bookkeeping,
        )


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one prefill reads of recordings that a model reads window by window, as Whisper does.

    Args:
        rows: For each row of the prefill, the recording that it reads: its index in the batch that
            ``generate`` was given (return sequences count as recordings of their own). -1 for rows of
            padding, which a static cache has when recordings have ended.
        starts: For each row, the first feature frame of the window; Whisper has 100 frames a second.
        attempt: 0 for the first try at this window, 1 for the first repetition at another temperature, ...
        is_first: Whether it is the first prefill of its call of ``generate``.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    attempt: int = 0
    is_first: bool = True


class LayerSums:
    """What the receipts of a prefill's cross-attention layers add up to."""

    layers: tuple[LayerReceipt, ...]

    @property
    def bytes_held(self) -> int:
        """Bytes of cross-attention keys and values held after the prefill."""
        return sum(layer.bytes_held for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes of cross-attention keys and values that stock transformers would hold."""
        return sum(layer.bytes_full for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class WindowReceipt(LayerSums):
    """One prefill of the latest ``generate`` of a model that reads recordings window by window.

    Args:
        rows: For each row of the prefill, the index of its recording; see `Window`. Beams of one recording
            are rows of their own.
        starts: For each row, the first feature frame of its window.
        attempt: 0 for the first try at a window; see `Window`.
        kept_per_sample: Tokens that decoding keeps / tokens it could see, for each row.
        bytes_peak: Peak bytes of cross-attention keys and values in this prefill.
        layers: One receipt per cross-attention layer.
        steps: One receipt per cross-attention layer of the decode steps until the next prefill, if the policy
            decides in them.
        visible: Tokens that decoding could see, mean over rows.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    attempt: int
    kept_per_sample: tuple[float, ...]
    bytes_peak: int
    layers: tuple[LayerReceipt, ...]
    steps: tuple[StepReceipt, ...] = ()
    visible: float = 0.0

    @property
    def read_of_visible(self) -> float:
        """Tokens that a decode step reads / tokens that decoding could see; NaN without such steps."""
        return read_of_visible(self.steps, self.visible)

    def to_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON-ready data, without the receipts of single layers."""
        return {
            "rows": list(self.rows),
            "starts": list(self.starts),
            "attempt": self.attempt,
            "kept_per_sample": list(self.kept_per_sample),
            "bytes_held": self.bytes_held,
            "bytes_full": self.bytes_full,
            "bytes_peak": self.bytes_peak,
            "read_of_visible": None if math.isnan(self.read_of_visible) else self.read_of_visible,
        }


def read_of_visible(steps: Sequence[StepReceipt], visible: float) -> float:
    """Return the fraction of the visible tokens that a decode step reads, mean over layers.

    Args:
        steps: One receipt per layer.
        visible: Tokens that decoding could see, mean over samples.

    Returns:
        NaN if no step was taken, or nothing was visible.
    """
    read = [layer.entries_read for layer in steps if layer.any_steps]
    return sum(read) / len(read) / visible if read and visible else float("nan")
