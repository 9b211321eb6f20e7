"""The three moments: before the first cross-attention layer, after each, and when all have attended."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from families import BATCHES, MODELS, compressed, inputs_of, model_of
from generation import difference_to_oracle
from helpers import conversations, make_view
from hypothesis import given

import kvprune
from kvprune import Decision, FeatureView, Selection, scoring
from kvprune.errors import PolicyFailedError, SelectionError, UnsupportedCacheError
from kvprune.testing import check_policy


@dataclass(frozen=True, kw_only=True)
class LongFeatures(kvprune.FeatureScoringPolicy):
    """Keep the tokens whose features are longest."""

    name = "long-features"

    def score(self, view):
        return view.features.double().norm(dim=-1)[:, None]


@dataclass(frozen=True, kw_only=True)
class Late(kvprune.PrefillPolicy):
    """Keep the longest values of each layer, and more of them the later the layer.

    Args:
        keep_ratio: Mean fraction over layers.
    """

    keep_ratio: float = 0.5
    name = "late"
    budget_scope = "model"

    @property
    def exact_budget(self):
        return kvprune.Budget(keep_ratio=self.keep_ratio)

    def observe(self, view):
        return view.values.double().norm(dim=-1)

    def conclude(self, views, observed):
        decisions = []
        for view, scores in zip(views, observed, strict=True):
            strata = view.decode_strata
            limit = scoring.limits(self.exact_budget, strata)
            room = torch.minimum(limit - 1, scoring.stratum_sizes(strata) - limit).clamp(0, 1)
            later = 2 * view.rank - len(views) + 1
            limit = limit + room * ((later > 0) - (later < 0))  # adds up to nothing over layers
            kept = scoring.keep_top(scores, strata, limit, view.visibility)
            decisions.append(Decision(cache=Selection.from_mask(kept)))
        return decisions


@pytest.mark.slow
@pytest.mark.parametrize("cls", [LongFeatures, Late])
def test_the_conformance_suite_knows_both_moments(cls):
    check_policy(cls, examples=10)


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("batch", sorted(BATCHES))
@pytest.mark.parametrize("policy", [LongFeatures(keep_ratio=0.3), Late()], ids=lambda policy: policy.name)
def test_generation_equals_the_oracle(family, batch, policy):
    model, inputs = model_of(family), inputs_of(family, batch)
    assert difference_to_oracle(model, inputs, policy) <= 2e-6


@pytest.mark.parametrize("family", sorted(MODELS))
def test_what_is_dropped_before_the_first_layer_is_projected_by_none(family):
    _, _, run = compressed(model_of(family), inputs_of(family), LongFeatures(keep_ratio=0.3))
    first = run.prefill_selections[min(run.prefill_selections)]
    assert all(selection == first for selection in run.prefill_selections.values())
    assert first is not None
    assert run.report.bytes_peak < run.report.bytes_full
    assert run.report.layers[0].seconds > 0


@pytest.mark.parametrize("family", sorted(MODELS))
def test_all_layers_hold_everything_until_the_last_has_attended(family):
    _, _, run = compressed(model_of(family), inputs_of(family), Late())
    assert set(run.prefill_selections.values()) == {None}
    assert run.report.bytes_peak > run.report.bytes_full >= run.report.bytes_held
    counts = [selection.counts.sum().item() for selection in run.selections.values()]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_bytes_at_the_peak_are_those_of_all_layers_and_of_one_gathering():
    model, inputs = model_of("Mllama"), inputs_of("Mllama", "one")
    _, _, run = compressed(model, inputs, Late())
    layers = run.report.layers
    # The first layer is gathered while all others are still whole.
    assert run.report.bytes_peak == run.report.bytes_full + layers[0].bytes_held


def test_the_question_is_unknown_before_the_first_layer():
    assert not hasattr(FeatureView, "queries")


@pytest.mark.parametrize("policy", [LongFeatures(), Late()], ids=lambda policy: policy.name)
def test_beams_are_asked_about_once(policy):
    model, inputs = model_of("Mllama"), inputs_of("Mllama")
    rows = []
    ask = type(policy).choose if isinstance(policy, LongFeatures) else type(policy).observe

    def note(self, view):
        rows.append(view.batch)
        return ask(self, view)

    moment = "choose" if isinstance(policy, LongFeatures) else "observe"
    watched = dataclasses.dataclass(frozen=True, kw_only=True)(
        type("Watched", (type(policy),), {moment: note})
    )
    compressed(model, inputs, watched(), num_beams=3)
    assert set(rows) == {3}


def test_without_a_cache_only_what_goes_onward_counts():
    model, inputs = model_of("Mllama"), inputs_of("Mllama")
    with kvprune.compress(model, LongFeatures(keep_ratio=0.3)) as run, torch.no_grad():
        model(**inputs, use_cache=False)
    assert run.report.bytes_held == 0
    with (
        pytest.raises(UnsupportedCacheError, match="choose a policy that decides onward"),
        kvprune.compress(model, Late()),
        torch.no_grad(),
    ):
        model(**inputs, use_cache=False)


def test_gradients_flow_through_what_is_kept_before_the_first_layer():
    model, inputs = model_of("Mllama"), inputs_of("Mllama", "one")
    projector = (model.model if hasattr(model, "model") else model).multi_modal_projector
    with kvprune.compress(model, LongFeatures(keep_ratio=0.3)):
        model(**inputs).logits.sum().backward()
    assert projector.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def broken(moment, answer):
    """A policy that answers one moment wrongly."""
    base = LongFeatures if moment == "choose" else Late
    return dataclasses.dataclass(frozen=True, kw_only=True)(
        type("Broken", (base,), {"name": "broken", moment: answer})
    )()


def everything(view):
    return Selection.all(view.batch, view.columns)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (
            broken("choose", lambda self, view: Decision(cache=everything(view))),
            SelectionError,
            r"before the first cross-attention layer: choose decided about a cache",
        ),
        (
            broken("choose", lambda self, view: None),
            SelectionError,
            r"before the first .*returned NoneType, expected a Decision",
        ),
        (
            broken("choose", lambda self, view: 1 / 0),
            PolicyFailedError,
            r"'broken' raised ZeroDivisionError before the first cross-attention layer",
        ),
        (
            broken("conclude", lambda self, views, observed: []),
            SelectionError,
            r"conclude returned 0 decisions, expected one for each of [0-9]+ layers",
        ),
        (
            broken("conclude", lambda self, views, observed: [Decision(onward=everything(v)) for v in views]),
            SelectionError,
            r"all of them have attended; return Decision\(cache=\.\.\.\)",
        ),
        (
            broken("conclude", lambda self, views, observed: [None] * len(views)),
            SelectionError,
            r"returned NoneType, expected a Decision",
        ),
        (
            broken("conclude", lambda self, views, observed: {}["no"]),
            PolicyFailedError,
            r"'broken' raised KeyError",
        ),
    ],
)
def test_wrong_answers_are_refused_by_name_and_moment(policy, error, message):
    model, inputs = model_of("Mllama"), inputs_of("Mllama", "one")
    with pytest.raises(error, match=message), kvprune.compress(model, policy), torch.no_grad():
        model(**inputs)
    with kvprune.compress(model, "full"), torch.no_grad():  # nothing is left behind
        model(**inputs)


def test_queries_do_not_outlive_their_layer():
    alive = []

    class Keeps(Late):
        name = "keeps"

        def observe(self, view):
            assert view.queries is not None
            return super().observe(view)

        @property
        def needs(self):
            return frozenset({"queries", "features"})

        def conclude(self, views, observed):
            alive.extend((view.captured.queries, view.captured.features) for view in views)
            return super().conclude(views, observed)

    policy = dataclasses.dataclass(frozen=True, kw_only=True)(Keeps)()
    compressed(model_of("Mllama"), inputs_of("Mllama", "one"), policy)
    assert alive == [(None, None)] * len(alive)
    assert alive


def test_features_are_given_to_a_layer_that_asks():
    shapes = []

    class Asks(kvprune.CrossKVPolicy):
        name = "asks"

        @property
        def needs(self):
            return frozenset({"features"})

        def select(self, view):
            shapes.append((list(view.features.shape), view.columns))
            return kvprune.onward_decision(view, view.visible[:, None]) if view.rank == 0 else Decision()

    policy = dataclasses.dataclass(frozen=True, kw_only=True)(Asks)()
    model = model_of("Mllama")
    compressed(model, inputs_of("Mllama", "one"), policy, num_beams=2)
    assert [shape[1] for shape, _ in shapes] == [columns for _, columns in shapes]
    assert len({columns for _, columns in shapes}) == 1  # four tiles, all seen


@pytest.mark.parametrize("family", sorted(MODELS))
def test_nobody_pays_for_features_that_nobody_needs(family):
    view_features = []

    class Looks(kvprune.CrossKVPolicy):
        name = "looks"

        def select(self, view):
            view_features.append(view.captured.features)
            return Decision()

    compressed(model_of(family), inputs_of(family), dataclasses.dataclass(frozen=True, kw_only=True)(Looks)())
    assert set(view_features) == {None}


@given(conversations())
def test_a_prefill_policy_asked_about_one_layer_decides_as_if_there_were_no_other(visibility):
    view, late = make_view(visibility), Late()
    assert late.select(view) == late.conclude([view], [late.observe(view)])[0]


@dataclass(frozen=True, kw_only=True)
class Remarking(kvprune.FeaturePolicy):
    """Decides nothing, and has something to say at each moment."""

    name = "remarking"

    def choose(self, view):
        return Decision(note="before all layers")

    def select(self, view):
        return Decision(note="after a layer")


@pytest.mark.parametrize("family", sorted(MODELS))
def test_notes_on_decisions_are_warnings_of_the_report(family):
    model, inputs = model_of(family), inputs_of(family, "one")
    _, _, run = compressed(model, inputs, Remarking())
    assert run.report.warnings == ("before all layers", "after a layer")


def test_a_note_is_text_and_no_part_of_what_is_decided():
    assert Decision(note="why") == Decision()
    with pytest.raises(SelectionError, match="note of a decision is a string, got list"):
        Decision(note=["why"])


@dataclass(frozen=True, kw_only=True)
class OneTooMany(Late):
    """Keep one token more in the last layer than its budget says."""

    name = "one-too-many"

    def conclude(self, views, observed):
        decisions = super().conclude(views, observed)
        kept = decisions[-1].cache.to_mask()
        kept |= (~kept).cumsum(-1) == 1  # and the first that was dropped
        decisions[-1] = Decision(cache=Selection.from_mask(kept))
        return decisions


def test_one_token_too_many_in_one_layer_of_all_is_noticed():
    model, inputs = model_of("Mllama"), inputs_of("Mllama", "one")
    with kvprune.compress(model, Late(keep_ratio=0.6)) as exact, torch.no_grad():
        model(**inputs)
    with kvprune.compress(model, OneTooMany(keep_ratio=0.6)) as over, torch.no_grad():
        model(**inputs)
    assert exact.report.warnings == ()
    assert "the budget was exceeded" in over.report.warnings[0]
