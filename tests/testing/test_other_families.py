"""Right adapters of families that do unusual things pass the suite; those with a defect do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import OLD
from other_families import samples, texts, tiny_moonshine, tiny_t5gemma
from torch import Tensor

import kvprune
from kvprune.adapters.families.speech import MoonshineAdapter
from kvprune.adapters.families.texts import T5GemmaAdapter
from kvprune.errors import ConformanceError
from kvprune.testing import check_adapter, masked_oracle
from kvprune.testing.conformance.models.scenario import Scenario, difference
from kvprune.testing.reference import visibility_of


def deep_t5gemma(dtype: torch.dtype) -> Any:
    """Return a T5Gemma that rounds by more than 2e-6 in float64: norms in float32, and large logits."""
    return tiny_t5gemma(dtype, num_hidden_layers=6, layer_types=["full_attention"] * 6)


@pytest.mark.parametrize(
    ("adapter", "make_model", "make_inputs", "only"),
    [
        (MoonshineAdapter, tiny_moonshine, samples, ["KV02", "KV04", "KV08"]),
        (T5GemmaAdapter, deep_t5gemma, texts, ["KV09"]),
        pytest.param(MoonshineAdapter, tiny_moonshine, samples, None, marks=pytest.mark.slow),
        pytest.param(T5GemmaAdapter, deep_t5gemma, texts, None, marks=pytest.mark.slow),
    ],
)
def test_a_right_adapter_passes(adapter: Any, make_model: Any, make_inputs: Any, only: Any) -> None:
    report = check_adapter(adapter, make_model, make_inputs, only=only)
    outcomes = {result.id: result.outcome for result in report.results}
    # What these families cannot do in stock: draft with their first layers, keep some logits, pad a whole
    # sample.
    cannot = {row for row, outcome in outcomes.items() if outcome == "not applicable"}
    assert cannot <= {"drafts", "logits", "padding"}
    assert {outcome for row, outcome in outcomes.items() if row not in cannot} == {"passed"}


def test_tokens_that_the_shortened_mask_hides_are_counted_as_hidden() -> None:
    class SeesPadding(MoonshineAdapter):
        def _visibility(self, tokens: Tensor, states: Tensor, *masks: Any) -> Any:
            return super()._visibility(tokens, states, None, *masks[1:])

    with pytest.raises(ConformanceError, match="KV02") as failure:
        check_adapter(SeesPadding, tiny_moonshine, samples, only=["KV02"])
    assert "visible tokens" in str(failure.value)


def test_what_the_stock_model_sees_is_read_from_its_own_mask() -> None:
    scenario = Scenario(tiny_moonshine(torch.float64), samples(torch.float64), adapter=MoonshineAdapter)
    see = scenario.visibility
    seen = [int((units == 0).sum()) for units in see.units]
    assert seen[0] == see.columns
    assert 0 < seen[1] < see.columns
    with pytest.raises(ValueError, match=f"a mask of width 5000 does not say which of {see.columns} columns"):
        visibility_of(scenario.batch(), see.columns)


@pytest.mark.skipif(OLD, reason="T5Gemma of this release rounds less")
def test_the_tolerance_follows_what_the_untouched_model_rounds() -> None:
    deep = Scenario(deep_t5gemma(torch.float64), texts(torch.float64), steps=4, adapter=T5GemmaAdapter)
    assert deep.tolerance < deep.logit_tolerance <= 16 * deep.tolerance
    plain = Scenario(tiny_moonshine(torch.float64), samples(torch.float64), adapter=MoonshineAdapter)
    assert plain.logit_tolerance == plain.tolerance


def test_a_tolerance_that_follows_the_model_still_sees_one_wrong_token() -> None:
    deep = Scenario(deep_t5gemma(torch.float64), texts(torch.float64), steps=4, adapter=T5GemmaAdapter)
    run, generated = deep.run(kvprune.get_policy("norm:keep_ratio=0.3"))
    selections = dict(run.selections)
    last = max(selections)
    wrong = selections[last].to_mask()
    wrong[0, :, [int((~wrong[0, 0]).nonzero()[0])]] = True
    selections[last] = kvprune.Selection.from_mask(wrong)
    with masked_oracle(deep.pristine, selections, run.prefill_selections, adapter=T5GemmaAdapter):
        other = deep.generate(deep.pristine)
    assert not deep.are_close(difference(generated, other))
