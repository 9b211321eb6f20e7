"""What a run knows about a cache that another run has filled: its report and its selections, as data.

`saved_state` turns both into JSON-ready data and tensors when a cache is saved. `restore` gives them to the
manager of the run that reads the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.file import digest_of
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.kept import KeptSelections
from kvprune.engine.manager import CrossKVManager
from kvprune.engine.receipts import LayerReceipt, TextReceipt
from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

__all__ = ["digests", "restore", "saved_state", "selections_of"]

_MERGED = "into", "weights", "carried"


def saved_state(manager: CrossKVManager) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the report and the selections of the latest prefill as data.

    Returns:
        JSON-ready facts, and tensors by name.
    """
    report, kept = manager.report, manager.history.kept
    facts: dict[str, Any] = {
        "kept_per_sample": [_or_none(fraction) for fraction in report.kept_per_sample],
        "kept_of_stored": _or_none(report.kept_of_stored),
        "visible": report._visible,
        "bytes_peak": report.bytes_peak,
        "text_kept_fraction": report.text_kept_fraction,
        "drew": report.drew,
        "warnings": list(report.warnings),
    }
    facts["layers"] = [asdict(layer) for layer in report.layers]
    facts["text_layers"] = [asdict(layer) for layer in report.text_layers]
    tensors: dict[str, Tensor] = {}
    facts["kept"] = {}
    for layer_idx, (attended, selection, copies) in kept.as_rows().items():
        facts["kept"][str(layer_idx)] = {
            "copies": copies,
            "attended": None if attended is None else _stored(attended, f"attended.{layer_idx}", tensors),
            "kept": _stored(selection, f"kept.{layer_idx}", tensors),
        }
    facts["replaced"] = {str(layer_idx): copies for layer_idx, copies in kept.replaced_layers.items()}
    facts["text"] = {}
    for layer_idx, (tokens, seen) in kept.text_tokens.items():
        facts["text"][str(layer_idx)] = seen
        tensors[f"text.{layer_idx}"] = tokens
    return facts, tensors


def selections_of(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KeptSelections:
    """Return the selections that `saved_state` stored."""
    kept = KeptSelections()
    for layer_idx, layer in facts["kept"].items():
        attended, where = layer["attended"], (tensors, f"attended.{layer_idx}")
        kept.add(
            int(layer_idx),
            None if attended is None else _restored(attended, *where),
            _restored(layer["kept"], tensors, f"kept.{layer_idx}"),
            int(layer["copies"]),
        )
    for layer_idx, copies in facts["replaced"].items():
        kept.note_replaced(int(layer_idx), int(copies))
    for layer_idx, seen in facts["text"].items():
        kept.add_text(int(layer_idx), tensors[f"text.{layer_idx}"], int(seen))
    return kept


def digests(kept: KeptSelections) -> dict[str, str]:
    """Return a SHA-256 of what each cross-attention layer keeps, by layer index as text."""
    return {
        str(layer_idx): digest_of(selection.indices, selection.valid, selection.bits_by_column())
        for layer_idx, selection in sorted(kept.selections.items())
    }


def restore(
    manager: CrossKVManager,
    name: str,
    facts: Mapping[str, Any],
    kept: KeptSelections,
    layers: Mapping[int, CrossKVLayer],
    text: Mapping[int, TextKVLayer],
) -> None:
    """Let the report and the history of a run begin with a cache that was loaded.

    Args:
        manager: Of the run.
        name: Where the cache comes from, for readers.
        facts: What `saved_state` returned.
        kept: What `selections_of` returned.
        layers: The cache layers by index.
        text: Self-attention layers whose text was pruned, by index.
    """
    report = manager.report
    manager.history.kept = kept
    receipts = [LayerReceipt(**layer) for layer in facts["layers"]]
    numbers = {
        "kept_per_sample": tuple(map(_or_nan, facts["kept_per_sample"])),
        "kept_of_stored": _or_nan(facts["kept_of_stored"]),
        "bytes_peak": facts["bytes_peak"],
        "drew": facts["drew"],
        "warnings": tuple(facts["warnings"]),
        "_visible": facts["visible"],
    }
    report.add_loaded(name, receipts, numbers, [weakref.ref(layers[one.layer_idx]) for one in receipts])
    pruned = [TextReceipt(**layer) for layer in facts["text_layers"]]
    alive = [weakref.ref(text[one.layer_idx]) for one in pruned if one.layer_idx in text]
    report.add_text(pruned, facts["text_kept_fraction"], live=alive)
    for rank, layer_idx in enumerate(manager.layer_indices):
        manager.steps.resume(rank, layers[layer_idx])


def _or_none(number: float) -> float | None:
    """Return None for NaN, which JSON has not."""
    return number if number == number else None


def _or_nan(number: float | None) -> float:
    return float("nan") if number is None else number


def _stored(selection: Selection, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add the tensors of a selection, and return the rest of it."""
    found = {"indices": selection.indices, "valid": selection.valid, "bits": selection.bits}
    facts: dict[str, Any] = {"columns": selection.columns, "merge": None}
    if (merge := selection.merge) is not None:
        found |= {part: getattr(merge, part) for part in _MERGED}
        facts["merge"] = {"renormalize_keys": merge.renormalize_keys, "size_bias": merge.size_bias}
    tensors |= {f"{name}.{part}": tensor for part, tensor in found.items() if tensor is not None}
    return facts


def _restored(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> Selection:
    indices, valid = tensors[f"{name}.indices"], tensors[f"{name}.valid"]
    merge = None
    if facts["merge"] is not None:
        into, weights = tensors[f"{name}.into"], tensors[f"{name}.weights"]
        merge = Merge(into, weights, **facts["merge"], carried=tensors.get(f"{name}.carried"))
    return Selection.trusted(indices, valid, int(facts["columns"]), merge, tensors.get(f"{name}.bits"))
