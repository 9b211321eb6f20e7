"""What a run of a tiny model selects: KV01 to KV05, and KV10.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.isolation import random_state
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.budget import require_layer_sum, require_model_sum, wanted_of
from kvprune.testing.conformance.models.forward_calls import alone
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.reference import (
    kept_bits,
    kept_sets,
    live_rows,
    same_by_head,
    seen_by_row,
    slow_decode,
    slow_groups,
    slow_prefill,
    slow_strata,
)

__all__ = [
    "check_alone_in_model",
    "check_columns",
    "check_counts",
    "check_images",
    "check_padding",
    "check_prefill_rows",
    "check_repeatable",
]


def check_columns(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV01: decoding uses strictly increasing columns of the unpruned cache."""
    run, _ = scenario.run(policy)
    for layer_idx, selection in run.selections.items():
        for row, valid in zip(selection.indices.flatten(0, 1), selection.valid.flatten(0, 1), strict=True):
            kept = row[valid].tolist()
            if kept != sorted(set(kept)) or not set(kept) <= set(range(scenario.columns)):
                raise Violation(
                    f"layer {layer_idx} to keep strictly increasing columns below {scenario.columns}",
                    f"{kept}",
                )


def check_counts(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV02: decoding sees exactly the budget, in each head or as the policy's `budget_scope` says."""
    run, _ = scenario.run(policy)
    see = scenario.visibility
    whole = set() if isinstance(policy, ScoringPolicy) else _left_whole(policy, run)
    layers = {layer: kept_sets(selection) for layer, selection in run.selections.items()}
    for row in range(len(next(iter(layers.values()), []))):
        sample = _sample_of(row, run, scenario)
        visible = slow_strata(see, sample)[0]
        wanted = wanted_of(policy, see, sample, visible)
        kept = {layer: [head & visible for head in rows[row]] for layer, rows in layers.items()}
        if policy.budget_scope == "model":
            require_model_sum(f"sample {sample}", policy, list(kept.values()), wanted, visible)
            continue
        for layer, heads in kept.items():
            if layer not in whole or any(head != visible for head in heads):
                require_layer_sum(f"layer {layer}, sample {sample}", policy, heads, wanted, visible)


def _left_whole(policy: CrossKVPolicy, run: Compression) -> set[int]:
    """Return the layers that may keep everything: the one that decided for later layers.

    If the policy states no exact budget, the layers before it may keep everything, too.
    """
    early = list(run.prefill_selections.items())
    for place, ((layer_idx, attended), (_, next_attended)) in enumerate(itertools.pairwise(early)):
        if attended is None and next_attended is not None:
            before_it = {layer for layer, _ in early[:place]} if policy.exact_budget is None else set()
            return before_it | {layer_idx}
    return set()


def check_images(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV03: each sample keeps a token of each image that decoding sees."""
    run, _ = scenario.run(policy)
    see = scenario.visibility
    for where, sample, kept in _kept(run, scenario):
        visible = slow_decode(see, sample)
        for group in slow_groups(see, sample):
            if group & visible and not group & kept:
                raise Violation(f"{where} to keep one of {sorted(group)}", f"kept columns {sorted(kept)}")
        if not kept:
            raise Violation(f"{where} to keep at least one token", "none kept")


def check_padding(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV04: decoding reads no unseen column while a visible one was dropped."""
    run, _ = scenario.run(policy)
    for where, sample, kept in _kept(run, scenario):
        visible = slow_decode(scenario.visibility, sample)
        if visible and kept - visible and visible - kept:
            raise Violation(
                f"{where} to drop unseen columns before visible ones",
                f"unseen columns {sorted(kept - visible)} kept, "
                f"visible columns {sorted(visible - kept)} dropped",
            )


def check_prefill_rows(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV05: in each layer's prefill, a text row that saw a token still sees one."""
    run, _ = scenario.prefill(policy)
    see = scenario.visibility
    for layer_idx, selection in run.prefill_selections.items():
        if selection is None:
            continue
        for sample, heads in enumerate(kept_sets(selection)):
            for row in live_rows(see, sample):
                seen = seen_by_row(see, sample, row)
                if seen and not all(seen & kept for kept in heads):
                    raise Violation(
                        f"layer {layer_idx}, sample {sample}: text row {row} to see one of {sorted(seen)}",
                        "none of them reached the layer",
                    )


def check_repeatable(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV10: the same seed selects the same; inputs and global generators stay unchanged."""
    batch, before = scenario.batch(), random_state()["torch"]
    first, _ = scenario.prefill(policy, batch)
    for name, tensor in batch.items():
        if not torch.equal(tensor, scenario.inputs[name]):
            raise Violation(f"the model's input {name!r} unchanged", "other contents")
    if not torch.equal(before, random_state()["torch"]):
        raise Violation("torch's global generator unchanged", "it was advanced or seeded")
    again, _ = scenario.prefill(policy)
    for layer_idx, selection in first.selections.items():
        if selection != again.selections[layer_idx]:
            raise Violation(
                f"the same selection again in layer {layer_idx}, for the same seed", "another one"
            )


def check_alone_in_model(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV10: a sample selects alone what it selects in a batch."""
    if scenario.dtype != torch.float64:
        return  # in float32, rounding may decide
    together, _ = scenario.prefill(policy)
    for sample in range(scenario.batch_size):
        if _has_no_image(scenario, sample):
            continue  # without an image, the model is called without one
        by_itself, _ = scenario.prefill(policy, alone(scenario.inputs, sample))
        for layer_idx, selection in by_itself.selections.items():
            # Columns beyond these exist only because other samples have more images.
            present = set(range(selection.columns))
            kept = [columns & present for columns in kept_sets(together.selections[layer_idx])[sample]]
            precise = [
                {(column, bits) for column, bits in columns if column in present}
                for columns in kept_bits(together.selections[layer_idx])[sample]
            ]
            if not same_by_head(kept_bits(selection)[0], precise):
                raise Violation(
                    f"layer {layer_idx} to keep of sample {sample} alone what it keeps in the batch, "
                    f"{[sorted(columns) for columns in kept]}",
                    f"{[sorted(columns) for columns in kept_sets(selection)[0]]}",
                )


def _has_no_image(scenario: Scenario, sample: int) -> bool:
    if "cross_attention_mask" not in scenario.inputs:
        return False
    return not slow_prefill(scenario.visibility, sample)


def _kept(run: Compression, scenario: Scenario) -> Iterator[tuple[str, int, set[int]]]:
    """Yield a place for messages, sample and kept columns, by layer, row (beams included) and head."""
    for layer_idx, selection in run.selections.items():
        if selection.columns != scenario.visibility.columns:
            raise Violation(
                f"layer {layer_idx} to select from {scenario.visibility.columns} columns",
                str(selection.columns),
            )
        for row, heads in enumerate(kept_sets(selection)):
            for head, kept in enumerate(heads):
                sample = _sample_of(row, run, scenario)
                yield f"layer {layer_idx}, sample {sample}, head {head}", sample, kept


def _sample_of(row: int, run: Compression, scenario: Scenario) -> int:
    """Return the sample to which a row of a beam search belongs."""
    rows = len(next(iter(run.selections.values())).indices)
    return row * scenario.visibility.batch // rows
