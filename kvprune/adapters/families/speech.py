"""Families that read speech: encoder columns are stretches of sound.

`kvprune.adapters.inspection` finds the rest. A stated quirk of transformers stands beside the declaration
that needs it.
"""

from __future__ import annotations

from typing import Any

from kvprune.adapters.columns.sounds import FRAME, SAMPLE, seconds_of_speech_encoder, seconds_of_strides
from kvprune.adapters.families.declared import RELATIVE, WITH_TEXT, Declared, LikeBart
from kvprune.tokens.layout import AUDIO_FRAME

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
    provides = WITH_TEXT

    @property
    def column_seconds(self) -> float | None:
        """0.024: three convolutions over a wave."""
        return seconds_of_strides(SAMPLE, self.encoder, "conv1", "conv2", "conv3")


class MoonshineStreamingAdapter(Declared):
    """Moonshine for streams of speech."""

    family = "Moonshine Streaming"
    model_classes = ("MoonshineStreamingForConditionalGeneration", "MoonshineStreamingModel")
    provides = WITH_TEXT - {"guidance"}  # its decoder would add positions to encoder states again

    @property
    def column_seconds(self) -> float | None:
        """0.02: two convolutions over frames of 5 ms."""
        step = getattr(getattr(self.encoder, "config", None), "frame_ms", None)
        return step and seconds_of_strides(step / 1000, self.encoder, "embedder.conv1", "embedder.conv2")


class Speech2TextAdapter(LikeBart):
    """Speech2Text, whose encoder makes one column of four frames."""

    family = "Speech2Text"
    model_classes = ("Speech2TextForConditionalGeneration", "Speech2TextModel")
    provides = WITH_TEXT

    @property
    def column_seconds(self) -> float | None:
        """0.04: two convolutions over frames of 10 ms."""
        return seconds_of_speech_encoder(self.model.config)


class CanaryAdapter(Declared):
    """Canary, speech in many languages."""

    family = "Canary"
    model_classes = ("CanaryForConditionalGeneration", "CanaryModel")
    provides = WITH_TEXT

    @property
    def column_seconds(self) -> float | None:
        """0.08: the encoder joins eight frames of 10 ms."""
        return seconds_of_speech_encoder(getattr(self.encoder, "config", None))


class CohereAsrAdapter(Declared):
    """Cohere Transcribe."""

    family = "Cohere ASR"
    model_classes = ("CohereAsrForConditionalGeneration", "CohereAsrModel")
    provides = WITH_TEXT - {"guidance"}  # its decoder would project encoder states again

    @property
    def column_seconds(self) -> float | None:
        """0.08: the encoder joins eight frames of 10 ms."""
        return seconds_of_speech_encoder(getattr(self.encoder, "config", None))


class SeamlessM4TAdapter(Declared):
    """SeamlessM4T, translation of text and speech to text."""

    family = "SeamlessM4T"
    model_classes = (
        "SeamlessM4TForTextToText",
        "SeamlessM4TForSpeechToText",
        "SeamlessM4Tv2ForTextToText",
        "SeamlessM4Tv2ForSpeechToText",
    )
    provides = WITH_TEXT

    @property
    def column_seconds(self) -> float | None:
        """0.16: two frames of 10 ms are one input, and an adaptor joins eight of these; None for texts."""
        if self.column_unit != AUDIO_FRAME:
            return None
        config: Any = self.model.config
        adaptors = config.num_adapter_layers if config.add_adapter else 0
        return float(2 * FRAME * config.adaptor_stride**adaptors)


class Pop2PianoAdapter(Declared):
    """Pop2Piano, piano covers of songs. The first column is the composer, the others are frames of sound."""

    family = "Pop2Piano"
    model_classes = ("Pop2PianoForConditionalGeneration",)
    unit = AUDIO_FRAME  # its encoder, that of T5, takes input_ids, too
    lacks = RELATIVE


class SpeechEncoderDecoderAdapter(Declared):
    """Any encoder of speech with any decoder of text."""

    family = "speech encoder-decoder"
    model_classes = ("SpeechEncoderDecoderModel",)
    scaled_by_width = True  # RemBERT, RoFormer, Megatron-BERT, TAPAS name no factor
    provides = WITH_TEXT

    @property
    def column_seconds(self) -> float | None:
        """0.02 of encoders like wav2vec 2.0; None if the encoder is not known."""
        return seconds_of_speech_encoder(getattr(self.encoder, "config", None))
