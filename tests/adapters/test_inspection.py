"""Where models attend to encoder states is found by inspection, or refused with what was found."""

from __future__ import annotations

from typing import Any

import pytest
from generation import bart, mllama
from torch import nn

from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.inspection import find_sites
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import UnsupportedModelError
from kvprune.testing import tiny_bart


def declared(**names: Any) -> Any:
    return type("OtherAdapter", (BartAdapter,), names)


@pytest.mark.parametrize(
    ("name", "path", "states", "mask", "heads", "kv_heads", "scaling"),
    [
        ("T5ForConditionalGeneration", "layer.1.EncDecAttention", "key_value_states", "mask", 4, 4, 1.0),
        (
            "EncoderDecoderModel",
            "crossattention.self",
            "encoder_hidden_states",
            "attention_mask",
            4,
            4,
            8**-0.5,
        ),
        (
            "EncoderDecoderModel of GPT-2",
            "crossattention",
            "encoder_hidden_states",
            "encoder_attention_mask",
            4,
            4,
            8**-0.5,
        ),
        (
            "CanaryForConditionalGeneration",
            "encoder_attn",
            "encoder_hidden_states",
            "attention_mask",
            4,
            2,
            8**-0.5,
        ),
    ],
)
def test_sites_are_found(
    name: str, path: str, states: str, mask: str, heads: int, kv_heads: int, scaling: float
) -> None:
    found = find_sites(TINY_FAMILIES[name].model(name), name)
    assert [site.layer_idx for site in found.values()] == [0, 1]
    assert all(place.endswith(f".{path}") for place in found)
    for site in found.values():
        assert (site.states, site.mask) == (states, mask)
        assert (site.heads, site.kv_heads, site.head_width, site.scaling) == (heads, kv_heads, 8, scaling)


def test_mllama_is_inspected_as_the_others_are() -> None:
    sites = list(find_sites(mllama(), "Mllama").values())
    assert [site.layer_idx for site in sites] == [1, 3, 5]
    assert {(site.heads, site.kv_heads) for site in sites} == {(4, 2)}
    assert all(site.query_norm is not None and site.key_norm is not None for site in sites)


def test_a_model_without_cross_attention_is_refused() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"encoder_attn": nn.Linear(2, 2)})])

    with pytest.raises(
        UnsupportedModelError, match=r"no cross-attention with a cache in this Encoder"
    ) as error:
        find_sites(Encoder(), "mine")
    assert "layers.0.encoder_attn (Linear): its forward takes no cache" in str(error.value)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            {"attention": "encoder_attention"},
            r"called 'encoder_attention' in its layer .* Found: no module is",
        ),
        ({"attention": "self_attn"}, r"self_attn \(BartAttention\): it is causal, so it attends to the text"),
        ({"query": "query"}, r"BartAttention has no layer 'query'.*it has k_proj, v_proj, q_proj, out_proj"),
        ({"states": "memory"}, r"its forward takes no memory"),
        ({"mask": "position_mask"}, r"BartAttention: forward lacks position_mask; it takes hidden_states, "),
    ],
)
def test_a_wrong_declaration_is_refused_when_the_adapter_is_made(names: dict[str, str], told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        declared(**names)(bart())


def test_a_module_that_looks_otherwise_is_refused_with_what_it_has() -> None:
    model = tiny_bart()
    attention = model.get_decoder().layers[1].encoder_attn
    attention.num_heads = 3
    with pytest.raises(
        UnsupportedModelError, match=r"num_heads is 3, but its queries have 32 features .*width 8"
    ):
        BartAdapter(model)
    attention.num_heads, attention.scaling = 4, None
    with pytest.raises(
        UnsupportedModelError, match=r"decoder.layers.1.encoder_attn.* has no attribute `scaling`"
    ):
        BartAdapter(model)
    assert declared(scaled_by_width=True)(model).sites[1].scaling == 8**-0.5
    attention.scaling, attention.layer_idx = 1.0, 0
    with pytest.raises(UnsupportedModelError, match=r"have the same layer_idx \(\[0, 0, 2\]\)"):
        BartAdapter(model)


def test_fsmt_whose_attention_takes_other_arguments_is_refused() -> None:
    from transformers import FSMTConfig, FSMTForConditionalGeneration

    config = FSMTConfig(
        src_vocab_size=64,
        tgt_vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    adapter = type("FsmtAdapter", (EncoderDecoderAdapter,), {"family": "FSMT"})
    with pytest.raises(UnsupportedModelError, match="FSMT") as error:
        adapter(FSMTForConditionalGeneration(config))
    assert "model.decoder.layers.0.encoder_attn (Attention): its forward takes no cache" in str(error.value)


def test_a_model_with_two_decoders_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = tiny_bart(), tiny_bart()

    with pytest.raises(
        UnsupportedModelError, match=r"same layer_idx \(\[0, 0, 1, 1, 2, 2\]\).*several decoders"
    ):
        BartAdapter(Two())


def test_t5gemma2_whose_attentions_are_one_softmax_is_refused() -> None:
    merged = pytest.importorskip("transformers.models.t5gemma2.modeling_t5gemma2").T5Gemma2MergedAttention

    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            attention = merged.__new__(merged)
            nn.Module.__init__(attention)
            self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": attention})])

    with pytest.raises(
        UnsupportedModelError, match=r"inspection finds no cross-attention .* Found: no module is"
    ):
        find_sites(Merged(), "T5Gemma2")


def test_a_module_that_names_the_text_otherwise_is_refused() -> None:
    model = tiny_bart()
    for layer in model.get_decoder().layers:
        kind = type(layer.encoder_attn)

        class Own(kind):  # type: ignore[misc, valid-type]
            def forward(self, text: Any, key_value_states: Any = None, past_key_values: Any = None) -> Any:
                return text, None

        layer.encoder_attn.__class__ = Own
    with pytest.raises(
        UnsupportedModelError, match=r"encoder_attn \(Own\): its forward takes no hidden_states"
    ):
        BartAdapter(model)


def test_a_decoder_without_a_config_is_refused() -> None:
    model = tiny_bart()
    del model.get_decoder().config
    with pytest.raises(
        UnsupportedModelError, match=r"model.decoder \(BartDecoder\), which has no config that says use_cache"
    ):
        BartAdapter(model)


def test_an_error_says_what_to_set() -> None:
    model = tiny_bart()
    for layer in model.get_decoder().layers:
        layer.memory, layer.encoder_attn = layer.encoder_attn, None
    with pytest.raises(
        UnsupportedModelError, match=r"Found: .*\. If .* has another name, set attention in the adapter"
    ):
        BartAdapter(model)
    with pytest.raises(
        UnsupportedModelError, match=r"takes no memory\. If .* have other names, set states, or"
    ):
        declared(attention="memory", states="memory")(model)
    with pytest.raises(UnsupportedModelError, match=r"lacks visible; .* set mask in the adapter"):
        declared(attention="memory", mask="visible")(model)
    assert len(declared(attention="memory")(model).sites) == 3
    for layer in model.get_decoder().layers:
        layer.memory.asks = layer.memory.q_proj
        del layer.memory.q_proj
    with pytest.raises(UnsupportedModelError, match=r"such as q_proj.* set states, or query, key"):
        declared(attention="memory")(model)
    assert declared(attention="memory", query="asks", key="k_proj", value="v_proj")(model).sites
