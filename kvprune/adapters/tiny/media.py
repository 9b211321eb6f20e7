"""Tiny models of families that read speech or pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvprune.adapters.tiny.family import (
    BART,
    BERT,
    DECODER,
    TOKENS,
    Batch,
    TinyFamily,
    config_of,
    draws,
    pair_of,
    pictures,
    sounds,
    texts,
    with_padding,
)
from kvprune.adapters.tiny.texts import GPT2, T5, seamless

__all__ = ["TINY_PICTURES", "TINY_SPEECH"]

_VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
_TROCR = {
    "vocab_size": 64,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_MBART_DECODER = {
    **BART,
    "encoder_layers": 2,
    "is_decoder": True,
    "add_cross_attention": True,
    "scale_embedding": True,
}
_PARAKEET = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
}


def _florence(transformers: Any) -> Any:
    text = dict(BART, model_type="bart")
    vision = {
        "depths": [1],
        "patch_size": [4],
        "patch_stride": [4],
        "patch_padding": [0],
        "patch_prenorm": [False],
        "embed_dim": [32],
        "num_heads": [4],
        "num_groups": [4],
        "window_size": 4,
        "projection_dim": 32,
        "max_temporal_embeddings": 4,
        "max_position_embeddings": 8,
    }
    return transformers.Florence2Config(text_config=text, vision_config=vision, image_token_id=61)


def _picture_texts(dtype: torch.dtype, padded: bool) -> Batch:
    """Two pictures of 16 patches and their mean, each followed by a text."""
    batch = texts(dtype, padded)
    image = torch.full((2, 17), 61)
    batch["input_ids"] = torch.cat([image, batch["input_ids"]], dim=1)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.cat([torch.ones_like(image), batch["attention_mask"]], dim=1)
    return {**batch, **pictures(dtype, padded)}


def _pix2struct(transformers: Any) -> Any:
    sizes = {"hidden_size": 32, "d_kv": 8, "d_ff": 64}
    text = {
        **sizes,
        "vocab_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "use_cache": True,
    }
    vision = {**sizes, "patch_embed_hidden_size": 14, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.Pix2StructConfig(text_config=text, vision_config={**vision, "seq_len": 64})


def _patches(dtype: torch.dtype, padded: bool) -> Batch:
    """Twelve flattened patches of each of two pages: row, column and pixels."""
    patches = draws(2, 12, 16, dtype=dtype)
    places = torch.arange(1, 13)
    patches[..., 0], patches[..., 1] = (places + 3) // 4, (places - 1) % 4 + 1
    return with_padding(patches, 8, "flattened_patches", ones=12, padded=padded)


def _vision(decoder: str, options: Mapping[str, Any], sdpa: bool = True) -> TinyFamily:
    pair = pair_of("VisionEncoderDecoderConfig", ("ViT", _VIT), (decoder, options))
    return TinyFamily(pair, pictures, pads=False, sdpa=sdpa)


def _documents(dtype: torch.dtype, padded: bool) -> Batch:
    """Two pages of 16 patches, with the texts on them and their boxes."""
    batch = texts(dtype, padded)
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))  # its encoder needs one
    corners = draws(2, 12, 2, dtype=torch.float64).abs().clamp(max=2) / 4  # [2, 12, 2], left and top
    boxes = torch.cat([corners, corners + 0.2], dim=-1).to(dtype)
    return {**batch, "bbox": boxes, **pictures(dtype, padded)}


def _formulas(transformers: Any) -> Any:
    text = {**BART, "model_type": "pp_formulanet_text"}
    vision = {
        "model_type": "pp_formulanet_vision",
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 1,
        "window_size": 4,
        "global_attn_indexes": [0],
        "mlp_dim": 64,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 32,
        "decoder_hidden_size": 32,
    }
    return transformers.PPFormulaNetConfig(text_config=text, vision_config=vision)


def _blip(transformers: Any) -> Any:
    text = {**BERT, "encoder_hidden_size": 32, "sep_token_id": 2}
    return transformers.BlipConfig(text_config=text, vision_config=dict(_VIT))


_WAV2VEC2: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


TINY_SPEECH: Mapping[str, TinyFamily] = {
    "WhisperForConditionalGeneration": TinyFamily(
        config_of(
            "WhisperConfig",
            {**BART, "suppress_tokens": None, "begin_suppress_tokens": None},
            num_mel_bins=8,
            max_source_positions=50,
            max_target_positions=64,
        ),
        sounds("input_features", 8, 100, real=8),
        pads=False,
    ),
    "MoonshineForConditionalGeneration": TinyFamily(
        config_of(
            "MoonshineConfig",
            TOKENS,
            hidden_size=32,
            intermediate_size=64,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            decoder_start_token_id=3,
        ),
        sounds("input_values", 5000, real=3000),
    ),
    "Speech2TextForConditionalGeneration": TinyFamily(
        config_of(
            "Speech2TextConfig",
            BART,
            max_source_positions=100,
            max_target_positions=64,
            input_feat_per_channel=8,
            conv_channels=16,
        ),
        sounds("input_features", 40, 8, real=24),
        sdpa=False,
    ),
    "CanaryForConditionalGeneration": TinyFamily(
        lambda transformers: transformers.CanaryConfig(
            encoder_config=dict(_PARAKEET, model_type="parakeet_encoder"),
            decoder_config=dict(DECODER, model_type="canary_decoder", head_dim=8),
            decoder_start_token_id=3,
            **TOKENS,
        ),
        sounds("input_features", 96, 16, real=64),
    ),
    "CohereAsrForConditionalGeneration": TinyFamily(
        lambda transformers: transformers.CohereAsrConfig(
            encoder_config=dict(_PARAKEET, model_type="parakeet_encoder"),
            decoder_start_token_id=3,
            head_dim=8,
            **DECODER,
        ),
        sounds("input_features", 96, 16, real=64),
    ),
    "SeamlessM4TForSpeechToText": seamless("SeamlessM4TConfig", sounds("input_features", 40, 8, real=24)),
    "SeamlessM4Tv2ForSpeechToText": seamless("SeamlessM4Tv2Config", sounds("input_features", 40, 8, real=24)),
    "MoonshineStreamingForConditionalGeneration": TinyFamily(
        lambda transformers: transformers.MoonshineStreamingConfig(
            encoder_config={
                "model_type": "moonshine_streaming_encoder",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "sliding_windows": [[8, 2]],
            },
            decoder_start_token_id=3,
            head_dim=8,
            **{**DECODER, "num_key_value_heads": 4},
        ),
        sounds("input_values", 3200, real=1920),
    ),
    "Pop2PianoForConditionalGeneration": TinyFamily(
        config_of("Pop2PianoConfig", T5, composer_vocab_size=1),
        sounds("input_features", 12, 32, real=8),
        settings={"composer_to_feature_token": {"composer1": 60}},
    ),
    "SpeechEncoderDecoderModel": TinyFamily(
        pair_of("SpeechEncoderDecoderConfig", ("Wav2Vec2", _WAV2VEC2), ("MBart", _MBART_DECODER)),
        sounds("input_values", 400, real=240),
    ),
}

TINY_PICTURES: Mapping[str, TinyFamily] = {
    "VisionEncoderDecoderModel": _vision("TrOCR", _TROCR, sdpa=False),
    "Florence2ForConditionalGeneration": TinyFamily(_florence, _picture_texts),
    "Pix2StructForConditionalGeneration": TinyFamily(_pix2struct, _patches),
    "VisionEncoderDecoderModel of mBART": _vision("MBart", _MBART_DECODER),
    "VisionEncoderDecoderModel of GPT-2": _vision("GPT2", GPT2),
    "UdopForConditionalGeneration": TinyFamily(
        config_of("UdopConfig", T5, image_size=16, patch_size=4), _documents
    ),
    "PPFormulaNetForConditionalGeneration": TinyFamily(_formulas, pictures, pads=False),
    "BlipForConditionalGeneration": TinyFamily(_blip, pictures, pads=False, sdpa=False),
}
