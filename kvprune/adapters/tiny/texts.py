"""Tiny models of families that read texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvprune.adapters.tiny.family import (
    BART,
    BERT,
    DECODER,
    SPECIAL,
    TOKENS,
    MakeBatch,
    TinyFamily,
    config_of,
    pair_of,
    texts,
)

__all__ = ["GPT2", "T5", "TINY_TEXTS", "seamless"]

T5: Mapping[str, Any] = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,  # stock transformers makes a cache of that many layers
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
}


def _bart(name: str, sdpa: bool = True, **changes: Any) -> TinyFamily:
    return TinyFamily(config_of(f"{name}Config", BART, **changes), texts, sdpa=sdpa)


def _t5(name: str, sdpa: bool = True, **changes: Any) -> TinyFamily:
    return TinyFamily(config_of(f"{name}Config", T5, **changes), texts, sdpa=sdpa)


GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_SEAMLESS: Mapping[str, Any] = {
    **BART,
    "hidden_size": 32,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "speech_encoder_layerdrop": 0.0,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 64,
    "feature_projection_input_dim": 8,
    "adaptor_stride": 2,
    "adaptor_kernel_size": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "conv_depthwise_kernel_size": 3,
}


def seamless(name: str, batch: MakeBatch) -> TinyFamily:
    """Return a tiny SeamlessM4T for a batch."""
    return TinyFamily(config_of(name, _SEAMLESS), batch)


def _t5gemma(transformers: Any) -> Any:
    options = {
        **DECODER,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        "layer_types": ["full_attention"] * 2,
        "attn_logit_softcapping": None,
    }
    encoder = transformers.T5GemmaModuleConfig(**options)
    decoder = transformers.T5GemmaModuleConfig(**options, is_decoder=True, cross_attention_hidden_size=32)
    return transformers.T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=64)


def _dia(transformers: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 64}
    encoder = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    decoder = {
        **sizes,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_num_attention_heads": 4,
        "cross_num_key_value_heads": 4,
        "cross_head_dim": 8,
        "cross_hidden_size": 32,
        "num_channels": 2,
    }
    return transformers.DiaConfig(
        encoder_config=encoder, decoder_config=decoder, delay_pattern=[0, 1], **SPECIAL
    )


def _musicgen(transformers: Any) -> Any:
    audio = {
        "hidden_size": 16,
        "num_filters": 4,
        "num_residual_layers": 1,
        "num_lstm_layers": 1,
        "upsampling_ratios": [4, 2],
        "codebook_size": 64,
        "codebook_dim": 16,
        "target_bandwidths": [60.0],  # two codebooks
    }
    decoder = {
        "vocab_size": 64,
        "pad_token_id": 64,  # beyond the vocabulary: `generate` removes it before the codes become sound
        "bos_token_id": 64,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_codebooks": 2,
    }
    return transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(**T5).to_dict(),
        audio_encoder=transformers.EncodecConfig(**audio).to_dict(),
        decoder=transformers.MusicgenDecoderConfig(**decoder).to_dict(),
    )


TINY_TEXTS: Mapping[str, TinyFamily] = {
    "BartForConditionalGeneration": _bart("Bart"),
    "T5ForConditionalGeneration": _t5("T5"),
    "MT5ForConditionalGeneration": _t5("MT5"),
    "UMT5ForConditionalGeneration": _t5("UMT5"),
    "LongT5ForConditionalGeneration": _t5("LongT5", sdpa=False, local_radius=4),
    "MBartForConditionalGeneration": _bart("MBart"),
    "M2M100ForConditionalGeneration": _bart("M2M100"),
    "MarianMTModel": _bart("Marian", decoder_vocab_size=64),
    "PegasusForConditionalGeneration": _bart("Pegasus"),
    "PegasusXForConditionalGeneration": _bart("PegasusX", sdpa=False, block_size=4, num_global_tokens=4),
    "BlenderbotForConditionalGeneration": _bart("Blenderbot"),
    "BlenderbotSmallForConditionalGeneration": _bart("BlenderbotSmall"),
    "PLBartForConditionalGeneration": _bart("PLBart"),
    "MvpForConditionalGeneration": _bart("Mvp", sdpa=False),
    "LEDForConditionalGeneration": _bart("LED", sdpa=False, attention_window=4),
    "EncoderDecoderModel": TinyFamily(
        pair_of("EncoderDecoderConfig", ("Bert", BERT), ("Bert", dict(BERT, is_decoder=True))), texts
    ),
    "EncoderDecoderModel of GPT-2": TinyFamily(
        pair_of("EncoderDecoderConfig", ("Bert", BERT), ("GPT2", GPT2)), texts
    ),
    "NllbMoeForConditionalGeneration": _bart(
        "NllbMoe", sdpa=False, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=2, expert_capacity=64
    ),
    "SwitchTransformersForConditionalGeneration": _t5(
        "SwitchTransformers",
        sdpa=False,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
    ),
    "SeamlessM4TForTextToText": seamless("SeamlessM4TConfig", texts),
    "SeamlessM4Tv2ForTextToText": seamless("SeamlessM4Tv2Config", texts),
    "T5GemmaForConditionalGeneration": TinyFamily(_t5gemma, texts, sdpa=False),
    "BigBirdPegasusForConditionalGeneration": _bart(
        "BigBirdPegasus", sdpa=False, attention_type="original_full"
    ),
    "DiaForConditionalGeneration": TinyFamily(_dia, texts, beams=False),
    "MusicgenForConditionalGeneration": TinyFamily(
        _musicgen, texts, beams=False, sdpa=False, settings={"pad_token_id": 64, "guidance_scale": 3.0}
    ),
    "ProphetNetForConditionalGeneration": TinyFamily(
        lambda transformers: transformers.ProphetNetConfig(
            hidden_size=32,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            max_position_embeddings=64,
            decoder_start_token_id=3,
            **TOKENS,
        ),
        texts,
        sdpa=False,
    ),
}
