"""Receipts: digests of what was kept for each example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from kvprune.engine.receipts import LayerReceipt
from kvprune.tokens.selection import OWN_BITS, Selection

__all__ = ["receipt_of_windows", "receipts"]


def receipts(
    spec: str, seed: int | None, layers: Sequence[LayerReceipt], selections: Mapping[int, Selection]
) -> list[str]:
    """Return one SHA-256 (64 hexadecimal digits) for each sample of a batch.

    A receipt covers the spec, the seed if the policy drew, and for each cross-attention layer: its index, the
    number of columns of the unpruned cache, the columns kept per head, the bytes that keys and values of the
    kept and of all columns take in the cache's own dtype, and the bits of each column if any are quantized.
    All of these are whole numbers that belong to one sample. So neither the order of layers, nor the device,
    nor padding that other samples of the batch cause can change a receipt.

    Args:
        spec: Canonical spec of the policy.
        seed: Seed that the policy drew with; None if it drew nothing.
        layers: The report's entries for the layers, after the prefill of the batch.
        selections: Kept columns by layer index, after the same prefill.
    """
    batch = next(iter(selections.values())).indices.shape[0]
    found: list[list[object]] = [[] for _ in range(batch)]
    for layer in sorted(layers, key=lambda one: one.layer_idx):
        selection = selections[layer.layer_idx]
        kept, bits = selection.to_mask().cpu(), selection.bits_by_column().tolist()  # [B, H or 1, S]
        share = layer.bytes_full // batch
        for sample, heads in enumerate(kept):
            # All columns of all heads of a layer take equally many bytes, so this division is exact.
            held = int(heads.sum()) * share // heads.numel()
            columns = [_pack(head.tolist()) for head in heads]
            of_layer: list[object] = [layer.layer_idx, heads.shape[-1], columns, held, share]
            if any(width != OWN_BITS for head in bits[sample] for width in head):
                of_layer.append(bits[sample])
            found[sample].append(of_layer)
    return [_digest([spec, seed, of_sample]) for of_sample in found]


def receipt_of_windows(windows: Sequence[tuple[int, str]]) -> str:
    """Return one SHA-256 for a recording that was read window by window.

    Args:
        windows: For each window in order, its first feature frame and its receipt, see `receipts`.
    """
    return _digest([[start, receipt] for start, receipt in windows])


def _pack(kept: Sequence[bool]) -> str:
    """Return which columns are kept in hexadecimal: one bit per column, the first column the highest bit."""
    return f"{int(''.join('1' if one else '0' for one in kept), 2):0{-(-len(kept) // 4)}x}"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()
