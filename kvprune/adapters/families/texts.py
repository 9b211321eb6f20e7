"""Families that read texts: encoder columns are text tokens.

`kvprune.adapters.inspection` finds the rest. A stated quirk of transformers stands beside the declaration
that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import cache_of
from kvprune.adapters.families.declared import RELATIVE, REPEATS, WITH_TEXT, Declared, LikeBart, no_text
from kvprune.adapters.tiny.models import example_bart

__all__ = [
    "BartAdapter",
    "BigBirdPegasusAdapter",
    "BlenderbotAdapter",
    "DiaAdapter",
    "EncoderDecoderModelAdapter",
    "LedAdapter",
    "M2M100Adapter",
    "MBartAdapter",
    "MarianAdapter",
    "MusicgenAdapter",
    "MvpAdapter",
    "NllbMoeAdapter",
    "PLBartAdapter",
    "PegasusAdapter",
    "PegasusXAdapter",
    "ProphetNetAdapter",
    "SwitchTransformersAdapter",
    "T5Adapter",
    "T5GemmaAdapter",
]

_TWO_VOCABULARIES = {
    **Declared.lacks,
    "reconstruction": "its decoder may have another vocabulary than the encoder whose tokens it would repeat",
}
_WRITES_SOUND = {"reconstruction": "its decoder writes sound and cannot repeat the text"}
_CHANNELS = {**no_text("its decoder writes several channels of sound"), **_WRITES_SOUND}
_CODEBOOKS = {**no_text("its decoder reads a row of tokens for each codebook"), **_WRITES_SOUND}


class BartAdapter(LikeBart):
    """BART, whose encoder columns are text tokens."""

    family = "BART"
    model_classes = ("BartForConditionalGeneration", "BartModel")

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny BART, and a batch of texts of several lengths."""
        return example_bart(dtype)


class T5Adapter(Declared):
    """T5 and what has its layers: mT5, UMT5, LongT5."""

    family = "T5"
    model_classes = (
        "T5ForConditionalGeneration",
        "T5Model",
        "MT5ForConditionalGeneration",
        "MT5Model",
        "UMT5ForConditionalGeneration",
        "UMT5Model",
        "LongT5ForConditionalGeneration",
        "LongT5Model",
    )
    lacks = RELATIVE
    provides = REPEATS


class MBartAdapter(LikeBart):
    """mBART, translation among 50 languages."""

    family = "mBART"
    model_classes = ("MBartForConditionalGeneration", "MBartModel")


class M2M100Adapter(LikeBart):
    """M2M100 and NLLB, translation among 100 and 200 languages."""

    family = "M2M100"
    model_classes = ("M2M100ForConditionalGeneration", "M2M100Model")


class NllbMoeAdapter(Declared):
    """NLLB-MoE, translation among 200 languages."""

    family = "NLLB-MoE"
    model_classes = ("NllbMoeForConditionalGeneration", "NllbMoeModel")
    provides = REPEATS | {"text"}


class MarianAdapter(LikeBart):
    """Marian, the models of OPUS-MT for pairs of languages."""

    family = "Marian"
    model_classes = ("MarianMTModel", "MarianModel")


class PegasusAdapter(LikeBart):
    """Pegasus, summaries."""

    family = "Pegasus"
    model_classes = ("PegasusForConditionalGeneration", "PegasusModel")


class PegasusXAdapter(LikeBart):
    """PEGASUS-X, summaries of long texts."""

    family = "PEGASUS-X"
    model_classes = ("PegasusXForConditionalGeneration", "PegasusXModel")


class BigBirdPegasusAdapter(LikeBart):
    """BigBird-Pegasus, summaries of long texts."""

    family = "BigBird-Pegasus"
    model_classes = ("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusModel")


class BlenderbotAdapter(LikeBart):
    """Blenderbot, conversation."""

    family = "Blenderbot"
    model_classes = (
        "BlenderbotForConditionalGeneration",
        "BlenderbotModel",
        "BlenderbotSmallForConditionalGeneration",
        "BlenderbotSmallModel",
    )


class PLBartAdapter(LikeBart):
    """PLBART, program code."""

    family = "PLBART"
    model_classes = ("PLBartForConditionalGeneration", "PLBartModel")


class MvpAdapter(LikeBart):
    """MVP, texts from data and from texts."""

    family = "MVP"
    model_classes = ("MvpForConditionalGeneration", "MvpModel")


class LedAdapter(LikeBart):
    """LED, long texts."""

    family = "LED"
    model_classes = ("LEDForConditionalGeneration", "LEDModel")


class ProphetNetAdapter(Declared):
    """ProphetNet, which predicts several tokens at once in training."""

    family = "ProphetNet"
    model_classes = ("ProphetNetForConditionalGeneration", "ProphetNetModel")
    scaled_by_width = True  # its attention divides by the square root and names no factor
    lacks = no_text("its self-attention reads several streams of predicted tokens")
    provides = REPEATS
    rereads = False  # it returns several rows for each token; those of one cannot be replaced


class SwitchTransformersAdapter(Declared):
    """Switch Transformers, T5 with experts."""

    family = "Switch Transformers"
    model_classes = ("SwitchTransformersForConditionalGeneration", "SwitchTransformersModel")
    lacks = RELATIVE
    provides = REPEATS


class T5GemmaAdapter(Declared):
    """T5Gemma. The softcap on its logits is no part of what policies see of attention."""

    family = "T5Gemma"
    model_classes = ("T5GemmaForConditionalGeneration", "T5GemmaModel")
    lacks = no_text("its self-attention slides windows and may cap logits")
    provides = REPEATS


class EncoderDecoderModelAdapter(Declared):
    """Any encoder of text with any decoder of text, such as BERT and BERT, or BERT and GPT-2."""

    family = "encoder-decoder of two models"
    model_classes = ("EncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor
    provides = WITH_TEXT
    lacks = _TWO_VOCABULARIES


class DiaAdapter(Declared):
    """Dia, text to speech."""

    family = "Dia"
    model_classes = ("DiaForConditionalGeneration", "DiaModel")
    lacks = _CHANNELS
    rereads = False  # a token is a row of codebooks, of which nobody knows the last one

    def _is_cached(self, named: dict[str, Any]) -> bool:
        """Whether the call has a cache: the decoder of Dia, unlike others, makes none itself."""
        return super()._is_cached(named) and cache_of(named) is not None


class MusicgenAdapter(Declared):
    """MusicGen, text to music.

    Its decoder reads a row of tokens for each codebook. With classifier-free guidance, half of the samples
    have encoder states that are all masked.
    """

    family = "MusicGen"
    model_classes = ("MusicgenForConditionalGeneration",)
    lacks = _CODEBOOKS
    provides = Declared.provides - {"guidance"}  # one row of tokens is no prompt that could be run again

    def _begin(self, call: Any, named: dict[str, Any], states: Tensor) -> None:
        """Begin a prefill with one row of tokens for each sample, as the encoder states have."""
        tokens = named.get("input_ids")
        if tokens is not None:  # [B * codebooks, T]
            named = {**named, "input_ids": tokens[:: self._decoder.num_codebooks]}
        super()._begin(call, named, states)
