"""Model classes without an adapter are refused with the reason, and every class of transformers is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from caching_classes import caching_classes
from decoder_pairs import STOCK_FAILS
from family_checks import installed, modules_of_tiny_models

import kvprune
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.refused import REFUSED, why_refused
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.adapters.tiny.family import BART, BERT, DECODER, TOKENS, TinyFamily, pair_of, texts
from kvprune.adapters.tiny.texts import GPT2
from kvprune.errors import UnsupportedModelError
from kvprune.session.registry import load

SUPPORTED = {name for adapter in FAMILIES for name in adapter.model_classes}
ABSTRACT = {"BartPretrainedModel", "PretrainedBartModel"}
"""Base classes of which nobody has an instance."""

SMALL = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "prediction_length": 4}
SERIES = {**SMALL, "context_length": 4, "lags_sequence": [1], "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
XLM = {"vocab_size": 64, "n_vocab": 64, "emb_dim": 32, "n_layers": 1, "n_heads": 4}
GEMMA = {
    **DECODER,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["full_attention"] * 2,
}
SPEECHT5 = {
    "vocab_size": 64,
    "hidden_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_mel_bins": 8,
    "speech_decoder_prenet_units": 16,
    "speech_decoder_postnet_units": 16,
    "speaker_embedding_dim": 8,
}
VISION = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
IDEFICS = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KOSMOS = {"vocab_size": 64, "embed_dim": 32, "layers": 1, "ffn_dim": 64, "attention_heads": 4}


def configured(name: str, **options: Any) -> Any:
    """Return a function that makes a config."""
    return lambda: getattr(transformers, name)(**options)


def musicgen_melody() -> Any:
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 1}
    audio = {"hidden_size": 16, "num_filters": 4, "num_residual_layers": 1, "codebook_dim": 16}
    decoder = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.MusicgenMelodyConfig(
        text_encoder=transformers.T5Config(**t5).to_dict(),
        audio_encoder=transformers.EncodecConfig(**audio).to_dict(),
        decoder=transformers.MusicgenMelodyDecoderConfig(**decoder, ffn_dim=64).to_dict(),
    )


def t5gemma2() -> Any:
    vision = {**VISION, "model_type": "siglip_vision_model"}
    text = {**GEMMA, "sliding_window": 64}
    return transformers.T5Gemma2Config(
        encoder={"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4},
        decoder=text,
        image_token_index=61,
        vocab_size=64,
    )


def seamless() -> Any:
    config = TINY_FAMILIES["SeamlessM4TForTextToText"].config(transformers)
    for part in ("encoder", "decoder"):
        setattr(config, f"t2u_{part}_layers", 1)
        setattr(config, f"t2u_{part}_ffn_dim", 64)
        setattr(config, f"t2u_{part}_attention_heads", 4)
    return config


def rag() -> Any:
    question = transformers.DPRConfig(**BERT)
    generator = transformers.BartConfig(**BART)
    return transformers.RagConfig(question_encoder=question.to_dict(), generator=generator.to_dict())


TINY: dict[str, tuple[Any, str]] = {
    "FSMTForConditionalGeneration": (
        configured(
            "FSMTConfig",
            langs=["en", "de"],
            src_vocab_size=64,
            tgt_vocab_size=64,
            **{key: BART[key] for key in BART if key not in ("vocab_size", "forced_bos_token_id")},
        ),
        "puts time before the batch",
    ),
    "T5Gemma2ForConditionalGeneration": (t5gemma2, "in one softmax; T5Gemma is supported"),
    "MusicgenMelodyForConditionalGeneration": (musicgen_melody, "no cross-attention.*MusicGen is supported"),
    "SpeechT5ForSpeechToText": (configured("SpeechT5Config", **SPEECHT5), "takes input_values"),
    "SpeechT5ForTextToSpeech": (configured("SpeechT5Config", **SPEECHT5), "takes input_values"),
    "SeamlessM4TForTextToSpeech": (seamless, "decodes twice.*ForTextToText"),
    "TimeSeriesTransformerForPrediction": (
        configured("TimeSeriesTransformerConfig", **SERIES),
        "forecasts numbers",
    ),
    "AutoformerForPrediction": (configured("AutoformerConfig", **SERIES), "forecasts numbers"),
    "InformerForPrediction": (configured("InformerConfig", **SERIES), "forecasts numbers"),
    "DecisionTransformerModel": (
        configured("DecisionTransformerConfig", hidden_size=32, n_layer=1, n_head=4),
        "predicts actions",
    ),
    "FlaubertWithLMHeadModel": (configured("FlaubertConfig", **XLM), "without encoder states"),
    "XLMWithLMHeadModel": (configured("XLMConfig", **XLM), "without encoder states"),
    "Kosmos2ForConditionalGeneration": (
        configured("Kosmos2Config", text_config=KOSMOS, vision_config=VISION, latent_query_num=4),
        "without cross-attention",
    ),
    "IdeficsForVisionText2Text": (
        configured(
            "IdeficsConfig", **IDEFICS, vision_config=VISION, use_resampler=False, cross_layer_interval=1
        ),
        "projects the picture again at each step",
    ),
    "RagSequenceForGeneration": (rag, "retrieved documents.*compress the other model"),
    "XGLMForCausalLM": (
        configured("XGLMConfig", vocab_size=64, d_model=32, num_layers=1, attention_heads=4, ffn_dim=64),
        "decoder alone",
    ),
    "BartForCausalLM": (configured("BartConfig", **BART), "decoder alone"),
    "TrOCRForCausalLM": (
        configured("TrOCRConfig", vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=4),
        "decoder alone",
    ),
    "BertLMHeadModel": (configured("BertConfig", **BERT, is_decoder=True), "decoder alone"),
    "T5EncoderModel": (
        configured("T5Config", vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=1),
        "encoder alone",
    ),
    "BartForSequenceClassification": (configured("BartConfig", **BART), "generates nothing"),
    "LlamaForCausalLM": (configured("LlamaConfig", **DECODER), "decoder alone"),
}
"""Classes that are refused: how a config is made, and what the error says."""


@pytest.mark.parametrize("name", installed(TINY))
def test_a_tiny_model_is_refused_with_the_reason(name: str) -> None:
    make, says = TINY[name]
    model = getattr(transformers, name)(make()).eval()
    with pytest.raises(UnsupportedModelError, match=rf"^no adapter supports {name}: .*{says}.*; supported: "):
        kvprune.compress(model, "trim")


def classes() -> list[str]:
    """Return all public classes that lead to an EncoderDecoderCache and have no adapter."""
    found = {name for users in caching_classes().values() for name in users}
    return sorted(found - SUPPORTED - ABSTRACT)


def test_every_class_without_an_adapter_says_why() -> None:
    silent, registry = [], load()
    for name in classes():
        with pytest.raises(UnsupportedModelError) as error:  # the name of the class alone decides
            registry.adapter_for(type(name, (), {})())
        if not str(error.value).startswith(f"no adapter supports {name}: "):
            silent.append(name)
    assert not silent, "declare an adapter for these classes, or say in refused.py why there is none"


def test_no_supported_class_is_said_to_be_refused() -> None:
    assert [name for name in SUPPORTED if why_refused(type(name, (), {})())] == []


def test_an_unknown_class_is_refused_without_a_reason() -> None:
    assert why_refused(object()) == ""
    with pytest.raises(UnsupportedModelError, match=r"^no adapter supports Stranger; supported: "):
        kvprune.compress(type("Stranger", (), {})(), "trim")  # type: ignore[arg-type]


@pytest.mark.parametrize("group", REFUSED, ids=lambda group: group.classes[:20])
def test_every_reason_belongs_to_a_class_of_transformers(group: Any) -> None:
    assert any(why_refused(type(name, (), {})()) == group.reason for name in dir(transformers))


def test_everything_that_builds_such_a_cache_is_known() -> None:
    """A new release of transformers shows here what it added."""
    tested = modules_of_tiny_models()
    unknown = {
        builder: users
        for builder, users in caching_classes().items()
        if builder not in tested
        and not any(builder.startswith(name) for name in STOCK_FAILS)
        and not any(map(why_specifically, (builder, *users)))
    }
    assert not unknown, (
        f"transformers {transformers.__version__} builds an EncoderDecoderCache in these classes, of which "
        "kvprune knows nothing: declare an adapter, or say in refused.py why there is none"
    )


@pytest.mark.parametrize("decoder", STOCK_FAILS)
def test_transformers_itself_cannot_generate_with_a_decoder(decoder: str) -> None:
    options = {**BERT, "is_decoder": True}
    if decoder == "GPTBigCode":
        options = {**GPT2}
    pair = pair_of("EncoderDecoderConfig", ("Bert", BERT), (decoder, options))
    inputs = texts(torch.float32, True)
    with pytest.raises((RuntimeError, ValueError, AttributeError, NotImplementedError)):
        TinyFamily(pair, texts).model("EncoderDecoderModel", attn_implementation="eager").generate(**inputs)


def why_specifically(name: str) -> str:
    """Return the reason for a class of that name, unless it is one that any class ending so has."""
    reason = why_refused(type(name, (), {})())
    return "" if reason in {group.reason for group in REFUSED if group.classes.startswith(".*")} else reason


def test_a_pipeline_is_refused_with_the_model_that_it_holds() -> None:
    pipe = transformers.AudioClassificationPipeline.__new__(transformers.AudioClassificationPipeline)
    pipe.model = torch.nn.Linear(1, 1)
    right = r"Pipeline: that is no model, but holds a Linear; pass its attribute model \(pipe\.model\)"
    with pytest.raises(UnsupportedModelError, match=right):
        kvprune.compress(pipe, "trim")


def test_the_name_of_a_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="name of a model; load it with transformers first"):
        kvprune.compress("openai/whisper-base", "trim")  # type: ignore[arg-type]
