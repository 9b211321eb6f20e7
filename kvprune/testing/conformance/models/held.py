"""What decoding holds after runs of a tiny model: KV01 to KV05, and KV10.

Each check is a function of a policy and a `Setting`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.common.isolation import random_state
from kvprune.testing.conformance.layers.decisions import require_sum, wanted_of
from kvprune.testing.conformance.models.setting import Setting, run_under
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


def check_columns(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV01: what decoding uses are strictly increasing columns of the unpruned cache."""
    run, _ = run_under(policy, setting)
    for layer_idx, selection in run.selections.items():
        for row, valid in zip(selection.indices.flatten(0, 1), selection.valid.flatten(0, 1), strict=True):
            kept = row[valid].tolist()
            if kept != sorted(set(kept)) or not set(kept) <= set(range(setting.columns)):
                raise Violation(
                    f"layer {layer_idx} to hold strictly increasing columns below {setting.columns}",
                    f"{kept}",
                )


def check_counts(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV02: decoding sees exactly the budget, in each head or over what the policy's budget_scope says."""
    run, _ = run_under(policy, setting)
    see = setting.visibility
    whole = set() if isinstance(policy, ScoringPolicy) else _left_whole(policy, run)
    layers = {layer: kept_sets(selection) for layer, selection in run.selections.items()}
    for row in range(len(next(iter(layers.values()), []))):
        sample = _sample_of(row, run, setting)
        visible = slow_strata(see, sample)[0]
        wanted = wanted_of(policy, see, sample, visible)
        kept = {layer: [head & visible for head in rows[row]] for layer, rows in layers.items()}
        if policy.budget_scope == "model":
            total = sum(Fraction(sum(map(len, heads)), len(heads)) for heads in kept.values())
            if total != wanted * len(kept):
                raise Violation(
                    f"sample {sample} to keep {wanted * len(kept)} of {len(kept)} x {len(visible)} visible "
                    f"tokens in all layers (mean over heads) at {policy.spec}",
                    f"{float(total):g}",
                )
            continue
        for layer, heads in kept.items():
            if layer in whole and all(head == visible for head in heads):
                continue
            parts = [heads] if policy.budget_scope == "layer" else [[head] for head in heads]
            for number, part in enumerate(parts):
                where = f"layer {layer}, sample {sample}"
                where += "" if len(part) > 1 else f", head {number}"
                require_sum(where, policy, part, wanted, visible)


def _left_whole(policy: CrossKVPolicy, run: Compression) -> set[int]:
    """Return the layer that decided for later ones, which may leave its own cache whole.

    So may the layers before it, if the policy states no exact budget.
    """
    early = list(run.prefill_selections.items())
    for place, ((layer_idx, attended), (_, next_attended)) in enumerate(itertools.pairwise(early)):
        if attended is None and next_attended is not None:
            before_it = {layer for layer, _ in early[:place]} if policy.exact_budget is None else set()
            return before_it | {layer_idx}
    return set()


def check_images(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV03: each sample keeps a token of each image that decoding sees."""
    run, _ = run_under(policy, setting)
    see = setting.visibility
    for where, sample, kept in _kept(run, setting):
        visible = slow_decode(see, sample)
        for group in slow_groups(see, sample):
            if group & visible and not group & kept:
                raise Violation(f"{where} to keep one of {sorted(group)}", f"{sorted(kept)}")
        if not kept:
            raise Violation(f"{where} to keep a token at least", "none kept")


def check_padding(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV04: decoding holds no padding while something visible was dropped."""
    run, _ = run_under(policy, setting)
    for where, sample, kept in _kept(run, setting):
        visible = slow_decode(setting.visibility, sample)
        if visible and kept - visible and visible - kept:
            raise Violation(
                f"{where} to drop unseen columns before visible ones",
                f"{sorted(kept - visible)} kept, {sorted(visible - kept)} dropped",
            )


def check_prefill_rows(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV05: in each layer's prefill, a row that saw a token still sees one."""
    run, _ = setting.prefill(policy)
    see = setting.visibility
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


def check_repeatable(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV10: the same seed selects the same; inputs and global generators stay as they were."""
    batch, before = setting.batch(), random_state()["torch"]
    first, _ = setting.prefill(policy, batch)
    for name, tensor in batch.items():
        if not torch.equal(tensor, setting.inputs[name]):
            raise Violation(f"the model's input {name!r} to stay as it was", "another content")
    if not torch.equal(before, random_state()["torch"]):
        raise Violation("torch's global generator to stay as it was", "it was moved or seeded")
    again, _ = setting.prefill(policy)
    for layer_idx, selection in first.selections.items():
        if selection != again.selections[layer_idx]:
            raise Violation(f"the same selection again in layer {layer_idx}, for the same seed", "another")


def check_alone_in_model(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV10: a sample selects alone what it selects in a batch (in float64: rounding must not decide)."""
    if setting.dtype != torch.float64:
        return
    together, _ = setting.prefill(policy)
    for sample in range(setting.batch_size):
        if _has_no_image(setting, sample):
            continue  # without an image, the model is called without one
        alone, _ = setting.prefill(policy, _alone(setting.inputs, sample))
        for layer_idx, selection in alone.selections.items():
            # Columns beyond are there only because other samples have more images.
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


def _alone(inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """Cut the inputs to one sample, without the padding that its batch needs."""
    alone = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is not None and mask is not None and ids.shape == mask.shape:
        real = mask[sample].bool()
        for name, tensor in inputs.items():
            if tensor.shape[:2] == mask.shape:
                alone[name] = alone[name][:, real]
    # In stock, a text row before the first image attends to everything, the batch's padding images included:
    # without these, hidden states differ, and with them what later layers attend to.
    if "cross_attention_mask" in alone and bool(alone["cross_attention_mask"].flatten(2).any(-1).all()):
        images = int(alone["cross_attention_mask"].any(-1).any(1).sum())
        alone["cross_attention_mask"] = alone["cross_attention_mask"][:, :, :images]
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            alone[name] = alone[name][:, :images]
    return alone


def _has_no_image(setting: Setting, sample: int) -> bool:
    if "cross_attention_mask" not in setting.inputs:
        return False
    return not slow_prefill(setting.visibility, sample)


def _kept(run: Compression, setting: Setting) -> Iterator[tuple[str, int, set[int]]]:
    """Yield what decoding keeps, by layer, head and sample, beams included."""
    for layer_idx, selection in run.selections.items():
        if selection.columns != setting.visibility.columns:
            raise Violation(
                f"layer {layer_idx} to select out of {setting.visibility.columns} columns",
                str(selection.columns),
            )
        for row, heads in enumerate(kept_sets(selection)):
            for head, kept in enumerate(heads):
                sample = _sample_of(row, run, setting)
                yield f"layer {layer_idx}, sample {sample}, head {head}", sample, kept


def _sample_of(row: int, run: Compression, setting: Setting) -> int:
    """Return the sample whose beam a row is."""
    rows = len(next(iter(run.selections.values())).indices)
    return row * setting.visibility.batch // rows
