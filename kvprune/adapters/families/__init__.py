"""Encoder-decoder families: each is a declaration; what needs code of its own has a file of its own."""

from __future__ import annotations

from kvprune.adapters.families.pictures import (
    BlipAdapter,
    Florence2Adapter,
    Pix2StructAdapter,
    PPFormulaNetAdapter,
    UdopAdapter,
    VisionEncoderDecoderAdapter,
)
from kvprune.adapters.families.speech import (
    CanaryAdapter,
    CohereAsrAdapter,
    MoonshineAdapter,
    MoonshineStreamingAdapter,
    Pop2PianoAdapter,
    SeamlessM4TAdapter,
    Speech2TextAdapter,
    SpeechEncoderDecoderAdapter,
)
from kvprune.adapters.families.texts import (
    BartAdapter,
    BigBirdPegasusAdapter,
    BlenderbotAdapter,
    DiaAdapter,
    EncoderDecoderModelAdapter,
    LedAdapter,
    M2M100Adapter,
    MarianAdapter,
    MBartAdapter,
    MusicgenAdapter,
    MvpAdapter,
    NllbMoeAdapter,
    PegasusAdapter,
    PegasusXAdapter,
    PLBartAdapter,
    ProphetNetAdapter,
    SwitchTransformersAdapter,
    T5Adapter,
    T5GemmaAdapter,
)
from kvprune.adapters.families.whisper import WhisperAdapter

__all__ = ["FAMILIES"]

FAMILIES = (
    BartAdapter,
    WhisperAdapter,
    T5Adapter,
    MBartAdapter,
    M2M100Adapter,
    NllbMoeAdapter,
    MarianAdapter,
    PegasusAdapter,
    PegasusXAdapter,
    BigBirdPegasusAdapter,
    BlenderbotAdapter,
    PLBartAdapter,
    MvpAdapter,
    LedAdapter,
    ProphetNetAdapter,
    SwitchTransformersAdapter,
    T5GemmaAdapter,
    EncoderDecoderModelAdapter,
    DiaAdapter,
    MusicgenAdapter,
    MoonshineAdapter,
    MoonshineStreamingAdapter,
    Speech2TextAdapter,
    CanaryAdapter,
    CohereAsrAdapter,
    SeamlessM4TAdapter,
    Pop2PianoAdapter,
    SpeechEncoderDecoderAdapter,
    VisionEncoderDecoderAdapter,
    Florence2Adapter,
    Pix2StructAdapter,
    UdopAdapter,
    PPFormulaNetAdapter,
    BlipAdapter,
)
"""The encoder-decoder adapters that ship with kvprune, in this order."""
