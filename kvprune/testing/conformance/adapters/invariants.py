"""All invariants of adapters on one page: which checks they have, under which policies, in which settings."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune.testing.conformance.adapters import attachment, captures, declaration, generation, sharing
from kvprune.testing.conformance.models import (
    cache_contents,
    decoding,
    history,
    new_tokens,
    rereading,
    rows,
    selections,
)
from kvprune.testing.conformance.policies.invariants import ModelCheck

__all__ = ["ADAPTER_INVARIANTS", "SETTINGS", "AdapterInvariant", "Cases"]

SETTINGS = {
    "greedy": ("float64", "", 1),
    "beams": ("float64", "", 3),
    "float32": ("float32", "", 1),
    "eager": ("float32", "eager", 1),
    "sdpa": ("float32", "sdpa", 3),
}
"""By name: dtype, attention implementation ("" for the model's own), and number of beams."""

FULL, LOSSLESS = ("full",), ("lossless",)
# Each head keeps its own tokens; queries decide for later layers; a random choice for later layers.
PRUNING = ("norm:keep_ratio=0.3", "trim:keep_ratio=0.3", "random:keep_ratio=0.3,reach=onward")
ONE, BY_QUERIES, RANDOM = PRUNING[:1], PRUNING[1:2], PRUNING[2:]
RAW_KEYS = ("norm:of=raw_keys,keep=low,keep_tokens=3",)


@dataclass(frozen=True)
class Cases:
    """A check, and where it runs.

    Attributes:
        check: Called with a policy and a scenario.
        policies: Specs of built-in policies.
        settings: Names in `SETTINGS`.
    """

    check: ModelCheck
    policies: tuple[str, ...] = PRUNING
    settings: tuple[str, ...] = ("greedy",)


@dataclass(frozen=True)
class AdapterInvariant:
    """One row of the suite.

    Attributes:
        id: As in docs/invariants.md, or a word.
        title: What is checked, in a few words.
        cases: Its checks.
    """

    id: str
    title: str
    cases: tuple[Cases, ...]


ADAPTER_INVARIANTS = (
    AdapterInvariant(
        "class",
        "declaration, probes, every cross layer",
        (
            Cases(declaration.check_declaration, ONE),
            Cases(declaration.check_batch, ONE),
            Cases(declaration.check_layer_indices, ONE),
            Cases(attachment.check_every_layer_decides, ONE),
        ),
    ),
    AdapterInvariant(
        "view", "policies see what the model computes", (Cases(captures.check_view, ONE, ("eager",)),)
    ),
    AdapterInvariant("KV01", "columns of the unpruned cache", (Cases(selections.check_columns),)),
    AdapterInvariant("KV02", "the budget counts what is visible", (Cases(selections.check_counts),)),
    AdapterInvariant(
        "KV03", "never empty, for no image", (Cases(selections.check_images, settings=("greedy", "beams")),)
    ),
    AdapterInvariant("KV04", "padding goes before visible tokens", (Cases(selections.check_padding),)),
    AdapterInvariant("KV05", "no row goes blind", (Cases(selections.check_prefill_rows),)),
    AdapterInvariant(
        "KV06",
        "masks as wide as what is held",
        (Cases(decoding.check_mask_width, settings=("greedy", "beams")),),
    ),
    AdapterInvariant(
        "KV07",
        "keeping all is bit-identical",
        (Cases(decoding.check_identity, FULL, tuple(SETTINGS)),),
    ),
    AdapterInvariant(
        "KV08",
        "dropping only the unseen is lossless",
        (Cases(decoding.check_lossless, LOSSLESS, tuple(SETTINGS)),),
    ),
    AdapterInvariant(
        "KV09", "the order of kept tokens is irrelevant", (Cases(decoding.check_storage_order),)
    ),
    AdapterInvariant(
        "KV10",
        "purity",
        (Cases(selections.check_repeatable), Cases(selections.check_alone_in_model, (*PRUNING, *RAW_KEYS))),
    ),
    AdapterInvariant(
        "KV11",
        "tensors and selection stay together",
        (
            Cases(cache_contents.check_alignment, settings=("greedy", "beams")),
            Cases(cache_contents.check_cache_operations),
            Cases(cache_contents.check_turns),
        ),
    ),
    AdapterInvariant(
        "KV12",
        "nothing is left behind",
        (
            Cases(decoding.check_clean_exit, (*PRUNING[1:], *RAW_KEYS)),
            Cases(attachment.check_failed_policy, ONE),
            Cases(attachment.check_failed_attach, ONE),
        ),
    ),
    AdapterInvariant(
        "KV13",
        "the master oracle",
        (
            Cases(decoding.check_oracle, (*LOSSLESS, *PRUNING, *RAW_KEYS), ("greedy", "beams")),
            Cases(decoding.check_oracle, PRUNING, ("float32", "eager", "sdpa")),
            Cases(new_tokens.check_new_tokens, ONE, ("greedy", "beams")),
        ),
    ),
    AdapterInvariant(
        "history",
        "the same answer whatever ran before",
        (Cases(history.check_history, RANDOM), Cases(history.check_encoder_outputs, RANDOM)),
    ),
    AdapterInvariant(
        "rows",
        "rows of equal inputs stay apart",
        (Cases(rows.check_rows_of_equal_inputs, BY_QUERIES),),
    ),
    AdapterInvariant(
        "padding", "a sample that is all padding", (Cases(rows.check_empty_sample, BY_QUERIES),)
    ),
    AdapterInvariant(
        "reread",
        "the last token is read again",
        (
            Cases(rereading.check_rereading, (*LOSSLESS, *PRUNING), ("greedy", "beams")),
            Cases(rereading.check_rereading, ONE, ("eager", "sdpa")),
            Cases(rereading.check_rereading_in_full, FULL, tuple(SETTINGS)),
            Cases(rereading.check_broken_rereading, RANDOM),
        ),
    ),
    AdapterInvariant(
        "logits",
        "scoring answers with logits_to_keep",
        (Cases(generation.check_logits_to_keep, BY_QUERIES),),
    ),
    AdapterInvariant(
        "drafts",
        "assistant_early_exit is greedy search",
        (Cases(generation.check_self_speculation, BY_QUERIES),),
    ),
    AdapterInvariant(
        "weights",
        "returned attention weights",
        (Cases(generation.check_weights, PRUNING[:2], ("eager",)),),
    ),
    AdapterInvariant("copies", "copies and pickles are free", (Cases(sharing.check_copies, ONE),)),
    AdapterInvariant("threads", "one thread at a time", (Cases(sharing.check_threads, BY_QUERIES),)),
)
