"""A tiny random Whisper with a real feature extractor and tokenizer, and recordings, all made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import soundfile
import torch

from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.testing import enliven

RATE = 16_000
LANGUAGES = ("en", "de")
WORDS = "he might even have been made amiable himself"


def recording(path: Path, seconds: float = 0.5, seed: int = 0, rate: int = RATE, **options: Any) -> Path:
    """Write noise whose loudness swings; the ending of the name says the format."""
    count = round(seconds * rate)
    noise = numpy.random.default_rng(seed).standard_normal(count) * 0.1
    soundfile.write(path, noise * numpy.sin(numpy.linspace(0, 9 + seed, count)), rate, **options)
    return path


def speech_file(folder: Path, languages: tuple[str, ...] = ("en", "en", "en"), **changes: Any) -> Path:
    """Write recordings, and a data file that lists them."""
    rows = []
    for number, language in enumerate(languages):
        name = recording(folder / f"s{number}.flac", 0.3 + 0.1 * number, number).name
        rows.append({"id": f"s{number}", "audio": name, "text": WORDS, "language": language, **changes})
    path = folder / "speech.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_checkpoint(
    folder: Path, *, multilingual: bool = True, dtype: torch.dtype = torch.float32, times: int = 0
) -> Path:
    """Write a random Whisper that hears one second: 50 encoder columns, 64 positions of text.

    `times` is the number of its timestamps, which it never writes by itself.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizerFast,
    )

    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{one}|>" for one in LANGUAGES)]
    special += ["<|translate|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>"]
    special += [f"<|{0.02 * number:.2f}|>" for number in range(times)]
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    ids = {token: len(vocabulary) + number for number, token in enumerate(special)}
    tokenizer = WhisperTokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    assert tokenizer.convert_tokens_to_ids(special) == list(ids.values())
    end = ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(vocabulary) + len(special),
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=80,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(0)
    model = enliven(WhisperForConditionalGeneration(config), seed=1)
    with torch.no_grad():
        tokens = model.model.decoder.embed_tokens.weight
        tokens[end] = 1.05 * tokens[vocabulary["e"]]  # ends where it would write an e, or it would never end
    settings = model.generation_config
    settings._from_model_config = False  # or it would be made from the model's config again
    spoken = {end, *(vocabulary[letter] for letter in "abcdefghijklmnopqrstuvwxyz\u0120")}  # with the blank
    settings.suppress_tokens = [one for one in range(len(vocabulary) + len(special)) if one not in spoken]
    settings.is_multilingual = multilingual
    settings.no_timestamps_token_id = ids["<|notimestamps|>"]
    settings.return_timestamps = False
    if multilingual:
        settings.lang_to_id = {f"<|{one}|>": ids[f"<|{one}|>"] for one in LANGUAGES}
        settings.task_to_id = {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}
    model.to(dtype).save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def load(model: Path | str | None, **options: Any) -> SpeechGenerator:
    plain = {"device": "cpu", "dtype": "auto", "attn_implementation": None, "max_new_tokens": None}
    return SpeechGenerator.load(None if model is None else str(model), **{**plain, **options})
