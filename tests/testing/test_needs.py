"""The suite and what models can show: a pair that does not fit is noted, no model at all is a failure."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import kvprune
from kvprune import ScoringPolicy
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.errors import ConformanceError, UnsupportedModelError
from kvprune.testing import ModelProblem, check_policy, recheck, tiny_bart


@dataclass(frozen=True, kw_only=True)
class ByText(ScoringPolicy):
    """Adds what the text keys say to the norm of values."""

    name = "by-text"

    @property
    def needs(self):
        return frozenset({"text"})

    def score(self, view):
        return (
            view.values.double().norm(dim=-1)
            + view.text.attention_mass().double().amax((1, 2))[:, None, None]
        )


@pytest.fixture
def without_text(monkeypatch):
    """BART cannot show text."""
    monkeypatch.setattr(BartAdapter, "provides", frozenset({"queries"}))


def test_a_model_that_does_not_fit_is_noted(without_text):
    everywhere = check_policy(ByText, only=["KV05", "KV13"], examples=16)
    noted = {result.id: result.detail for result in everywhere.results}
    assert noted == dict.fromkeys(
        ["KV05", "KV13"], "what needs text was not checked on BART, which does not provide it"
    )
    assert "KV13 passed, but what needs text was not checked on BART" in str(everywhere)
    here = recheck("KV13", ByText, ModelProblem(model="bart"))
    assert (here.outcome, here.problems) == ("passed", 0)


def test_left_out_problems_are_not_counted(without_text, monkeypatch):
    less = check_policy(ByText, only=["KV13"], examples=8).results[0].problems
    monkeypatch.undo()
    more = check_policy(ByText, only=["KV13"], examples=8).results[0]
    assert more.problems > less
    assert more.detail == ""


def test_no_model_at_all_is_a_failure(without_text, monkeypatch):
    monkeypatch.setattr(MllamaAdapter, "provides", frozenset())
    with pytest.raises(ConformanceError, match="a model that provides what 'by-text' needs"):
        check_policy(ByText, only=["KV13"], examples=8)


def test_compress_refuses_at_once(without_text):
    model = tiny_bart(dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"'by-text' needs 'text', which the BART adapter"):
        kvprune.compress(model, ByText())
    assert not any(module._forward_pre_hooks for module in model.modules())
