"""Architecture of the demo model: builds its tokenizer, its processor and an untrained Mllama."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvprune.demo.glyphs import GLYPHS
from kvprune.demo.pictures import CELLS, COLOURS, TILE
from kvprune.demo.tasks import WORDS

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration, PreTrainedTokenizerFast, ProcessorMixin
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

PATCH = 14
"""Side of a patch in pixels; a tile has 64 patches."""

MAX_TILES = 4
"""The most tiles that a picture can have."""

TILINGS = tuple((down, across) for down in range(1, 5) for across in range(1, MAX_TILES // down + 1))
"""Arrangements of tiles (down, across) that the processor knows, by aspect ratio id minus 1."""


@dataclass(frozen=True)
class Size:
    """How large a model is; all sizes have the same vision geometry, so one can guide another.

    Attributes:
        vision_width: width of the vision tower.
        vision_layers: its layers, without the global one.
        text_width: width of the text layers.
        text_layers: their number, those of cross-attention included.
        cross_layers: which of them are cross-attention layers.
    """

    vision_width: int
    vision_layers: int
    text_width: int
    text_layers: int
    cross_layers: tuple[int, ...]


SIZES = {
    "model": Size(96, 3, 96, 6, (1, 3, 5)),
    "guide": Size(64, 3, 64, 4, (1, 3)),
}
"""The sizes of the demo's models: the model, and a smaller one that guides it."""

_SPECIAL = {
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|eot_id|>",
    "pad_token": "<|finetune_right_pad_id|>",
    "unk_token": "<unk>",
}
_MORE_SPECIAL = (
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
_IMAGE = "<|image|>"
_ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word.

    The image token's id is the vocabulary size, as in Llama-3.2-Vision.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*_SPECIAL.values(), *_MORE_SPECIAL, *GLYPHS, *COLOURS, *CELLS, *_ROLES, *WORDS]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: PreTrainedTokenizerFast = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=core,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*_MORE_SPECIAL, _IMAGE]})
    return tokenizer


def build_processor() -> ProcessorMixin:
    """Return a `MllamaProcessor` for at most four tiles of 112 pixels, with the chat template."""
    hf = _transformers()
    images = hf.MllamaImageProcessorPil(
        size={"height": TILE, "width": TILE},
        max_image_tiles=MAX_TILES,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor: ProcessorMixin = hf.MllamaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), chat_template=CHAT_TEMPLATE
    )
    return processor


def build_model(tokenizer: PreTrainedTokenizerFast, size: str = "model") -> MllamaForConditionalGeneration:
    """Return an untrained model, initialised so that it learns within minutes.

    Mllama initialises the gates of its cross-attention layers with 0, so that pictures do not reach the text;
    here the gates start at 0.5. Queries of the cross-attention layers start large, so that attention is
    selective from the start.

    Args:
        tokenizer: Tokenizer that the vocabulary size and the ids of special tokens are taken from.
        size: Which of `SIZES`.
    """
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    hf = _transformers()
    names = [_IMAGE, _SPECIAL["eos_token"], "<|end_of_text|>", "<|eom_id|>"]
    image_id, *ends = (tokenizer.get_vocab()[name] for name in names)
    chosen, intermediate = SIZES[size], [1]
    width = chosen.vision_width
    vision: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": chosen.vision_layers,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 4 * width,
        "vision_output_dim": width * (1 + len(intermediate)),
        "image_size": TILE,
        "patch_size": PATCH,
        "max_num_tiles": MAX_TILES,
        "intermediate_layers_indices": intermediate,
    }
    text = MllamaTextConfig(
        vocab_size=image_id,
        hidden_size=chosen.text_width,
        num_hidden_layers=chosen.text_layers,
        cross_attention_layers=list(chosen.cross_layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * chosen.text_width,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = hf.MllamaConfig(
        vision_config=MllamaVisionConfig(**vision), text_config=text, image_token_index=image_id
    )
    model: MllamaForConditionalGeneration = hf.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        _initialise(model)
        _initialise_positions(model.model.vision_model)
    model.generation_config = hf.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=16,
    )
    return model


def _transformers() -> Any:
    """Return the transformers package as Any, since its constructors are not fully typed."""
    import transformers

    return transformers


def _initialise(model: MllamaForConditionalGeneration) -> None:
    """Initialise the gates, the queries of cross-attention and the token embeddings for fast learning."""
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "gate_attn", "gate_ffn")):
            parameter.fill_(0.5)
        elif name.endswith("cross_attn.q_norm.weight"):
            parameter.fill_(3.0)
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_(0.0, 0.2)
    embedding: Any = model.get_input_embeddings()
    embedding.weight[embedding.padding_idx] = 0.0


def _initialise_positions(vision: MllamaVisionModel) -> None:
    """Initialise the tile embeddings with sine waves that encode where each patch is in the whole picture."""
    place: Any = vision.gated_positional_embedding
    width, side = vision.hidden_size, TILE // PATCH
    place.embedding.mul_(0.1)
    place.tile_embedding.weight.zero_()
    table = place.tile_embedding.weight.view(-1, MAX_TILES, side * side + 1, width)
    waves = torch.exp(torch.linspace(math.log(2 * math.pi / 3), math.log(2 * math.pi / 48), width // 4))
    for number, (down, across) in enumerate(TILINGS, start=1):
        for tile in range(down * across):
            rows = torch.arange(side).repeat_interleave(side) + side * (tile // across)
            columns = torch.arange(side).repeat(side) + side * (tile % across)
            phases = torch.cat([rows[:, None] * waves, columns[:, None] * waves], dim=1)
            table[number, tile, 1:] = 1.5 * torch.cat([phases.sin(), phases.cos()], dim=1)
