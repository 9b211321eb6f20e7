"""What adapters show of the text, against the attention of the untouched model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
import transformers
from families import inputs_of, model_of
from generation import generate, mllama
from transformers import DynamicCache

import kvprune
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.families.texts import EncoderDecoderModelAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.adapters.tiny.family import BERT, pair_of
from kvprune.adapters.tiny.models import random_model
from kvprune.errors import UnsupportedCacheError, UnsupportedModelError
from kvprune.session.compression import Compression
from kvprune.testing import mllama_inputs, tiny_mllama
from kvprune.testing.conformance.models.forward_calls import forward

SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class Reader(kvprune.CrossKVPolicy):
    """Notes each view and decides nothing."""

    name = "reader"

    @property
    def needs(self):
        return frozenset({"text"})

    def select(self, view):
        SEEN.append(view)
        return kvprune.Decision()


@pytest.fixture
def seen():
    SEEN.clear()
    yield SEEN
    SEEN.clear()


def self_attention_of(model):
    """The modules of the decoder that attend to the text, by layer index."""
    paths = re.compile(r"decoder.*(layers|layer|h)\.\d+\.(self_attn|attention\.self|attn)$")
    found = [module for path, module in model.named_modules() if paths.search(path)]
    return dict(enumerate(found))


def attention_of(model, run):
    """Self-attention weights of the untouched model by layer, while a function runs."""
    weights, handles = {}, []
    if model.config.is_encoder_decoder or not hasattr(getattr(model, "model", None), "language_model"):
        modules = self_attention_of(model)
    else:
        layers = model.model.language_model.layers
        modules = {i: layer.self_attn for i, layer in enumerate(layers) if hasattr(layer, "self_attn")}
    for layer_idx, module in modules.items():

        def note(module, args, output, layer_idx=layer_idx):
            weights[layer_idx] = output[1]

        handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return weights


def require_attention(views, weights, copies=1):
    """Each view gives the model's own attention, row by row, and knows what is padding."""
    for view in views:
        truth = weights[view.text.layer_idx][::copies]
        rows = torch.arange(view.text.rows).expand(view.batch, -1)
        got = view.text.attention_of(rows)
        assert got.shape == truth.shape
        real = view.text.real_rows[:, None, :, None]
        assert torch.where(real, got - truth, 0).abs().max() <= 1e-5


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", ["Mllama", "BART", "Whisper"])
def test_text_gives_the_models_attention(family, cached, seen):
    model, inputs = model_of(family, torch.float32, "eager"), inputs_of(family, dtype=torch.float32)
    if family != "Mllama":
        ids = torch.randint(4, 60, (3, 5), generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
        inputs = {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    weights = attention_of(model, lambda: model(**inputs, use_cache=cached))
    with kvprune.compress(model, Reader()), torch.no_grad():
        model(**inputs, use_cache=cached)
    require_attention(seen, weights)
    expected = {"Mllama": [0, 2, 4]}.get(family, [0, 1, 2])
    assert [view.text.layer_idx for view in seen] == expected
    assert [view.text.rank for view in seen] == ([0, 1, 2])
    assert seen[0].text.num_layers == {"Mllama": 4}.get(family, 3)
    assert not model.training
    if family == "Mllama":
        assert (seen[0].text.real == inputs["attention_mask"].bool()).all()


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (one, name)
        for one in FAMILIES
        if "text" in one.provides
        for name in TINY_FAMILIES
        if name.split()[0] in one.model_classes
    ],
)
def test_text_of_declared_families_is_the_models_attention(adapter, name, seen):
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    require_text(adapter, model, inputs, seen, cached=True)
    require_text(adapter, model, inputs, seen, cached=False)


def require_text(adapter, model, inputs, seen, *, cached):
    """What a policy sees of padded texts is the model's attention."""
    ids = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    names = ("input_ids", "attention_mask") if "Blip" in type(model).__name__ else DECODER_TEXT
    inputs = {**inputs, names[0]: ids, names[1]: mask, "output_attentions": True}
    weights = attention_of(model, lambda: model(**inputs, use_cache=cached))
    if any(weight.isnan().any() for weight in weights.values()):  # stock 5.17, where sounds are padded
        del inputs["attention_mask"]
        weights = attention_of(model, lambda: model(**inputs, use_cache=cached))
    seen.clear()
    with Compression(adapter(model), Reader(), seed=0), torch.no_grad():
        model(**inputs, use_cache=cached)
    require_attention(seen, weights)
    assert [view.text.layer_idx for view in seen] == [0, 1]


DECODER_TEXT = "decoder_input_ids", "decoder_attention_mask"


def test_copies_of_a_sample_are_shown_once(seen):
    model, inputs = model_of("Mllama", torch.float32, "eager"), inputs_of("Mllama", dtype=torch.float32)
    weights = attention_of(model, lambda: model(**inputs))
    with kvprune.compress(model, Reader()):
        generate(model, inputs, steps=2, num_beams=3)
    assert len(seen) == 3
    assert seen[0].batch == seen[0].text.batch == 3
    require_attention(seen, weights)


def test_draft_tokens_are_not_shown(seen):
    model, inputs = model_of("Mllama", torch.float32, "eager"), mllama_inputs(("tt4tttt",))
    inputs["input_ids"][0, 3:] = torch.tensor([7, 8, 7, 8])
    weights = attention_of(model, lambda: model(**inputs))
    with kvprune.compress(model, Reader()):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, prompt_lookup_num_tokens=3)
    require_attention(seen, weights)
    assert seen[0].text.rows == seen[0].text.entries == 7


def test_a_later_turn_sees_earlier_text(seen):
    model = model_of("Mllama", torch.float32, "eager")
    whole = mllama_inputs(("tt4tt1tt", "t1tt2tt"))
    text = ("input_ids", "attention_mask", "cross_attention_mask")
    image = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {k: whole[k][:, :5] for k in text} | {k: whole[k][:, :1] for k in image}
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    second = {k: whole[k][:, 5:] if k == "input_ids" else whole[k] for k in text}
    second |= {k: whole[k][:, 1:] for k in image}

    def turns():
        cache = DynamicCache(config=model.config.text_config)
        model(**first, past_key_values=cache)
        SEEN.clear()
        model(**second, past_key_values=cache)

    weights = attention_of(model, turns)
    with kvprune.compress(model, Reader()), torch.no_grad():
        turns()
    assert (seen[0].text.rows, seen[0].text.entries) == (3, 8)
    assert seen[0].text.real.tolist() == whole["attention_mask"].bool().tolist()
    require_attention(seen, weights)


def test_the_first_layer_of_a_decoder_follows_no_text(seen):
    model = tiny_mllama(1, cross_layers=(0, 1, 3))
    with kvprune.compress(model, Reader()), torch.no_grad():
        model(**mllama_inputs(("t4tt",)))
    for view in seen[:2]:
        with pytest.raises(UnsupportedModelError, match="first of the decoder"):
            view.text  # noqa: B018
    assert seen[2].text.layer_idx == 2


def test_hooks_are_gone_after_prefill(seen):
    model, inputs = mllama(), mllama_inputs(("tt4tt",))
    with kvprune.compress(model, Reader()), torch.no_grad():
        model(**inputs)
        for module in model.modules():
            assert not any("TextCapture" in repr(hook) for hook in module._forward_hooks.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_text_that_cannot_be_read_is_refused(seen):
    model, inputs = mllama(), mllama_inputs(("tt4tt",))
    with kvprune.compress(model, Reader()), torch.no_grad():
        everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
        with pytest.raises(UnsupportedCacheError, match="must be causal"):
            model(**{**inputs, "attention_mask": everything})
        window = everything.tril() & everything.triu(-2)
        with pytest.raises(UnsupportedCacheError, match="must be causal"):
            model(**{**inputs, "attention_mask": window})
        model(**{**inputs, "attention_mask": everything.tril()})
    assert seen[-1].text.real.all()


def test_a_static_cache_is_read_as_far_as_it_is_filled(seen):
    model, inputs = model_of("BART", torch.float32, "eager"), inputs_of("BART", dtype=torch.float32)
    weights = attention_of(model, lambda: forward(model, inputs))
    with kvprune.compress(model, Reader()):
        generate(model, inputs, steps=3, cache_implementation="static")
    require_attention(seen, weights)


def test_an_adapter_that_does_not_provide_is_refused_at_once():
    class Plain(MllamaAdapter):
        provides = frozenset({"queries"})

    with pytest.raises(
        UnsupportedModelError, match=r"'reader' needs 'text', which the .*\(it provides 'queries'\)"
    ):
        Compression(Plain(mllama()), Reader(), 0)
    assert isinstance(Compression(MllamaAdapter(mllama()), Reader(), 0).policy, Reader)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Roberta", {}),
        ("RobertaPreLayerNorm", {}),
        ("XLMRoberta", {}),
        ("XLMRobertaXL", {}),
        ("Camembert", {}),
        ("Electra", {"embedding_size": 32}),
        ("Ernie", {}),
        ("Data2VecText", {}),
        pytest.param(
            "RemBert",
            {"input_embedding_size": 32, "output_embedding_size": 32},
            marks=pytest.mark.skipif(
                tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
                reason="stock attends to later tokens",
            ),
        ),
        ("BertGeneration", {}),
        ("Xmod", {"default_language": "en_XX"}),
    ],
)
def test_text_of_decoders_like_bert_is_the_models_attention(kind, changes, seen):
    decoder = {**BERT, "is_decoder": True, "add_cross_attention": True, **changes}
    made = pair_of("EncoderDecoderConfig", ("Bert", BERT), (kind, decoder))
    model = random_model(transformers.EncoderDecoderModel, made(transformers), 0, torch.float32, "eager")
    inputs = TINY_FAMILIES["EncoderDecoderModel"].batch(torch.float32, True)
    require_text(EncoderDecoderModelAdapter, model, inputs, seen, cached=True)


def test_a_self_attention_that_reads_encoder_states_is_refused(seen):
    decoder = {**BERT, "is_decoder": True, "add_cross_attention": True, "attention_type": "original_full"}
    made = pair_of("EncoderDecoderConfig", ("Bert", BERT), ("BigBird", decoder))
    model = random_model(transformers.EncoderDecoderModel, made(transformers), 0, torch.float32, "eager")
    inputs = TINY_FAMILIES["EncoderDecoderModel"].batch(torch.float32, True)
    with (
        kvprune.compress(model, Reader()),
        pytest.raises(UnsupportedModelError, match=r"BigBirdSelfAttention of layer 0, .* encoder states"),
    ):
        model(**inputs, decoder_input_ids=torch.full((2, 12), 5))


def test_a_decoder_whose_rotation_is_not_known_is_refused_on_entry(seen):
    decoder = {**BERT, "is_decoder": True, "add_cross_attention": True, "embedding_size": 32}
    made = pair_of("EncoderDecoderConfig", ("Bert", BERT), ("RoFormer", decoder))
    model = random_model(transformers.EncoderDecoderModel, made(transformers), 0, torch.float32, "eager")
    with (
        pytest.raises(
            UnsupportedModelError, match=r"RoFormerSelfAttention in layer 0 .* takes sinusoidal_pos"
        ),
        kvprune.compress(model, Reader()),
    ):
        pass
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("adapter", FAMILIES)
def test_each_family_shows_its_text_or_says_why_not(adapter):
    if "text" in adapter.provides:
        assert "text" not in adapter.lacks
        return
    with pytest.raises(UnsupportedModelError, match=f"because {adapter.lacks['text']}"):
        adapter.require_needs(Reader())


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("sliding_window", 4, "sees a window of the text only"),
        ("attn_logit_softcapping", 50.0, "caps attention logits"),
        ("q_norm", torch.nn.LayerNorm(8), "normalizes queries"),
    ],
)
def test_attention_that_queries_and_keys_do_not_tell_is_refused(attribute, value, reason):
    model = TINY_FAMILIES["MBartForConditionalGeneration"].model("MBartForConditionalGeneration")
    setattr(model.model.decoder.layers[1].self_attn, attribute, value)
    with pytest.raises(UnsupportedModelError, match=reason), kvprune.compress(model, Reader()):
        pass


def test_a_layer_without_self_attention_is_refused():
    class Odd(EncoderDecoderModelAdapter):
        self_attention = "nothing.here"

    model = TINY_FAMILIES["EncoderDecoderModel"].model("EncoderDecoderModel")
    with (
        pytest.raises(UnsupportedModelError, match="has no self-attention that is known"),
        Compression(Odd(model), Reader(), 0),
    ):
        pass
