"""What lives for one forward call: arguments by name, hooks, and what is captured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kvprune
from kvprune.adapters.arguments import cache_of, has_cache, named_arguments, with_cache
from kvprune.adapters.attachment import Attachment, compressing
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.adapters.tiny.models import mllama_inputs, tiny_mllama
from kvprune.errors import CompressionStateError, UnsupportedModelError


class Layer(nn.Module):
    def forward(self, hidden, mask=None, **more):
        return hidden


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_found_and_replaced_by_either_of_its_names(name):
    named = {"hidden": 1, name: "old"}
    assert cache_of(named) == "old"
    assert with_cache(named, "new") == {"hidden": 1, name: "new"}
    assert named[name] == "old"


def test_there_may_be_no_cache():
    assert cache_of({"past_key_values": None}) is None
    config = type("Config", (), {"use_cache": True})
    assert has_cache({}, config)
    assert not has_cache({"use_cache": False}, config)
    assert has_cache({"use_cache": False, "cache": "given"}, config)


def test_arguments_given_by_position_get_their_names():
    assert named_arguments(Layer(), (1, 2), {"extra": 3}) == {"hidden": 1, "mask": 2, "extra": 3}


def test_hooks_for_one_call_go_when_it_ends_and_the_others_when_it_is_detached():
    layer, heard = Layer(), []
    attachment = Attachment(layer, "test")
    attachment.before(layer, lambda *_: heard.append("always"))
    attachment.after(layer, lambda *_: heard.append("once"), for_one_call=True)
    layer(1)
    attachment.end_of_call()
    layer(1)
    assert heard == ["always", "once", "always"]
    assert compressing(layer) == "test"
    attachment.detach()
    layer(1)
    assert heard == ["always", "once", "always"]
    assert compressing(layer) is None


def test_an_attribute_is_restored_whether_it_was_there_or_not():
    layer = Layer()
    layer.there = 1
    attachment = Attachment(layer, "test")
    attachment.override(layer, "there", 2)
    attachment.override(layer, "new", 3)
    assert (layer.there, layer.new) == (2, 3)
    attachment.detach()
    assert layer.there == 1
    assert not hasattr(layer, "new")


def test_an_adapter_that_is_not_attached_has_no_manager():
    with pytest.raises(CompressionStateError, match=r"Mllama.* is not attached to a model"):
        _ = MllamaAdapter(tiny_mllama(1)).manager


def test_nothing_of_a_call_outlives_it():
    model, inputs = tiny_mllama(1), mllama_inputs(["t4tt"])
    run = kvprune.compress(model, "trim:keep_ratio=0.5").attach()
    with torch.no_grad():
        model(**inputs)
    adapter = run._adapter
    assert adapter._call is None
    assert not adapter._call_handles
    run.detach()


def test_sites_are_the_cross_attention_modules_in_order():
    model = tiny_mllama(1)
    sites = MllamaAdapter(model).sites
    assert [site.layer_idx for site in sites] == [1, 3, 5]
    assert all(site.module is model.model.language_model.layers[site.layer_idx].cross_attn for site in sites)


class Blind(ModelAdapter):
    """Says neither where its family attends, nor which layers do."""

    family = "blind"
    model_classes = ("Layer",)

    @classmethod
    def probe(cls):
        return []

    def attach(self, manager):
        raise NotImplementedError


def test_an_adapter_that_does_not_say_where_its_family_attends_is_refused():
    with pytest.raises(
        UnsupportedModelError, match="Blind does not say where blind attends to encoder states"
    ):
        _ = Blind(Layer()).layer_indices
