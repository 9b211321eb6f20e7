"""`check_adapter` is tested by adapters that break one thing each."""

from __future__ import annotations

import dataclasses

import pytest
from zoo import adapter_caches as caches
from zoo import adapters as zoo
from zoo import adapters_in_runs as runs

from kvprune.errors import ConformanceError
from kvprune.testing import check_adapter
from kvprune.testing.conformance import ADAPTER_INVARIANTS
from kvprune.testing.conformance.adapters.runner import AdapterRunner

ADAPTERS = [*zoo.ADAPTERS, *caches.ADAPTERS_WITH_CACHES, *runs.ADAPTERS_IN_RUNS]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
def test_it_is_caught_and_the_reproducer_shows_it(adapter):
    with pytest.raises(ConformanceError) as failure:
        check_adapter(adapter, only=adapter.caught_by)
    report = failure.value.report
    assert {result.id for result in report.failures} == set(adapter.caught_by)
    pasted = report.results[0].reproducer
    assert pasted.endswith(f"check_adapter({adapter.__name__}, only=[{report.results[0].id!r}])")
    with pytest.raises(ConformanceError, match=rf"breaks {report.results[0].id} \(failed\)"):
        exec(compile(pasted, "reproducer", "exec"), {})


def test_every_invariant_has_a_broken_adapter():
    assert {invariant for cls in ADAPTERS for invariant in cls.caught_by} == {
        row.id for row in ADAPTER_INVARIANTS
    }
    assert len(ADAPTERS) >= 20


ALONE = {
    "check_declaration": zoo.RottenProbe,
    "check_batch": None,  # about the functions that are given
    "check_layer_indices": zoo.SkipsTheLastLayer,
    "check_every_layer_decides": zoo.DecidesOnlyOnce,
    "check_view": zoo.SwapsQueries,
    "check_columns": caches.UnsortedSlots,
    "check_counts": zoo.SeesPadding,
    "check_images": zoo.HidesTheFirstTile,
    "check_padding": zoo.SeesPadding,
    "check_prefill_rows": zoo.StarvesARow,
    "check_mask_width": zoo.OneTooWide,
    "check_identity": zoo.RoundsTheCache,
    "check_lossless": zoo.HidesTheFirstTile,
    "check_storage_order": zoo.RemembersTheMask,
    "check_repeatable": zoo.RandomEachTime,
    "check_alone_in_model": zoo.SeesPadding,
    "check_alignment": caches.RollsKeptValues,
    "check_cache_operations": caches.LeavesSlotsBehind,
    "check_turns": caches.ForgetsWhileDecoding,
    "check_clean_exit": zoo.LeavesIsCausal,
    "check_failed_policy": zoo.StaysAfterAnException,
    "check_failed_attach": zoo.ForgetsHooksWhenAttachFails,
    "check_oracle": zoo.MasksByPosition,
    "check_new_tokens": runs.IgnoresNewTokens,
    "check_history": runs.KeepsHooksOfAnInterrupt,
    "check_encoder_outputs": runs.SeedsByTheLastInput,
    "check_rows_of_equal_inputs": runs.SharesEqualRows,
    "check_empty_sample": runs.DropsTheMaskForEmptySamples,
    "check_rereading": runs.RereadsWithTheFirstMask,
    "check_rereading_in_full": runs.RereadsPadding,
    "check_broken_rereading": runs.NeverLeavesTheSecondCall,
    "check_logits_to_keep": runs.CountsKeptLogitsAsDrafts,
    "check_self_speculation": runs.DraftsInThePrefill,
    "check_weights": runs.ReturnsNarrowWeights,
    "check_copies": runs.HooksSurviveCopies,
    "check_threads": runs.AnswersTwoThreads,
}
CHECKS = {cases.check.__name__: (row, cases) for row in ADAPTER_INVARIANTS for cases in row.cases}


def test_every_check_has_a_broken_adapter():
    assert set(ALONE) == set(CHECKS)


@pytest.mark.parametrize("name", [name for name, adapter in ALONE.items() if adapter is not None])
def test_every_check_catches_something_without_the_others(name):
    row, cases = CHECKS[name]
    result = AdapterRunner(ALONE[name], None, None, 0, None).check(dataclasses.replace(row, cases=(cases,)))
    assert result.outcome == "failed"
    assert "Error: " not in result.detail.splitlines()[1] or name == "check_mask_width"
