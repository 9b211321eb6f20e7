"""Checks that a merge keeps mass in the caches of a model (KV15)."""

from __future__ import annotations

from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.models.setting import Setting

__all__ = ["check_mass"]


def check_mass(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV15: means of buckets, times their sizes, add up to all that was merged."""
    run, cache = setting.prefill(policy)
    layers = setting.layers_of(cache)
    for layer_idx, selection in run.selections.items():
        merge, layer = selection.merge, layers[layer_idx]
        if merge is None or run.prefill_selections[layer_idx] is not None:
            continue  # of features that were merged before, KV13 knows what they become
        values, stock = layer.spread()[1], setting.stock_layers[layer_idx].values
        for sample in range(values.shape[0]):
            for head in range(values.shape[1]):
                own = min(head, merge.into.shape[1] - 1)
                into, weights = merge.into[sample, own].tolist(), merge.weights[sample, own].tolist()
                sizes = {entry: into.count(entry) for entry in into if entry >= 0}
                merged = [column for column, entry in enumerate(into) if entry >= 0]
                if any(abs(weights[column] * sizes[into[column]] - 1) > 1e-6 for column in merged):
                    continue  # no means: nothing is promised of their mass
                mass = sum(size * values[sample, head, entry].double() for entry, size in sizes.items())
                wanted = stock[sample, head, merged].double().sum(0)
                apart = float((mass - wanted).abs().max())
                if not apart <= setting.tolerance * len(into):
                    raise Violation(
                        f"layer {layer_idx}, sample {sample}, head {head}: means times sizes to add up to "
                        "the values that were merged",
                        f"a difference of {apart:.2e}",
                    )
