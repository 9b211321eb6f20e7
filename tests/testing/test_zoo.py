"""The suite is tested by policies that break one thing each: every one is caught, by the id it names."""

from __future__ import annotations

import dataclasses

import pytest
from zoo import (
    ALL,
    answers,
    batch,
    budget,
    groups,
    inputs,
    keep_all,
    layers,
    leftovers,
    memory,
    merging,
    monotone,
    padding,
    randomness,
    runs,
    shape,
    steps,
    texts,
)

from kvprune.errors import ConformanceError
from kvprune.testing import ModelProblem, check_policy
from kvprune.testing.conformance import INVARIANTS
from kvprune.testing.conformance.common.budgets import variants
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models import selections
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.conformance.policies.runner import Runner

CASES = [(cls, invariant) for cls in ALL for invariant in cls.caught_by]


@pytest.mark.parametrize(("cls", "invariant"), CASES, ids=lambda case: getattr(case, "name", case))
def test_it_is_caught_and_the_reproducer_shows_it(cls, invariant):
    with pytest.raises(ConformanceError, match=rf"breaks {invariant} \(failed\)") as failure:
        check_policy(cls, only=[invariant])
    (result,) = failure.value.report.results
    assert (result.id, result.outcome) == (invariant, "failed")
    with pytest.raises(ConformanceError, match=rf"breaks {invariant} \(failed\)"):
        exec(compile(result.reproducer, "reproducer", "exec"), {})


def test_every_invariant_has_a_broken_policy():
    assert {invariant for _, invariant in CASES} == {row.id for row in INVARIANTS} | {"class"}
    assert len(ALL) >= 22
    assert len({cls.name for cls in ALL}) == len(ALL)


ALONE = {
    "check_shape": shape.Unsorted,
    "check_budget": budget.OffByOne,
    "check_budget_of_layers": layers.OneMoreInLaterLayers,
    "check_counts": budget.OffByOne,
    "check_groups": groups.StarvesAnImage,
    "check_images": groups.StarvesAnImage,
    "check_visible": padding.KeepsPadding,
    "check_padding": padding.KeepsPadding,
    "check_rows": groups.StarvesARow,
    "check_prefill_rows": groups.StarvesARow,
    "check_answers_stay": answers.MutatesItsAnswer,
    "check_keeps_all": keep_all.AllButOne,
    "check_identity": keep_all.AllButOne,
    "check_lossless": keep_all.LosesTheLastTile,
    "check_storage_order": inputs.RollsTheValues,
    "check_inputs": inputs.WritesAndRestores,
    "check_instance": memory.CachesOnItself,
    "check_randomness": randomness.ForksTheWorld,
    "check_order": memory.LooksAtTheLayerBefore,
    "check_clock": memory.WallClock,
    "check_references": memory.KeepsADetachedTensor,
    "check_alone": batch.NormalisesOverTheBatch,
    "check_repeatable": randomness.GlobalRandom,
    "check_alone_in_layers": layers.SharesWithTheBatch,
    "check_alone_in_model": batch.NormalisesOverTheBatch,
    "check_alignment": inputs.RollsTheValues,
    "check_process": leftovers.GlobalHook,
    "check_clean_exit": leftovers.ModelHook,
    "check_oracle": inputs.DoublesTheValues,
    "check_monotone": monotone.Stride,
    "check_partition": merging.MergesPadding,
    "check_mass": merging.MergesAndWrites,
    "check_monotone_in_layers": layers.TakesBack,
    "check_text": texts.UnevenText,
    "check_text_alone": texts.TextByBatch,
    "check_reads_everything": steps.LeavesOneUnread,
    "check_steps_alone": steps.LooksAtOtherSamples,
    "check_views_in_runs": runs.WritesToEarlierLayers,
    "check_history": runs.ForgetsWhenInterrupted,
    "check_rows_of_equal_inputs": runs.SharesEqualInputs,
    "check_empty_sample": runs.NeedsRealText,
    "check_rereading": runs.KeepsMoreIfItIsReadAgain,
}
CHECKS = {check.__name__: (row, check) for row in INVARIANTS for check in (*row.on_layers, *row.on_models)}


BY_ADAPTERS = {"check_columns", "check_mask_width"}
"""What no policy can break, since the engine copies answers; test_adapters.py has adapters that do."""


def test_every_check_has_a_broken_policy():
    assert set(ALONE) | BY_ADAPTERS | {"check_devices"} == set(CHECKS)


def caught_by_one_check(name, cls):
    row, check = CHECKS[name]
    only = dataclasses.replace(
        row,
        on_layers=tuple(one for one in row.on_layers if one is check),
        on_models=tuple(one for one in row.on_models if one is check),
    )
    return Runner(0, 16).check(only, variants(cls)).outcome == "failed"


@pytest.mark.parametrize("name", ALONE)
def test_every_check_catches_something_without_the_others(name):
    assert caught_by_one_check(name, ALONE[name])


@pytest.mark.gpu
def test_a_policy_that_looks_at_the_device_is_caught():
    assert caught_by_one_check("check_devices", batch.LooksAtTheDevice)
    assert not caught_by_one_check("check_devices", type(variants(monotone.Stride)[0]))


@pytest.mark.parametrize(
    ("check", "policy", "layouts"),
    [
        (selections.check_images, groups.StarvesAnImage(), ("14ttt",)),
        (selections.check_prefill_rows, groups.StarvesARow(), ("tt1ttt4tt",)),
    ],
)
def test_runs_are_checked_even_if_the_core_would_let_it_pass(check, policy, layouts, monkeypatch):
    monkeypatch.setattr("kvprune.engine.manager.check_decision", lambda *arguments: None)
    with pytest.raises(Violation, match="one of"):
        check(policy, Scenario.of(ModelProblem(layouts=layouts)))
