"""What a cache holds beside what was selected, also after it was moved about: KV11, and a part of KV09.

Each check is a function of a policy and a `Setting`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.models.calls import forward, next_turn
from kvprune.testing.conformance.models.setting import Setting, run_under
from kvprune.testing.oracle import as_held
from kvprune.tokens.selection import Selection

__all__ = ["check_alignment", "check_cache_operations", "check_turns", "require_aligned"]


def check_alignment(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV11: after a whole search, the cache holds the keys and values of the columns that were selected."""
    run, generated = run_under(policy, setting)
    require_aligned(run, setting.layers_of(generated.cache), setting)


def check_cache_operations(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV11: what transformers does to a cache happens to keys, values and selection together."""
    run, cache = setting.prefill(policy)
    samples = list(range(setting.batch_size))
    twice = [sample for sample in samples for _ in range(2)]
    last = len(twice) - 1
    swapped = [row ^ 1 for row in range(len(twice))]  # each beam with the other of its sample
    mixed = [last, *range(last)]
    moves: list[tuple[str, Callable[[Any], None], list[int]]] = [
        ("prefill", lambda cache: None, list(range(len(samples)))),
        ("batch_repeat_interleave(2)", lambda cache: cache.batch_repeat_interleave(2), []),
        ("reorder_cache within samples", lambda cache: cache.reorder_cache(torch.tensor(swapped)), swapped),
        ("reorder_cache across samples", lambda cache: cache.reorder_cache(torch.tensor(mixed)), mixed),
        ("batch_select_indices", lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    ]
    cache, rows = copy.deepcopy(cache), samples
    for what, move, order in moves:
        move(cache)
        rows = [rows[row] for row in order] if order else twice
        require_aligned(run, setting.layers_of(cache), setting, rows, what)
    for layer_idx, layer in setting.layers_of(cache).items():
        layer.crop(1)
        require_aligned(run, {layer_idx: layer}, setting, rows, "crop(1), which takes back text only")
    cache.reset()
    for layer_idx, layer in setting.layers_of(cache).items():
        if layer.width or layer.columns or layer.pools or layer.slots is not None or layer.valid is not None:
            raise Violation(f"layer {layer_idx} to hold nothing after reset", f"{layer.width} entries")


def check_turns(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV11: later turns change nothing of what is held, and a cache that was reset can be filled again."""
    model = setting.model
    with setting.compress(policy) as run, torch.no_grad():
        cache = forward(model, setting.batch())
        for turn in (1, 2):
            next_turn(model, setting.batch(), cache, turn)
            require_aligned(run, setting.layers_of(cache), setting, after=f"turn {turn}")
        cache.reset()
        forward(model, setting.batch(), cache)
    if run.report.prefills != 2:
        raise Violation(
            "two prefills in the receipt: the first, and the one after reset", f"{run.report.prefills}"
        )
    require_aligned(run, setting.layers_of(cache), setting, after="reset and a new prefill")


def require_aligned(
    run: Compression,
    layers: dict[int, Any],
    setting: Setting,
    samples: Sequence[int] | None = None,
    after: str = "generation",
) -> None:
    """Raise unless each row of the batch holds keys and values of its selected columns, merged as they say.

    Args:
        run: The compression, after a prefill.
        layers: The cache layers by layer index.
        setting: Where it ran.
        samples: The sample of the batch that each row holds; by default each sample's copies in a row.
        after: What was done to the cache, for messages.
    """
    reference = setting.reference_layers(run)
    for layer_idx, layer in layers.items():
        where = f"layer {layer_idx}, after {after},"
        slots, valid = (tensor.repeat_interleave(layer.copies, dim=0) for tensor in layer.entries())
        rows = len(slots)
        if samples is not None and rows != len(samples):
            raise Violation(f"{where} to stand for {len(samples)} rows of the batch", f"{rows}")
        wanted_rows = samples or [row * setting.batch_size // rows for row in range(rows)]
        selection = run.selections[layer_idx]
        selected, precision = selection.to_mask(), selection.bits_by_column()
        chosen = [sample * len(selected) // setting.batch_size for sample in wanted_rows]
        selected, precision = selected[chosen], precision[chosen]
        held_columns = layer.held_columns().repeat_interleave(layer.copies, dim=0)
        if not torch.equal(held_columns, selected):
            raise Violation(f"{where} to hold the columns that run.selections names", "other columns")
        bits = layer.selection().bits_by_column().repeat_interleave(layer.copies, dim=0)
        if not bool((bits == precision).all()):
            raise Violation(f"{where} to hold columns in the bits that run.selections names", "others")
        by_column = Selection.trusted(
            torch.arange(selection.columns).expand_as(precision),
            torch.ones_like(precision, dtype=torch.bool),
            selection.columns,
            bits=precision,
        )
        heads = layer.keys.shape[1]
        index, flags = slots.expand(-1, heads, -1)[..., None], valid.expand(-1, heads, -1)
        for name, held in zip(("keys", "values"), layer.spread(), strict=True):
            full = as_held(getattr(reference[layer_idx], name)[wanted_rows], by_column)
            wanted = full.gather(-2, index.expand(-1, -1, -1, full.shape[-1]))
            apart = (wanted - held).abs().amax(-1)[flags].max()
            if not apart <= setting.tolerance:
                raise Violation(
                    f"{where} to hold, for each kept column, the {name} that stock caches there, merged"
                    f"{', in the bits that were asked for' if selection.quantizes else ''}",
                    f"{name} of other columns, or changed ones (difference {float(apart):.2e})",
                )
