"""What the receipts of all layers add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kvprune.engine.receipts import (
    LayerReceipt,
    LayerSums,
    StepReceipt,
    TextReceipt,
    WindowReceipt,
    read_of_visible,
)

__all__ = ["Totals"]


@dataclass(kw_only=True)
class Totals(LayerSums):
    """The receipts of the latest prefill and of the decode steps after it, layer by layer.

    Args:
        layers: One receipt per cross-attention layer of the latest prefill.
        text_layers: One receipt per self-attention layer, if the policy prunes text.
        steps: One receipt per cross-attention layer of the decode steps since the latest prefill, if the
            policy decides in them.
        windows: One receipt per prefill of the latest ``generate``, in order, if the model reads recordings
            window by window, as Whisper does; empty for other models and for calls of the model by hand.
    """

    layers: tuple[LayerReceipt, ...] = ()
    text_layers: tuple[TextReceipt, ...] = ()
    steps: tuple[StepReceipt, ...] = ()
    windows: tuple[WindowReceipt, ...] = ()
    _visible: float = field(default=0.0, repr=False)  # tokens that decoding could see, mean over samples

    def set_steps(self, steps: Sequence[StepReceipt]) -> None:
        """Replace the receipts of decode steps, also in the latest window.

        What a step has freed counts as not held from then on.
        """
        self.steps = tuple(steps)
        if self.windows and steps:
            self.windows = (*self.windows[:-1], replace(self.windows[-1], steps=self.steps))
        by_layer = {receipt.layer_idx: receipt for receipt in steps}
        self.layers = tuple(
            after.of(layer) if (after := by_layer.get(layer.layer_idx)) is not None else layer
            for layer in self.layers
        )

    @property
    def text_bytes_held(self) -> int:
        """Bytes of the text's keys and values held after the latest prefill, if the policy prunes text."""
        return sum(layer.bytes_held for layer in self.text_layers)

    @property
    def text_bytes_full(self) -> int:
        """Bytes of the text's keys and values that stock transformers would hold."""
        return sum(layer.bytes_full for layer in self.text_layers)

    @property
    def bytes_of_bookkeeping(self) -> int:
        """Bytes of column numbers and validity flags, in addition to keys and values."""
        return sum(layer.bytes_of_bookkeeping for layer in self.layers)

    @property
    def read_of_visible(self) -> float:
        """Tokens that a decode step reads / tokens that decoding could see, mean over layers and samples.

        Of the steps after the latest prefill; NaN if the policy does not decide in decode steps, or none were
        taken.
        """
        return read_of_visible(self.steps, self._visible)

    @property
    def read_fraction(self) -> float:
        """Entries that decode steps read / entries that are held, mean over layers, rows and heads.

        NaN if the policy does not decide in decode steps, or none were taken.
        """
        shares = [layer.entries_read / layer.entries_held for layer in self.steps if layer.any_steps]
        return sum(shares) / len(shares) if shares else float("nan")
