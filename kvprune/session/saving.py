"""Writes a pruned cache to a file; `kvprune.session.saved_cache` reads it.

Saved is what the latest prefill of a run has filled, because the run's report and selections describe that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.fingerprint import fingerprint_of
from kvprune.adapters.questions import read_inputs
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.file import digest_of, write_file
from kvprune.cache.stored import stored_layer
from kvprune.engine.loaded import digests, saved_state
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import SavedCacheError
from kvprune.text import shown

__all__ = ["save_cache"]


def save_cache(
    adapter: ModelAdapter,
    manager: CrossKVManager,
    cache: object,
    path: str | os.PathLike[str],
    inputs: Mapping[str, Any],
    *,
    seed: int,
    overwrite: bool = False,
) -> None:
    """Write a cache that the latest prefill of a run has filled; see `Compression.save`."""
    flat = cache.cross_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layers = _require_own(adapter, manager, flat)
    pair = isinstance(cache, EncoderDecoderCache)
    first = layers[adapter.layer_indices[0]]
    if first.host is not None:
        raise SavedCacheError(
            f"policy {manager.policy.spec} keeps this cache in host memory, and a file would not say so; "
            "read the prompt without offload, and save that cache, which is the same"
        )
    rows, entries = first.keys.shape[0] * first.copies, None
    stored = {index: stored_layer(layer, index) for index, layer in layers.items()}
    if pair:
        _require_no_steps(layers)
    else:
        assert isinstance(flat, Cache)
        text = {index: one for index, one in enumerate(flat.layers) if index not in layers}
        stored |= {index: stored_layer(layer, index) for index, layer in text.items()}
        entries = int(flat.get_seq_length(next(iter(text))))
    read = read_inputs(inputs, entries, rows, first.columns)
    report, selections = saved_state(manager)
    tensors = {f"selections.{name}": tensor for name, tensor in selections.items()}
    tensors |= {f"inputs.{name}": tensor for name, tensor in read.items()}
    for index, one in stored.items():
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in one.tensors.items()}
    header = {
        "kvprune": metadata.version("kvprune"),
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
        "policy": manager.policy.spec.to_dict(),
        "seed": seed,
        "reread": manager.rereads,
        "model": fingerprint_of(adapter),
        "is_encoder_decoder": pair,
        "rows": rows,
        "tokens": entries or 0,
        "inputs": {name: digest_of(one) for name, one in sorted(inputs.items()) if isinstance(one, Tensor)},
        "layers": {str(index): dict(one.facts) for index, one in sorted(stored.items())},
        "report": report,
        "selections": digests(manager.history.kept),
    }
    write_file(Path(path), header, tensors, overwrite=overwrite)


def _require_own(adapter: ModelAdapter, manager: CrossKVManager, cache: object) -> dict[int, CrossKVLayer]:
    """Return the cross-attention layers of a cache, by index.

    Raises:
        SavedCacheError: If it is no cache that the latest prefill of this run has filled, or it offloads.
    """
    if not isinstance(cache, Cache):
        raise SavedCacheError(
            f"a cache of transformers is saved, got {shown(cache)}; pass the past_key_values that "
            "model(**inputs) returns (a long recording, read window by window, has no cache to save)"
        )
    if cache.offloading:
        raise SavedCacheError(
            f"this {type(cache).__name__} offloads its layers; read the prompt with the default cache"
        )
    live = {receipt.layer_idx: layer() for receipt, layer in manager.report.live_layers()}
    layers = {}
    for index in adapter.layer_indices:
        found = cache.layers[index] if index < len(cache.layers) else None
        if not isinstance(found, CrossKVLayer):
            raise SavedCacheError(
                f"layer {index} of this cache is a {type(found).__name__}, which kvprune has not filled; "
                "read the prompt inside kvprune.compress(model, ...), with the policy full to keep everything"
            )
        if found is not live.get(index):
            raise SavedCacheError(
                f"layer {index} of this cache was not filled by the latest prefill of this run, which its "
                "report and selections describe; read the prompt with model(**inputs) inside the block, and "
                "save the past_key_values of that call before another prompt is read"
            )
        layers[index] = found
    return layers


def _require_no_steps(layers: Mapping[int, CrossKVLayer]) -> None:
    """Raise if a policy has taken decode steps, whose text is not saved."""
    for index, layer in layers.items():
        if layer.steps is not None and int(layer.steps.taken):
            raise SavedCacheError(
                f"the policy has decided in {int(layer.steps.taken)} decode steps of layer {index}, whose "
                "text is not saved; save the cache of model(**inputs), before anything is generated"
            )
