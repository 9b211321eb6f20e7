"""Sharing a budget out among layers: what all such policies have in common."""

from dataclasses import dataclass

import pytest
import torch
from families import MODELS, compressed, inputs_of, model_of
from generation import difference_to_oracle
from helpers import exact_budget, make_view, make_visibility, visibilities
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Norm
from sharing import concluded, counts_of, groups_of, kept_by_layer, layers_over, visible_of

from kvprune.errors import BudgetError, PolicyOptionError
from kvprune.policy.allocators import LayerAllocator, ProportionalAllocator
from kvprune.testing import check_policy


@dataclass(frozen=True, kw_only=True)
class ByLength(ProportionalAllocator):
    """Weigh layers by their keys.

    Args:
        scorer: Ranks tokens.
    """

    scorer: Norm = Norm()
    name = "by-length"

    def measure(self, view):
        seen = (view.strata == 0)[:, None, :, None]
        return view.keys.double().masked_fill(~seen, 0).abs().amax((1, 2, 3))[:, None]

    def weights(self, measured):
        return measured[..., 0]


@dataclass(frozen=True, kw_only=True)
class LastFirst(LayerAllocator):
    """Fill the last layer first."""

    name = "last-first"

    def urgency(self, measured, visible, columns):
        layers = torch.arange(visible.shape[1]).double()
        return layers[None, :, None].expand(len(visible), -1, columns)


@pytest.mark.slow
def test_the_conformance_suite_passes_them():
    for policy in (ByLength(keep_ratio=0.3), LastFirst(scorer=Norm())):
        check_policy(policy, only=["KV02", "KV03", "KV05", "KV14"], examples=16)


@given(visibilities(), st.integers(1, 100))
def test_all_layers_together_keep_the_budget_and_one_of_each_group_in_each(visibility, percent):
    for policy in (ByLength(keep_ratio=percent / 100), LastFirst(keep_ratio=percent / 100, scorer=Norm())):
        kept = kept_by_layer(policy, layers_over(visibility))
        for sample in range(visibility.batch):
            visible = visible_of(visibility, sample)
            if not visible:
                continue
            wanted = max(exact_budget(percent / 100, len(visible)), groups_of(visibility, sample))
            for head in range(2):
                assert sum(len(layer[sample][head] & visible) for layer in kept) == 3 * wanted


def test_what_one_layer_cannot_take_goes_to_the_next():
    view = make_view(make_visibility([[[1]]], 10))
    assert counts_of(LastFirst(keep_ratio=0.5, scorer=Norm()), [view] * 4) == [1, 1, 8, 10]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_generation_equals_the_oracle(family):
    policy = LastFirst(keep_ratio=0.4, scorer=Norm())
    assert difference_to_oracle(model_of(family), inputs_of(family), policy) <= 2e-6


def test_the_report_says_which_share_could_not_be_met():
    model, inputs = model_of("Mllama"), inputs_of("Mllama", "one")
    _, _, run = compressed(model, inputs, OneForAll(keep_ratio=0.5))
    (warning,) = run.report.warnings
    assert "some layer's share of the budget was more than all its visible tokens" in warning
    assert run.report.kept_fraction == pytest.approx(0.5)
    assert compressed(model, inputs, OneForAll(keep_ratio=1.0))[2].report.warnings == ()


@dataclass(frozen=True, kw_only=True)
class OneForAll(ByLength):
    """Give everything to the last layer."""

    name = "one-for-all"

    def weights(self, measured):
        return torch.arange(measured.shape[1]).double().expand(measured.shape[:2]) ** 30


def test_a_policy_without_a_ranking_needs_a_scorer():
    with pytest.raises(PolicyOptionError, match="'last-first' has no ranking of its own"):
        concluded(LastFirst(), [make_view(make_visibility([[[1]]], 4))])


def test_a_scorer_states_no_budget_and_budgets_are_possible():
    with pytest.raises(PolicyOptionError, match="sets keep_ratio"):
        LastFirst(scorer=Norm(keep_ratio=0.5))
    with pytest.raises(BudgetError, match="keep_tokens"):
        LastFirst(keep_tokens=0)
    assert LastFirst().exact_budget.keep_ratio == 0.5
    assert LastFirst(scorer=Norm(of="raw_keys")).needs == {"raw_keys"}
