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
        who: The policy, for messages.
        receipts: One for each layer.
        live: Weak references to the cache layers, in the same order.

    Raises:
        ReceiptError: If a layer was deleted, differs from its receipt, or still holds the memory of dropped
            entries.
    """
    for receipt, reference in zip(receipts, live, strict=True):
        layer = reference()
        if layer is None:
            raise ReceiptError(
                f"{who}: the cache was deleted; keep past_key_values "
                "(generate(..., return_dict_in_generate=True)) until verify() has run"
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
        # A small view of a large buffer keeps the whole buffer in memory.
        behind = layer.bytes_behind
        if behind > layer.bytes_held:
            raise ReceiptError(
                f"{who}: layer {receipt.layer_idx} holds {layer.bytes_held} bytes of keys and "
                f"values, but the memory behind them is {behind} bytes: it was not freed"
            )


def check_text_layers(
    who: str, receipts: Sequence[TextReceipt], live: Sequence[weakref.ref[TextKVLayer]]
) -> None:
    """Raise unless each text layer holds what the latest prefill kept; decoding may only append to it.

    Raises:
        ReceiptError: If a layer was deleted, or differs from its receipt.
    """
    for receipt, reference in zip(receipts, live, strict=False):
        layer = reference()
        if layer is None or not layer.held:
            raise ReceiptError(
                f"{who}: the text cache of layer {receipt.layer_idx} was deleted; keep past_key_values until "
                "verify() has run"
            )
        entries = layer.held if layer.slots is None else layer.kept_width
        bytes_held = layer.bytes_held // layer.held * receipt.width
        if entries < receipt.width or bytes_held != receipt.bytes_held:
            raise ReceiptError(
                f"{who}: layer {receipt.layer_idx} holds {entries} text entries of prefill in "
                f"{bytes_held} bytes now, but the receipt says {receipt.width} in {receipt.bytes_held}"
            )
