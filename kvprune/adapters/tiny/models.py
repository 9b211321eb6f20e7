"""Tiny random models of real transformers classes, and inputs for them, built offline in milliseconds.

Their weights are drawn by `enliven`. Transformers initializes both gates of an Mllama cross-attention layer
to zero, so a freshly initialized model ignores its image, and a test on it would not notice most mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["enliven", "mllama_inputs", "tiny_bart", "tiny_mllama", "tiny_whisper"]

IMAGE_TOKEN = 60
PAD_TOKEN = 0
_IMAGE_SIZE, _PATCH_SIZE, _TILES = 28, 14, 4
# Aspect ratio ids of images of 1, 2, 3 and 4 tiles (see supported_aspect_ratios in the config).
_ASPECT_RATIO_ID = {1: 1, 2: 2, 3: 3, 4: 6}


def tiny_mllama(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    cross_layers: Sequence[int] = (1, 3, 5),
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> Any:
    """Return a random ``MllamaForConditionalGeneration`` with 20 columns per image, in eval mode."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    vision = MllamaVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=32,
        vision_output_dim=32,
        image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
        max_num_tiles=_TILES,
        intermediate_layers_indices=[1],
    )
    text = MllamaTextConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=max(cross_layers) + 2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=64,
        cross_attention_layers=list(cross_layers),
        max_position_embeddings=512,
        pad_token_id=PAD_TOKEN,
        bos_token_id=1,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return random_model(MllamaForConditionalGeneration, config, seed, dtype, attn_implementation)


def mllama_inputs(
    layouts: Sequence[str], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the inputs that a processor would make for conversations described by strings.

    Args:
        layouts: One string per sample: ``t`` is a text token, a digit is an image of that many tiles. For
            example, ``"tt4ttt"`` is a header, a four-tile image and a question; ``"tttt"`` has no image.
            Shorter samples are padded on the left.
        seed: Seed for token ids and pixels.
        dtype: Dtype of the pixels.
    """
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    random = torch.Generator().manual_seed(seed)
    length = max(len(layout) for layout in layouts)
    ids = torch.full((len(layouts), length), PAD_TOKEN)
    tiles: list[list[int]] = []
    for sample, layout in enumerate(layouts):
        tokens = [
            IMAGE_TOKEN if letter.isdigit() else int(torch.randint(2, 59, (), generator=random))
            for letter in layout
        ]
        ids[sample, length - len(tokens) :] = torch.tensor(tokens)
        tiles.append([int(letter) for letter in layout if letter.isdigit()])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD_TOKEN).long()}
    images = max(len(sample) for sample in tiles)
    if images == 0:
        return inputs
    pixels = torch.zeros(len(layouts), images, _TILES, 3, _IMAGE_SIZE, _IMAGE_SIZE)
    ratio_ids = torch.zeros(len(layouts), images, dtype=torch.long)
    ratio_mask = torch.zeros(len(layouts), images, _TILES, dtype=torch.long)
    ratio_mask[..., 0] = 1
    for sample, counts in enumerate(tiles):
        for image, count in enumerate(counts):
            pixels[sample, image, :count] = torch.randn(count, 3, _IMAGE_SIZE, _IMAGE_SIZE, generator=random)
            ratio_ids[sample, image] = _ASPECT_RATIO_ID[count]
            ratio_mask[sample, image, :count] = 1
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(row, IMAGE_TOKEN) for row in ids.tolist()],
        num_tiles=tiles,
        max_num_tiles=_TILES,
        length=length,
    )
    return {
        **inputs,
        "pixel_values": pixels.to(dtype),
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": ratio_mask,
        "cross_attention_mask": torch.from_numpy(mask),
    }


def tiny_bart(seed: int = 0, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa") -> Any:
    """Return a random ``BartForConditionalGeneration`` with three decoder layers, in eval mode."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        pad_token_id=PAD_TOKEN,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return random_model(BartForConditionalGeneration, config, seed, dtype, attn_implementation)


def tiny_whisper(
    seed: int = 0, *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> Any:
    """Return a random ``WhisperForConditionalGeneration`` with 50 encoder columns, in eval mode."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=64,
        pad_token_id=PAD_TOKEN,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return random_model(WhisperForConditionalGeneration, config, seed, dtype, attn_implementation)


def random_model(cls: Any, config: Any, seed: int, dtype: torch.dtype, attn_implementation: str) -> Any:
    """Build a model in eval mode, with weights of `enliven`, that generates up to its length limit."""
    config._attn_implementation = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config).eval()
        _enliven(model)
    settings = model.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = None
    settings.pad_token_id = PAD_TOKEN
    return model.to(dtype)


def enliven(model: Any, seed: int = 0) -> Any:
    """Draw weights so large that a random model's logits depend on what it attends to.

    Freshly initialized weights are tiny, and gates are zero, so most mistakes would not change the logits.

    Args:
        model: Changed in place.
        seed: Seed for the weights; the global generator is restored.

    Returns:
        The same model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _enliven(model)
    return model


def _enliven(model: torch.nn.Module) -> None:
    """Draw weights so large that every part of the model influences the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.8)
            elif parameter.ndim >= 2:
                parameter.normal_(std=0.25 if "embed" not in name else 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))


Example = tuple[Any, dict[str, Tensor]]


def example_mllama(dtype: torch.dtype) -> Example:
    """Return a model and a batch with text before images, interleaved and adjacent images, and padding."""
    return tiny_mllama(1, dtype=dtype), mllama_inputs(["tt1ttt4tt", "t2tt", "14ttt"], 1, dtype)


def example_bart(dtype: torch.dtype) -> Example:
    """Return a model and a batch of texts of 12, 7 and 3 tokens."""
    lengths = torch.tensor([[12], [7], [3]])
    mask = (torch.arange(12) < lengths).long()
    ids = torch.randint(4, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    return tiny_bart(1, dtype=dtype), {"input_ids": ids * mask, "attention_mask": mask}


def example_whisper(dtype: torch.dtype) -> Example:
    """Return a model and a batch of two sounds of 50 columns each."""
    sounds = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(0))
    return tiny_whisper(1, dtype=dtype), {"input_features": sounds.to(dtype)}
