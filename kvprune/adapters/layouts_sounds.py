"""How many seconds of sound one encoder column adds.

A column stands for so many samples of a wave, or so many frames of a spectrogram, as the strides of the
encoder's convolutions say. Frames and sampling rates are those of the feature extractors in transformers:
spectrograms have a frame every 10 ms, and waves are sampled at 16 kHz. Where that is unknown, so are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["FRAME", "SAMPLE", "seconds_of_speech_encoder", "stride"]

FRAME = 0.01
"""Seconds from one frame of a spectrogram to the next."""

SAMPLE = 1 / 16000
"""Seconds from one sample of a wave to the next."""

_OF_WAVES = {
    "data2vec-audio",
    "hubert",
    "sew",
    "sew-d",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
    "wavlm",
}
"""Encoders like wav2vec 2.0, by the ``model_type`` of their config."""


def stride(convolutions: Iterable[Any]) -> int:
    """Return of how many inputs a row of convolutions over time makes one output."""
    return math.prod(convolution.stride[0] for convolution in convolutions)


def seconds_of_speech_encoder(config: Any) -> float | None:
    """Return the seconds that one column of a speech encoder adds; None if the encoder is not known.

    Args:
        config: The config of the encoder.
    """
    kind = getattr(config, "model_type", "")
    if kind in _OF_WAVES:
        seconds = SAMPLE * math.prod(config.conv_stride)
    elif kind == "wav2vec2-bert":
        seconds = 2 * FRAME  # its feature extractor joins two frames
    elif kind == "speech_to_text":
        return float(FRAME * 2 ** len(config.conv_kernel_sizes))
    elif kind == "whisper":
        return 2 * FRAME
    elif kind == "parakeet_encoder":
        return float(FRAME * config.subsampling_factor)
    else:
        return None
    adapters = config.num_adapter_layers if getattr(config, "add_adapter", False) else 0
    return float(seconds * getattr(config, "adapter_stride", 1) ** adapters)
