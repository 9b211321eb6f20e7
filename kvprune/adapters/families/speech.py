"""Families that read speech: encoder columns are stretches of sound.

`kvprune.adapters.inspection` finds the rest. A stated quirk of transformers stands beside the declaration
that needs it.
"""

from __future__ import annotations

from kvprune.adapters.families.declared import Declared, LikeBart

__all__ = [
    "CanaryAdapter",
    "CohereAsrAdapter",
    "MoonshineAdapter",
    "MoonshineStreamingAdapter",
    "Pop2PianoAdapter",
    "SeamlessM4TAdapter",
    "Speech2TextAdapter",
    "SpeechEncoderDecoderAdapter",
]


class MoonshineAdapter(Declared):
    """Moonshine, speech of any length without padding to 30 seconds."""

    family = "Moonshine"
    model_classes = ("MoonshineForConditionalGeneration", "MoonshineModel")


class MoonshineStreamingAdapter(Declared):
    """Moonshine for streams of speech."""

    family = "Moonshine Streaming"
    model_classes = ("MoonshineStreamingForConditionalGeneration", "MoonshineStreamingModel")
    provides = Declared.provides - {"guidance"}  # its decoder would add positions to encoder states again


class Speech2TextAdapter(LikeBart):
    """Speech2Text, whose encoder makes one column of four frames."""

    family = "Speech2Text"
    model_classes = ("Speech2TextForConditionalGeneration", "Speech2TextModel")


class CanaryAdapter(Declared):
    """Canary, speech in many languages."""

    family = "Canary"
    model_classes = ("CanaryForConditionalGeneration", "CanaryModel")


class CohereAsrAdapter(Declared):
    """Cohere Transcribe."""

    family = "Cohere ASR"
    model_classes = ("CohereAsrForConditionalGeneration", "CohereAsrModel")
    provides = Declared.provides - {"guidance"}  # its decoder would project encoder states again


class SeamlessM4TAdapter(Declared):
    """SeamlessM4T, translation of text and speech to text."""

    family = "SeamlessM4T"
    model_classes = (
        "SeamlessM4TForTextToText",
        "SeamlessM4TForSpeechToText",
        "SeamlessM4Tv2ForTextToText",
        "SeamlessM4Tv2ForSpeechToText",
    )


class Pop2PianoAdapter(Declared):
    """Pop2Piano, piano covers of songs. The first column is the composer, the others are frames of sound."""

    family = "Pop2Piano"
    model_classes = ("Pop2PianoForConditionalGeneration",)


class SpeechEncoderDecoderAdapter(Declared):
    """Any encoder of speech with any decoder of text."""

    family = "speech encoder-decoder"
    model_classes = ("SpeechEncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor
