"""Whether a merge preserves mass in the cache of a tiny model (KV15)."""

from __future__ import annotations

from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.scenario import Scenario

__all__ = ["check_mass"]


def check_mass(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV15: each merged mean, times the number of its tokens, adds up to the sum of all merged tokens."""
    run, cache = scenario.prefill(policy)
    layers = scenario.layers_of(cache)
    for layer_idx, selection in run.selections.items():
        merge, layer = selection.merge, layers[layer_idx]
        if merge is None or run.prefill_selections[layer_idx] is not None:
            continue  # features were merged before this layer: KV13 checks these
        values, stock = layer.spread()[1], scenario.stock_layers[layer_idx].values
        for sample in range(values.shape[0]):
            for head in range(values.shape[1]):
                own = min(head, merge.into.shape[1] - 1)
                into, weights = merge.into[sample, own].tolist(), merge.weights[sample, own].tolist()
                sizes = {entry: into.count(entry) for entry in into if entry >= 0}
                merged = [column for column, entry in enumerate(into) if entry >= 0]
                if any(abs(weights[column] * sizes[into[column]] - 1) > 1e-6 for column in merged):
                    continue  # weights that are no means promise no mass
                mass = sum(size * values[sample, head, entry].double() for entry, size in sizes.items())
                wanted = stock[sample, head, merged].double().sum(0)
                apart = float((mass - wanted).abs().max())
                if not apart <= scenario.tolerance * len(into):
                    raise Violation(
                        f"layer {layer_idx}, sample {sample}, head {head}: means times sizes to add up to "
                        "the sum of the merged values",
                        f"a difference of {apart:.2e}",
                    )
