"""Encoder-decoder families that are nothing but a declaration; `kvprune.adapters.inspection` finds the rest.

Families that need code of their own have a file of their own. A stated quirk of transformers stands beside
the declaration that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.tiny_families import TINY_FAMILIES

__all__ = [
    "DECLARED",
    "BigBirdPegasusAdapter",
    "BlenderbotAdapter",
    "BlipAdapter",
    "CanaryAdapter",
    "CohereAsrAdapter",
    "DiaAdapter",
    "EncoderDecoderModelAdapter",
    "Florence2Adapter",
    "LedAdapter",
    "M2M100Adapter",
    "MBartAdapter",
    "MarianAdapter",
    "MoonshineAdapter",
    "MoonshineStreamingAdapter",
    "MvpAdapter",
    "NllbMoeAdapter",
    "PLBartAdapter",
    "PPFormulaNetAdapter",
    "PegasusAdapter",
    "PegasusXAdapter",
    "Pix2StructAdapter",
    "ProphetNetAdapter",
    "SeamlessM4TAdapter",
    "Speech2TextAdapter",
    "SpeechEncoderDecoderAdapter",
    "SwitchTransformersAdapter",
    "T5Adapter",
    "T5GemmaAdapter",
    "UdopAdapter",
    "VisionEncoderDecoderAdapter",
]


class _Declared(EncoderDecoderAdapter):
    """Makes an example of the first model class."""

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny model of the first model class, and a batch of two samples, one of them padded."""
        name = cls.model_classes[0]
        return TINY_FAMILIES[name].example(name, dtype)


class _LikeBart(_Declared):
    """A decoder whose self-attention neither rotates nor adds relative positions, so policies can see it."""

    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}


class T5Adapter(_Declared):
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


class MBartAdapter(_LikeBart):
    """mBART, translation among 50 languages."""

    family = "mBART"
    model_classes = ("MBartForConditionalGeneration", "MBartModel")


class M2M100Adapter(_LikeBart):
    """M2M100 and NLLB, translation among 100 and 200 languages."""

    family = "M2M100"
    model_classes = ("M2M100ForConditionalGeneration", "M2M100Model")


class MarianAdapter(_LikeBart):
    """Marian, the models of OPUS-MT for pairs of languages."""

    family = "Marian"
    model_classes = ("MarianMTModel", "MarianModel")


class PegasusAdapter(_LikeBart):
    """Pegasus, summaries."""

    family = "Pegasus"
    model_classes = ("PegasusForConditionalGeneration", "PegasusModel")


class PegasusXAdapter(_LikeBart):
    """PEGASUS-X, summaries of long texts."""

    family = "PEGASUS-X"
    model_classes = ("PegasusXForConditionalGeneration", "PegasusXModel")


class BlenderbotAdapter(_LikeBart):
    """Blenderbot, conversation."""

    family = "Blenderbot"
    model_classes = (
        "BlenderbotForConditionalGeneration",
        "BlenderbotModel",
        "BlenderbotSmallForConditionalGeneration",
        "BlenderbotSmallModel",
    )


class PLBartAdapter(_LikeBart):
    """PLBART, program code."""

    family = "PLBART"
    model_classes = ("PLBartForConditionalGeneration", "PLBartModel")


class MvpAdapter(_LikeBart):
    """MVP, texts from data and from texts."""

    family = "MVP"
    model_classes = ("MvpForConditionalGeneration", "MvpModel")


class LedAdapter(_LikeBart):
    """LED, long texts."""

    family = "LED"
    model_classes = ("LEDForConditionalGeneration", "LEDModel")


class MoonshineAdapter(_Declared):
    """Moonshine, speech of any length without padding to 30 seconds."""

    family = "Moonshine"
    model_classes = ("MoonshineForConditionalGeneration", "MoonshineModel")


class Speech2TextAdapter(_LikeBart):
    """Speech2Text, whose encoder makes one column of four frames."""

    family = "Speech2Text"
    model_classes = ("Speech2TextForConditionalGeneration", "Speech2TextModel")


class CanaryAdapter(_Declared):
    """Canary, speech in many languages."""

    family = "Canary"
    model_classes = ("CanaryForConditionalGeneration", "CanaryModel")


class CohereAsrAdapter(_Declared):
    """Cohere Transcribe."""

    family = "Cohere ASR"
    model_classes = ("CohereAsrForConditionalGeneration", "CohereAsrModel")


class VisionEncoderDecoderAdapter(_Declared):
    """Any encoder of pictures with any decoder of text: TrOCR, Donut, Nougat, captions by GPT-2."""

    family = "vision encoder-decoder"
    model_classes = ("VisionEncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor


class Florence2Adapter(_Declared):
    """Florence-2. Encoder columns are a picture and a text after it."""

    family = "Florence-2"
    model_classes = ("Florence2ForConditionalGeneration", "Florence2Model")


class Pix2StructAdapter(_Declared):
    """Pix2Struct, MatCha and DePlot. Encoder columns are patches of a page."""

    family = "Pix2Struct"
    model_classes = ("Pix2StructForConditionalGeneration",)


class EncoderDecoderModelAdapter(_Declared):
    """Any encoder of text with any decoder of text, such as BERT and BERT, or BERT and GPT-2."""

    family = "encoder-decoder of two models"
    model_classes = ("EncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor


class NllbMoeAdapter(_Declared):
    """NLLB-MoE, translation among 200 languages."""

    family = "NLLB-MoE"
    model_classes = ("NllbMoeForConditionalGeneration", "NllbMoeModel")


class SwitchTransformersAdapter(_Declared):
    """Switch Transformers, T5 with experts."""

    family = "Switch Transformers"
    model_classes = ("SwitchTransformersForConditionalGeneration", "SwitchTransformersModel")


class SeamlessM4TAdapter(_Declared):
    """SeamlessM4T, translation of text and speech to text."""

    family = "SeamlessM4T"
    model_classes = (
        "SeamlessM4TForTextToText",
        "SeamlessM4TForSpeechToText",
        "SeamlessM4Tv2ForTextToText",
        "SeamlessM4Tv2ForSpeechToText",
    )


class T5GemmaAdapter(_Declared):
    """T5Gemma. The softcap on its logits is no part of what policies see of attention."""

    family = "T5Gemma"
    model_classes = ("T5GemmaForConditionalGeneration", "T5GemmaModel")


class MoonshineStreamingAdapter(_Declared):
    """Moonshine for streams of speech."""

    family = "Moonshine Streaming"
    model_classes = ("MoonshineStreamingForConditionalGeneration", "MoonshineStreamingModel")


class BigBirdPegasusAdapter(_LikeBart):
    """BigBird-Pegasus, summaries of long texts."""

    family = "BigBird-Pegasus"
    model_classes = ("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusModel")


class UdopAdapter(_Declared):
    """UDOP, documents. Encoder columns are words on a page and its patches."""

    family = "UDOP"
    model_classes = ("UdopForConditionalGeneration",)


class PPFormulaNetAdapter(_LikeBart):
    """PP-FormulaNet, pictures of formulas."""

    family = "PP-FormulaNet"
    model_classes = ("PPFormulaNetForConditionalGeneration",)


class BlipAdapter(_Declared):
    """BLIP, captions of pictures."""

    family = "BLIP"
    model_classes = ("BlipForConditionalGeneration",)
    scaled_by_width = True  # its attention divides by the square root and names no factor


class SpeechEncoderDecoderAdapter(_Declared):
    """Any encoder of speech with any decoder of text."""

    family = "speech encoder-decoder"
    model_classes = ("SpeechEncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor


class DiaAdapter(_Declared):
    """Dia, text to speech."""

    family = "Dia"
    model_classes = ("DiaForConditionalGeneration",)


class ProphetNetAdapter(_Declared):
    """ProphetNet, which predicts several tokens at once in training."""

    family = "ProphetNet"
    model_classes = ("ProphetNetForConditionalGeneration", "ProphetNetModel")
    scaled_by_width = True  # its attention divides by the square root and names no factor


DECLARED = (
    T5Adapter,
    MBartAdapter,
    M2M100Adapter,
    MarianAdapter,
    PegasusAdapter,
    PegasusXAdapter,
    BlenderbotAdapter,
    PLBartAdapter,
    MvpAdapter,
    LedAdapter,
    MoonshineAdapter,
    Speech2TextAdapter,
    CanaryAdapter,
    CohereAsrAdapter,
    VisionEncoderDecoderAdapter,
    Florence2Adapter,
    Pix2StructAdapter,
    EncoderDecoderModelAdapter,
    NllbMoeAdapter,
    SwitchTransformersAdapter,
    SeamlessM4TAdapter,
    T5GemmaAdapter,
    MoonshineStreamingAdapter,
    BigBirdPegasusAdapter,
    UdopAdapter,
    PPFormulaNetAdapter,
    BlipAdapter,
    SpeechEncoderDecoderAdapter,
    DiaAdapter,
    ProphetNetAdapter,
)
"""The adapters that ship with kvprune, in this order."""
