"""Whether a cache holds the selected tokens, also after transformers reorders it: KV11, and a part of KV09.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.forward_calls import forward, next_turn
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.oracle_arithmetic import as_held
from kvprune.tokens.selection import Selection

__all__ = ["check_alignment", "check_cache_operations", "check_turns", "require_aligned"]


def check_alignment(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV11: after generation, the cache holds the keys and values of the selected columns."""
    run, generated = scenario.run(policy)
    require_aligned(run, scenario.layers_of(generated.cache), scenario)


def check_cache_operations(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV11: what transformers does to a cache happens to keys, values and selection together."""
    run, cache = scenario.prefill(policy)
    cache = copy.deepcopy(cache)
    rows = list(range(scenario.batch_size))  # the sample that each row of the cache holds
    require_aligned(run, scenario.layers_of(cache), scenario, rows, "prefill")
    cache.batch_repeat_interleave(2)
    rows = [row for row in rows for _ in range(2)]
    require_aligned(run, scenario.layers_of(cache), scenario, rows, "batch_repeat_interleave(2)")
    swapped = [row ^ 1 for row in range(len(rows))]  # each beam with the other of its sample
    rolled = [len(rows) - 1, *range(len(rows) - 1)]
    orders: list[tuple[str, Callable[[torch.Tensor], None], list[int]]] = [
        ("reorder_cache within samples", cache.reorder_cache, swapped),
        ("reorder_cache across samples", cache.reorder_cache, rolled),
        ("batch_select_indices", cache.batch_select_indices, [2, 0]),
    ]
    for name, operation, order in orders:
        operation(torch.tensor(order))
        rows = [rows[row] for row in order]
        require_aligned(run, scenario.layers_of(cache), scenario, rows, name)
    for layer_idx, layer in scenario.layers_of(cache).items():
        layer.crop(1)
        require_aligned(run, {layer_idx: layer}, scenario, rows, "crop(1), which removes text only")
    cache.reset()
    for layer_idx, layer in scenario.layers_of(cache).items():
        if layer.width or layer.columns or layer.pools or layer.slots is not None or layer.valid is not None:
            raise Violation(f"layer {layer_idx} to hold nothing after reset", f"{layer.width} entries")


def check_turns(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV11: later turns leave the held tokens unchanged, and a cache can be filled again after reset."""
    model = scenario.model
    with scenario.compress(policy) as run, torch.no_grad():
        cache = forward(model, scenario.batch())
        for turn in (1, 2):
            next_turn(model, scenario.batch(), cache, turn)
            require_aligned(run, scenario.layers_of(cache), scenario, after=f"turn {turn}")
        cache.reset()
        forward(model, scenario.batch(), cache)
    if run.report.prefills != 2:
        raise Violation(
            "two prefills in the report: the first one, and the one after reset", f"{run.report.prefills}"
        )
    require_aligned(run, scenario.layers_of(cache), scenario, after="reset and a new prefill")


def require_aligned(
    run: Compression,
    layers: dict[int, Any],
    scenario: Scenario,
    samples: Sequence[int] | None = None,
    after: str = "generation",
) -> None:
    """Raise unless each row of the cache holds keys and values of its selected columns, merged and quantized.

    Args:
        run: The compression, after a prefill.
        layers: The cache layers by layer index.
        scenario: Where it ran.
        samples: The sample of the batch that each row holds; by default, copies of a sample are adjacent.
        after: What was done to the cache, for messages.
    """
    reference = scenario.reference_layers(run)
    for layer_idx, layer in layers.items():
        where = f"layer {layer_idx}, after {after},"
        slots, valid = (_by_row(tensor, layer) for tensor in layer.entries())  # [rows, H or 1, K]
        rows = len(slots)
        if samples is not None and rows != len(samples):
            raise Violation(f"{where} to hold {len(samples)} rows of the batch", f"{rows}")
        held_samples = samples or [row * scenario.batch_size // rows for row in range(rows)]
        selection = run.selections[layer_idx]
        selected, bits = selection.to_mask(), selection.bits_by_column()  # [B, H or 1, S]
        chosen = [sample * len(selected) // scenario.batch_size for sample in held_samples]
        selected, bits = selected[chosen], bits[chosen]
        held_columns = _by_row(layer.held_columns(), layer)
        if layer.steps is not None and layer.steps.is_changed:  # decode steps may have freed some
            aligned = not bool((held_columns & ~selected).any()) and bool(held_columns.any(-1).all())
        else:
            aligned = torch.equal(held_columns, selected)
        if not aligned:
            raise Violation(f"{where} to hold the columns that run.selections names", "other columns")
        if not bool((_by_row(layer.selection().bits_by_column(), layer) == bits).all()):
            raise Violation(f"{where} to hold columns in the bits that run.selections names", "other bits")
        spread = layer.spread()  # keys and values, [rows, Hkv, K, D], also when the block has ended
        heads = spread[0].shape[1]
        index, flags = slots.expand(-1, heads, -1)[..., None], valid.expand(-1, heads, -1)
        for name, held in zip(("keys", "values"), spread, strict=True):
            full = _quantized(getattr(reference[layer_idx], name)[held_samples], bits)  # [rows, Hkv, S, D]
            wanted = full.gather(-2, index.expand(-1, -1, -1, full.shape[-1]))
            apart = (wanted - held).abs().amax(-1)[flags].max()
            if not apart <= scenario.tolerance:
                raise Violation(
                    f"{where} to hold, for each kept column, the {name} that the untouched model caches "
                    f"there, merged{', in the bits that were asked for' if selection.quantizes else ''}",
                    f"{name} of other columns, or changed ones (difference {float(apart):.2e})",
                )


def _by_row(tensor: Tensor, layer: Any) -> Tensor:
    """Repeat what a cache layer stores once for the copies of a sample, so that each row has its own."""
    return tensor.repeat_interleave(layer.copies, dim=0)


def _quantized(full: Tensor, bits: Tensor) -> Tensor:
    """Return keys or values ``[B, Hkv, S, D]`` with each column in its bits ``[B, H or 1, S]``."""
    columns = bits.shape[-1]
    every = torch.arange(columns).expand_as(bits)
    selection = Selection.trusted(every, torch.ones_like(bits, dtype=torch.bool), columns, bits=bits)
    return as_held(full, selection)
