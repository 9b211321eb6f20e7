"""Part B of the known defects, continued: what policies and adapters of others meet.

Each test asserts what is right, and failed before the defect was cured; what is still open is a strict
expected failure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from defect_helpers import chats, generate, on_models
from transformers import DynamicCache

import kvprune
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.cache.placement import OneCrossLayer
from kvprune.errors import KVPruneError
from kvprune.testing import check_adapter, enliven, tiny_mllama

# B5: policies that do not say rightly what they need, or cannot say what they are.


def needy(needs: Any) -> kvprune.CrossKVPolicy:
    """Return a policy that keeps everything and needs what is given."""

    @dataclass(frozen=True, kw_only=True)
    class Needy(kvprune.CrossKVPolicy):
        name = "needy"

        def select(self, view: Any) -> kvprune.Decision:
            return kvprune.Decision()

    Needy.needs = property(lambda self: needs)  # type: ignore[assignment]
    return Needy()


def run_once(policy: kvprune.CrossKVPolicy) -> None:
    """Generate under a policy."""
    model = tiny_mllama(1, dtype=torch.float64)
    with kvprune.compress(model, policy):
        generate(model, chats("tt4ttt"))


@on_models
@pytest.mark.parametrize("needs", ["queries", None, ["queries"]], ids=repr)
def test_b5_needs_that_is_no_set_of_strings_is_refused_by_name(needs: Any) -> None:
    with pytest.raises(KVPruneError, match=r"'needy'.*needs"):
        run_once(needy(needs))


@on_models
def test_b5_an_unknown_need_is_answered_with_the_closest_one() -> None:
    with pytest.raises(KVPruneError, match="'needy'") as refusal:
        run_once(needy(frozenset({"query"})))
    assert "did you mean 'queries'?" in str(refusal.value)
    assert "another model" not in str(refusal.value)


class Raising:
    """Stands for an attribute that can be read from the class, and raises on an instance."""

    def __init__(self, of_class: Any) -> None:
        self.of_class = of_class

    def __get__(self, policy: object, cls: type) -> Any:
        if policy is None:
            return self.of_class
        raise ZeroDivisionError("within the policy")


@on_models
@pytest.mark.parametrize("attribute", ["needs", "requested", "exact_budget", "spec", "name"])
def test_b5_a_property_that_raises_is_named_after_its_policy(attribute: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Raises(kvprune.CrossKVPolicy):
        name = "raises"

        def select(self, view: Any) -> kvprune.Decision:
            return kvprune.Decision()

    policy = Raises()
    setattr(Raises, attribute, Raising("raises"))
    with pytest.raises(KVPruneError, match=r"raises.*ZeroDivisionError"):
        run_once(policy)


# B7: the cache that stands in for one call.


def test_b7_the_cache_of_one_layer_can_be_asked_for_its_length() -> None:
    keys = torch.zeros(1, 2, 5, 4)
    text = DynamicCache()
    text.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    assert OneCrossLayer(1, keys, keys, text).get_seq_length(1) == 3


# B8: scores by query head.


@dataclass(frozen=True, kw_only=True)
class ByQueryHead(kvprune.ScoringPolicy):
    """Scores by query head, where one score for each KV head is wanted."""

    name = "by-query-head"

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({"queries"})

    def score(self, view: Any) -> torch.Tensor:
        return view.attention_mass()  # type: ignore[no-any-return]


@on_models
def test_b8_scores_by_query_head_are_refused_with_the_helper_that_groups_them() -> None:
    with pytest.raises(KVPruneError, match="by-query-head") as refusal:
        run_once(ByQueryHead())
    assert "by_kv_head" in str(refusal.value)


# B12: adapters that are right and fail the suite.


class Speech2TextAdapter(EncoderDecoderAdapter):
    """A family whose encoder makes fewer columns than its mask has, and shortens the mask, too."""

    family = "Speech2Text"
    model_classes = ("Speech2TextForConditionalGeneration",)


def tiny_speech(dtype: torch.dtype) -> Any:
    """Return a random Speech2Text of which four frames make one column."""
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        max_target_positions=64,
        input_feat_per_channel=8,
        conv_channels=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Speech2TextForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return enliven(model).to(dtype)


def frames(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return two sounds, the second one padded."""
    features = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 24:] = 0
    return {"input_features": features.to(dtype), "attention_mask": mask}


@on_models
def test_b12_a_family_that_shortens_its_mask_passes_kv02() -> None:
    check_adapter(Speech2TextAdapter, tiny_speech, frames, only=["KV02"])
