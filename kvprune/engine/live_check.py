"""Compares receipts with the live cache: counts its bytes, columns and entries again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.receipts import LayerReceipt, TextReceipt
from kvprune.errors import ReceiptError

__all__ = ["check_layers", "check_text_layers"]


def check_layers(
    who: str, receipts: Sequence[LayerReceipt], live: Sequence[weakref.ref[CrossKVLayer]]
) -> None:
    """Raise unless each cross-attention layer holds what its receipt says.

    Args:
        who: For messages.
        receipts: Of the layers.
        live: The layers, as long as they live.

    Raises:
        ReceiptError: If a layer is gone, holds something else, or holds memory that should be free.
    """
    for receipt, reference in zip(receipts, live, strict=True):
        layer = reference()
        if layer is None:
            raise ReceiptError(
                f"{who}: the cache is gone; keep past_key_values "
                "(generate(..., return_dict_in_generate=True)) and verify while it lives"
            )
        held = {
            "bytes_held": layer.bytes_held,
            "bytes_full": layer.bytes_full,
            "width": layer.width,
            "widths": {str(bits): width for bits, width in layer.widths.items()},
            "columns": layer.columns,
            "bytes_of_bookkeeping": layer.bytes_of_bookkeeping,
        }
        for name, found in held.items():
            if found != getattr(receipt, name):
                raise ReceiptError(
                    f"{who}: layer {receipt.layer_idx} has {name} {found} now, "
                    f"but the receipt says {getattr(receipt, name)}"
                )
        # A small view into a large buffer frees nothing.
        behind = layer.bytes_behind
        if behind > layer.bytes_held:
            raise ReceiptError(
                f"{who}: layer {receipt.layer_idx} holds {layer.bytes_held} bytes of keys and "
                f"values, but the memory behind them is {behind} bytes: it was not freed"
            )


def check_text_layers(
    who: str, receipts: Sequence[TextReceipt], live: Sequence[weakref.ref[TextKVLayer]]
) -> None:
    """Raise unless each text layer holds what the latest prefill left; decoding may only add to it.

    Raises:
        ReceiptError: If a layer is gone, or holds something else.
    """
    for receipt, reference in zip(receipts, live, strict=False):
        layer = reference()
        if layer is None or not layer.held:
            raise ReceiptError(
                f"{who}: the text cache of layer {receipt.layer_idx} is gone; verify while it lives"
            )
        entries = layer.held if layer.slots is None else layer.chosen
        bytes_held = layer.bytes_held // layer.held * receipt.width
        if entries < receipt.width or bytes_held != receipt.bytes_held:
            raise ReceiptError(
                f"{who}: layer {receipt.layer_idx} holds {entries} text entries of prefill in "
                f"{bytes_held} bytes now, but the receipt says {receipt.width} in {receipt.bytes_held}"
            )
