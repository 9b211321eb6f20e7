"""Seconds that one column adds, against what feature extractors and encoders make of longer sounds."""

import pytest
import torch
import transformers

from kvprune.adapters.columns.sounds import seconds_of_speech_encoder
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.adapters.tiny.family import BART
from kvprune.adapters.tiny.media import _WAV2VEC2
from kvprune.adapters.tiny.models import random_model

RATE = 16000
SHORT, LONG = 4, 12
"""Seconds of the two sounds whose columns are counted."""


def adapter_of(name, model):
    return next(one for one in FAMILIES if name.split()[0] in one.model_classes)(model)


def waves(seconds):
    return torch.randn(seconds * RATE, generator=torch.Generator().manual_seed(0))


def columns(encode):
    """How many columns eight more seconds add."""
    with torch.no_grad():
        return encode(LONG).shape[1] - encode(SHORT).shape[1]


@pytest.mark.parametrize(
    ("name", "extractor", "options", "seconds"),
    [
        ("Speech2TextForConditionalGeneration", "Speech2TextFeatureExtractor", {"num_mel_bins": 8}, 0.04),
        ("SeamlessM4TForSpeechToText", "SeamlessM4TFeatureExtractor", {"num_mel_bins": 4}, 0.04),
        ("SeamlessM4Tv2ForSpeechToText", "SeamlessM4TFeatureExtractor", {"num_mel_bins": 4}, 0.04),
        ("CanaryForConditionalGeneration", "ParakeetFeatureExtractor", {"feature_size": 16}, 0.08),
        ("CohereAsrForConditionalGeneration", "ParakeetFeatureExtractor", {"feature_size": 16}, 0.08),
        ("MoonshineForConditionalGeneration", None, {}, 0.024),
        ("MoonshineStreamingForConditionalGeneration", None, {}, 0.02),
        ("SpeechEncoderDecoderModel", None, {}, 0.00125),  # the tiny one has two convolutions
    ],
)
def test_columns_last_as_long_as_the_encoder_makes_them(name, extractor, options, seconds):
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    adapter = adapter_of(name, model)
    assert adapter.column_seconds == pytest.approx(seconds)

    def encode(length):
        if extractor is None:
            return adapter.encoder(waves(length)[None])[0]
        extract = getattr(transformers, extractor)
        try:
            made = extract(**options)(waves(length).numpy(), sampling_rate=RATE, return_tensors="pt")
        except ImportError as error:
            pytest.skip(str(error)[:80])
        return adapter.encoder(made["input_features"])[0]

    assert columns(encode) * adapter.column_seconds == pytest.approx(LONG - SHORT, abs=0.1)


def test_thirty_seconds_are_all_columns_of_whisper():
    config = transformers.WhisperConfig(**{**BART, "num_mel_bins": 8}, max_source_positions=1500)
    model = random_model(transformers.WhisperForConditionalGeneration, config, 0, torch.float32, "sdpa")
    adapter = adapter_of("WhisperForConditionalGeneration", model)
    extract = transformers.WhisperFeatureExtractor(feature_size=8)
    features = extract(waves(5).numpy(), sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.no_grad():
        found = adapter.encoder(features)[0].shape[1]
    assert found * adapter.column_seconds == pytest.approx(30)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Wav2Vec2", {}),
        ("Wav2Vec2", {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 32}),
        ("Hubert", {}),
        pytest.param("WavLM", {}, marks=pytest.mark.slow),  # its attention over long sounds takes time
        ("UniSpeechSat", {}),
        ("SEW", {"squeeze_factor": 2}),
        ("Data2VecAudio", {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3}),
    ],
)
def test_encoders_like_wav2vec_are_known(kind, changes):
    config = getattr(transformers, f"{kind}Config")(**{**_WAV2VEC2, **changes})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    seconds = seconds_of_speech_encoder(config)
    made = columns(lambda length: model(waves(length)[None])[0])
    assert made * seconds == pytest.approx(LONG - SHORT, abs=0.1)


def test_an_encoder_that_nobody_knows_says_nothing():
    assert seconds_of_speech_encoder(transformers.ASTConfig()) is None
    model = TINY_FAMILIES["SpeechEncoderDecoderModel"].model("SpeechEncoderDecoderModel")
    model.encoder.config.model_type = "foreign"
    assert adapter_of("SpeechEncoderDecoderModel", model).column_seconds is None
