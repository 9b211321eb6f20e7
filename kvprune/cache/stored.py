"""Turns cache layers into named tensors and a few facts, for a file, and back.

`stored_layer` and `restored_layer` cover everything that decoding reads: entries in the layer's own dtype and
quantized ones, their columns, validity and bias, which rows are shared, and what a policy that decides in
decode steps knows. `fresh_layer` makes a copy for one question: later tokens are appended to the copy, and
what is held of the encoder is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.pools import Pool
from kvprune.cache.quantization import Quantized
from kvprune.cache.reader import Reader
from kvprune.cache.shared_rows import SharedRows
from kvprune.cache.step_memory import StepMemory
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import SavedCacheError

__all__ = ["StoredLayer", "fresh_layer", "restored_layer", "stored_layer"]

_SIDES = "keys", "values"
_QUANTIZED = "codes", "low", "high"


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """One cache layer as data.

    Args:
        facts: What is no tensor, JSON-ready; ``kind`` is "cross", "pruned text" or "text".
        tensors: Its tensors by name.
    """

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def stored_layer(layer: object, layer_idx: int) -> StoredLayer:
    """Return a filled layer as data.

    Args:
        layer: A `CrossKVLayer`, a `TextKVLayer` or a dynamic layer of transformers.
        layer_idx: Index of the decoder layer, for messages.

    Raises:
        SavedCacheError: If it is another layer (static, sliding, quantized), or holds nothing.
    """
    if not isinstance(layer, CrossKVLayer | TextKVLayer) and type(layer) is not DynamicLayer:
        raise SavedCacheError(
            f"layer {layer_idx} of this cache is a {type(layer).__name__}; only dynamic layers can be saved: "
            "read the prompt with the default cache (no cache_implementation)"
        )
    if not layer.get_seq_length():
        raise SavedCacheError(
            f"layer {layer_idx} of this cache holds nothing: the call that should have filled it was "
            "interrupted, or never ran; read the prompt again, and save what that call returns"
        )
    if isinstance(layer, CrossKVLayer):
        return _stored_cross(layer)
    keys, values = layer.keys, layer.values
    assert keys is not None
    assert values is not None
    if not isinstance(layer, TextKVLayer):
        return StoredLayer({"kind": "text"}, {"keys": keys, "values": values})
    facts = {"kind": "pruned text", "seen": layer.seen, "ragged": layer.ragged}
    return StoredLayer(facts, _present(keys=keys, values=values, slots=layer.slots, valid=layer.valid))


def restored_layer(stored: StoredLayer) -> DynamicLayer:
    """Return the layer that was stored, on the device of its tensors."""
    facts, tensors = stored.facts, stored.tensors
    if facts["kind"] == "cross":
        return _restored_cross(facts, tensors)
    layer = TextKVLayer() if facts["kind"] == "pruned text" else DynamicLayer()
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    if isinstance(layer, TextKVLayer):
        layer.seen, layer.ragged = int(facts["seen"]), bool(facts["ragged"])
        layer.slots, layer.valid = tensors.get("slots"), tensors.get("valid")
    return layer


def fresh_layer(layer: CacheLayerMixin) -> CacheLayerMixin:
    """Return a copy of a layer, for one question.

    Encoder entries are shared, because no operation writes to them. Text entries are copied: they are few,
    and transformers may overwrite them. So is the state of a policy between decode steps.
    """
    fresh = copy.copy(layer)
    if isinstance(fresh, CrossKVLayer):
        fresh.shared_rows = SharedRows(fresh.copies)
        if fresh.steps is not None:
            fresh.steps = copy.copy(fresh.steps)
            fresh.steps.tensors = {name: tensor.clone() for name, tensor in fresh.steps.tensors.items()}
            fresh.steps.in_graphs = fresh.steps.in_graphs.clone()
    elif fresh.keys is not None and fresh.values is not None:
        fresh.keys, fresh.values = fresh.keys.clone(), fresh.values.clone()
    return fresh


def _stored_cross(layer: CrossKVLayer) -> StoredLayer:
    rows, heads, _, _ = layer.keys.shape
    facts: dict[str, Any] = {
        "kind": "cross",
        "columns": layer.columns,
        "ragged": layer.ragged,
        "copies": layer.copies,
        "shapes": [[rows, heads, side.shape[-1]] for side in (layer.keys, layer.values)],
        "dtype": _name(layer.keys.dtype),
        "pools": [
            {"bits": pool.bits, "widths": [pool.keys.width, pool.values.width]} for pool in layer.pools
        ],
        "steps": None,
    }
    tensors = _present(slots=layer.slots, valid=layer.valid, bias=layer.bias)
    if layer.own:
        tensors |= {"keys": layer.keys, "values": layer.values}
    for number, pool in enumerate(layer.pools):
        for side, quantized in zip(_SIDES, (pool.keys, pool.values), strict=True):
            for part, tensor in zip(_QUANTIZED, quantized.tensors, strict=True):
                tensors[f"pool{number}.{side}.{part}"] = tensor
    if (steps := layer.steps) is not None:
        facts["steps"] = {
            "names": sorted(steps.tensors),
            "by_row": steps.by_row,
            "compiles": steps.compiles,
            "is_changed": steps.is_changed,
            "taken": int(steps.taken),
            "taken_back": steps.taken_back,
            "text_before": steps.text_before,
        }
        tensors |= {f"state.{name}": tensor for name, tensor in steps.tensors.items()}
    return StoredLayer(facts, tensors)


def _restored_cross(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CrossKVLayer:
    layer = CrossKVLayer()
    device = next(iter(tensors.values())).device
    empty = [
        torch.empty(rows, heads, 0, width, dtype=_dtype(facts["dtype"]), device=device)
        for rows, heads, width in facts["shapes"]
    ]
    keys, values = (tensors.get(side, none) for side, none in zip(_SIDES, empty, strict=True))
    layer.lazy_initialization(keys, values)
    layer._hold(keys, values)
    layer.pools = tuple(_restored_pool(tensors, number, one) for number, one in enumerate(facts["pools"]))
    layer.columns, layer.ragged = int(facts["columns"]), bool(facts["ragged"])
    layer.slots, layer.valid, layer.bias = (tensors.get(name) for name in ("slots", "valid", "bias"))
    layer.shared_rows = SharedRows(int(facts["copies"]))
    layer.reader = Reader(is_attached=False)
    if (steps := facts["steps"]) is not None:
        state = {name: tensors[f"state.{name}"] for name in steps["names"]}
        layer.steps = StepMemory(state, device, by_row=steps["by_row"], compiles=steps["compiles"])
        layer.steps.is_changed, layer.steps.taken_eagerly = bool(steps["is_changed"]), int(steps["taken"])
        layer.steps.taken_back, layer.steps.text_before = int(steps["taken_back"]), steps["text_before"]
    return layer


def _restored_pool(tensors: Mapping[str, Tensor], number: int, facts: Mapping[str, Any]) -> Pool:
    sides = []
    for side, width in zip(_SIDES, facts["widths"], strict=True):
        codes, low, high = (tensors[f"pool{number}.{side}.{part}"] for part in _QUANTIZED)
        sides.append(Quantized(codes, low, high, int(facts["bits"]), int(width)))
    return Pool(*sides)


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return found
