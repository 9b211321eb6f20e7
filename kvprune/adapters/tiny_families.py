"""Tiny random models of the declared families, and a batch for each; they are built when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.tiny import Example, random_model

__all__ = ["TINY_FAMILIES", "TinyFamily"]

Batch = dict[str, Tensor]
MakeBatch = Callable[[torch.dtype, bool], Batch]
MakeConfig = Callable[[Any], Any]


@dataclass(frozen=True)
class TinyFamily:
    """How to make a tiny model of one class of transformers, and a batch for it.

    Args:
        config: Returns the model's config, given the module ``transformers``.
        batch: Returns two samples of a dtype, the second one padded if asked.
        pads: Whether the encoder knows padding.
        beams: Whether stock transformers can search with beams.
        sdpa: Whether stock transformers has SDPA for it.
    """

    config: MakeConfig
    batch: MakeBatch
    pads: bool = True
    beams: bool = True
    sdpa: bool = True

    def model(
        self, name: str, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa", seed: int = 0
    ) -> Any:
        """Return a random model in eval mode.

        Args:
            name: Name of its class in transformers.
            dtype: Dtype of its weights.
            attn_implementation: "sdpa" or "eager".
            seed: Seed of its weights.
        """
        import transformers  # slow to import its models

        config = self.config(transformers)
        model = random_model(getattr(transformers, name), config, seed, dtype, attn_implementation)
        with torch.no_grad():
            for place, parameter in enumerate(model.parameters()):
                if parameter.ndim == 1 and not parameter.any():  # a bias that would change nothing
                    parameter.copy_(_draws(len(parameter), dtype=dtype, seed=place) / 8)
        return model

    def example(self, name: str, dtype: torch.dtype) -> Example:
        """Return a model and a batch."""
        return self.model(name, dtype, "sdpa" if self.sdpa else "eager"), self.batch(dtype, True)


def _draws(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _hidden(values: Tensor, real: int, name: str, *, ones: int, padded: bool) -> Batch:
    """Return values ``[2, N, ...]`` whose second row ends with padding, with a mask ``[2, ones]``."""
    if not padded:
        return {name: values}
    mask = torch.ones(2, ones, dtype=torch.long)
    mask[1, real:] = 0
    shape = mask.shape + (1,) * (values.ndim - 2)
    return {name: values * mask.view(shape).to(values.dtype), "attention_mask": mask}


def _texts(dtype: torch.dtype, padded: bool) -> Batch:
    """Two texts of 12 tokens."""
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return _hidden(ids, 8, "input_ids", ones=12, padded=padded)


def _pictures(dtype: torch.dtype, padded: bool) -> Batch:
    """Two pictures of 16 x 16."""
    return {"pixel_values": _draws(2, 3, 16, 16, dtype=dtype)}


def _sounds(name: str, *shape: int, real: int) -> MakeBatch:
    """Two sounds: waves ``[2, N]`` or features ``[2, N, C]``."""

    def batch(dtype: torch.dtype, padded: bool) -> Batch:
        return _hidden(_draws(2, *shape, dtype=dtype), real, name, ones=shape[0], padded=padded)

    return batch


_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_START = {"decoder_start_token_id": 3, "forced_eos_token_id": None, "forced_bos_token_id": None}
_BART: Mapping[str, Any] = {
    **_TOKENS,
    **_START,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_T5: Mapping[str, Any] = {
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
_BERT: Mapping[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_VIT: Mapping[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


def _of(name: str, options: Mapping[str, Any], **changes: Any) -> MakeConfig:
    return lambda transformers: getattr(transformers, name)(**{**options, **changes})


def _bart(name: str, sdpa: bool = True, **changes: Any) -> TinyFamily:
    return TinyFamily(_of(f"{name}Config", _BART, **changes), _texts, sdpa=sdpa)


def _t5(name: str, sdpa: bool = True, **changes: Any) -> TinyFamily:
    return TinyFamily(_of(f"{name}Config", _T5, **changes), _texts, sdpa=sdpa)


_Part = tuple[str, Mapping[str, Any]]


def _pair(kind: str, encoder: _Part, decoder: _Part) -> MakeConfig:
    """Return how to make the config of two models, of which the second attends to the first."""

    def config(transformers: Any) -> Any:
        parts = [getattr(transformers, f"{name}Config")(**options) for name, options in (encoder, decoder)]
        made = getattr(transformers, kind).from_encoder_decoder_configs(*parts)
        made.decoder_start_token_id, made.pad_token_id = 3, 0
        return made

    return config


_TROCR = {
    "vocab_size": 64,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MBART_DECODER = {**_BART, "is_decoder": True, "add_cross_attention": True, "scale_embedding": True}
_PARAKEET = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
}
_DECODER = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_SEAMLESS: Mapping[str, Any] = {
    **_BART,
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


def _seamless(name: str, batch: MakeBatch) -> TinyFamily:
    return TinyFamily(_of(name, _SEAMLESS), batch)


def _florence(transformers: Any) -> Any:
    text = dict(_BART, model_type="bart")
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
    texts = _texts(dtype, padded)
    image = torch.full((2, 17), 61)
    texts["input_ids"] = torch.cat([image, texts["input_ids"]], dim=1)
    if "attention_mask" in texts:
        texts["attention_mask"] = torch.cat([torch.ones_like(image), texts["attention_mask"]], dim=1)
    return {**texts, **_pictures(dtype, padded)}


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
    patches = _draws(2, 12, 16, dtype=dtype)
    places = torch.arange(1, 13)
    patches[..., 0], patches[..., 1] = (places + 3) // 4, (places - 1) % 4 + 1
    return _hidden(patches, 8, "flattened_patches", ones=12, padded=padded)


def _vision(decoder: str, options: Mapping[str, Any], sdpa: bool = True) -> TinyFamily:
    pair = _pair("VisionEncoderDecoderConfig", ("ViT", _VIT), (decoder, options))
    return TinyFamily(pair, _pictures, pads=False, sdpa=sdpa)


TINY_FAMILIES: Mapping[str, TinyFamily] = {
    # Text to text.
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
    # Speech to text.
    "MoonshineForConditionalGeneration": TinyFamily(
        _of(
            "MoonshineConfig",
            _TOKENS,
            hidden_size=32,
            intermediate_size=64,
            encoder_num_hidden_layers=1,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            decoder_start_token_id=3,
        ),
        _sounds("input_values", 5000, real=3000),
    ),
    "Speech2TextForConditionalGeneration": TinyFamily(
        _of(
            "Speech2TextConfig",
            _BART,
            max_source_positions=100,
            max_target_positions=64,
            input_feat_per_channel=8,
            conv_channels=16,
        ),
        _sounds("input_features", 40, 8, real=24),
        sdpa=False,
    ),
    "CanaryForConditionalGeneration": TinyFamily(
        lambda transformers: transformers.CanaryConfig(
            encoder_config=dict(_PARAKEET, model_type="parakeet_encoder"),
            decoder_config=dict(_DECODER, model_type="canary_decoder", head_dim=8),
            decoder_start_token_id=3,
            **_TOKENS,
        ),
        _sounds("input_features", 96, 16, real=64),
    ),
    "CohereAsrForConditionalGeneration": TinyFamily(
        lambda transformers: transformers.CohereAsrConfig(
            encoder_config=dict(_PARAKEET, model_type="parakeet_encoder"),
            decoder_start_token_id=3,
            head_dim=8,
            **_DECODER,
        ),
        _sounds("input_features", 96, 16, real=64),
    ),
    # Pictures to text.
    "VisionEncoderDecoderModel": _vision("TrOCR", _TROCR, sdpa=False),
    "Florence2ForConditionalGeneration": TinyFamily(_florence, _picture_texts),
    "Pix2StructForConditionalGeneration": TinyFamily(_pix2struct, _patches),
    "EncoderDecoderModel": TinyFamily(
        _pair("EncoderDecoderConfig", ("Bert", _BERT), ("Bert", dict(_BERT, is_decoder=True))), _texts
    ),
}
