"""Families that read texts: encoder columns are text tokens.

`kvprune.adapters.inspection` finds the rest. A stated quirk of transformers stands beside the declaration
that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.families.declared import RELATIVE, WITH_TEXT, Declared, LikeBart, no_text
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
    provides = WITH_TEXT


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


class SwitchTransformersAdapter(Declared):
    """Switch Transformers, T5 with experts."""

    family = "Switch Transformers"
    model_classes = ("SwitchTransformersForConditionalGeneration", "SwitchTransformersModel")
    lacks = RELATIVE


class T5GemmaAdapter(Declared):
    """T5Gemma. The softcap on its logits is no part of what policies see of attention."""

    family = "T5Gemma"
    model_classes = ("T5GemmaForConditionalGeneration", "T5GemmaModel")
    lacks = no_text("its self-attention slides windows and may cap logits")


class EncoderDecoderModelAdapter(Declared):
    """Any encoder of text with any decoder of text, such as BERT and BERT, or BERT and GPT-2."""

    family = "encoder-decoder of two models"
    model_classes = ("EncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor
    provides = WITH_TEXT


class DiaAdapter(Declared):
    """Dia, text to speech."""

    family = "Dia"
    model_classes = ("DiaForConditionalGeneration",)
    lacks = no_text("its decoder writes several channels of sound")
