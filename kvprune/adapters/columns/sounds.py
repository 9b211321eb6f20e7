"""How many seconds of sound one encoder column adds.

A column stands for so many samples of a wave, or so many frames of a spectrogram, as the strides of the
encoder's convolutions say. Frames and sampling rates are those of the feature extractors in transformers:
spectrograms have a frame every 10 ms, and waves are sampled at 16 kHz. Where that is unknown, so are seconds.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

__all__ = ["FRAME", "SAMPLE", "seconds_of_speech_encoder", "seconds_of_strides"]

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


def seconds_of_strides(step: float, encoder: nn.Module | None, *paths: str) -> float | None:
    """Return the seconds from one output of a row of convolutions over time to the next.

    Args:
        step: Seconds from one of their inputs to the next.
        encoder: The encoder that has them.
        paths: Where they are in it.

    Returns:
        None if the encoder does not look as expected.
    """
    try:
        layers: list[Any] = [encoder.get_submodule(path) for path in paths if encoder is not None]
        return float(step * math.prod(layer.stride[0] for layer in layers)) if layers else None
    except AttributeError:
        return None


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
