"""The pipeline for speech in a block: long recordings in chunks or window by window, with times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from speech_helpers import RATE, tiny_checkpoint

import kvprune
from kvprune.testing import masked_oracle

USES: dict[str, dict[str, Any]] = {
    "chunks": {"chunk_length_s": 1.0, "batch_size": 2},
    "chunks with times": {"chunk_length_s": 1.0, "batch_size": 2, "return_timestamps": True},
    "chunks with words": {"chunk_length_s": 1.0, "batch_size": 3, "return_timestamps": "word"},
    "windows": {"return_timestamps": True},
    "windows with words": {"return_timestamps": "word"},
}

SPECS = ("full", "trim:keep_ratio=0.5", "norm:keep_ratio=0.5")


@pytest.fixture(scope="module")
def transcribe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline with a tiny Whisper that hears one second, tells time and knows alignment heads."""
    from transformers import AutoProcessor, WhisperForConditionalGeneration, pipeline

    folder = tiny_checkpoint(tmp_path_factory.mktemp("whisper") / "model", times=51, dtype=torch.float64)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    settings = model.generation_config
    first = settings.no_timestamps_token_id + 1
    settings.suppress_tokens = [token for token in settings.suppress_tokens if token < first]
    settings.max_initial_timestamp_index = 10
    settings.alignment_heads = [[0, 0], [1, 1]]
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.pad_token = "<|endoftext|>"
    return pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        dtype=torch.float64,
    )


def sounds() -> list[dict[str, Any]]:
    """Two recordings, of 2.2 and 1.3 seconds."""
    random = numpy.random.default_rng(0)
    return [
        {
            "raw": (random.standard_normal(round(seconds * RATE)) * 0.1).astype("float32"),
            "sampling_rate": RATE,
        }
        for seconds in (2.2, 1.3)
    ]


@pytest.mark.parametrize("options", list(USES.values()), ids=list(USES))
def test_the_pipeline_equals_the_oracle(transcribe: Any, options: dict[str, Any]) -> None:
    generate = {"language": "en", "task": "transcribe", "max_new_tokens": 8}

    def run_it() -> Any:
        return transcribe(sounds(), generate_kwargs=dict(generate), **options)

    for spec in SPECS:
        with kvprune.compress(transcribe.model, spec) as run, run.recording() as kept:
            found = run_it()
        assert run.report.prefills == len(kept) > 1
        if spec == "full":
            assert found == run_it()
            continue
        with masked_oracle(
            transcribe.model, [one.selections for one in kept], [one.prefill_selections for one in kept]
        ):
            assert found == run_it()


@dataclass(frozen=True, kw_only=True)
class Pruned(kvprune.CombineRule):
    """Only the second branch speaks."""

    name = "pruned"

    def combine(self, full: torch.Tensor, pruned: torch.Tensor, decided: object) -> torch.Tensor:
        return pruned


@pytest.mark.parametrize("use", ["chunks", "chunks with times", "windows"])
def test_the_pipeline_contrasts_each_chunk_and_window(transcribe: Any, use: str) -> None:
    generate = {"language": "en", "task": "transcribe", "max_new_tokens": 8}

    def run_it() -> Any:
        return transcribe(sounds(), generate_kwargs=dict(generate), **USES[use])

    with kvprune.compress(transcribe.model, "trim:keep_ratio=0.3", reread=True) as run:
        alone = run_it()
    with kvprune.contrast(transcribe.model, "trim:keep_ratio=0.3", Pruned()) as contrast:
        assert run_it() == alone
    assert contrast.report.generations == run.report.prefills > 1
    for rule in ("mint", "mod"):  # with "windows", timestamps forbid all that these rules leave
        with kvprune.contrast(transcribe.model, "trim:keep_ratio=0.3", rule) as contrast:
            assert len(run_it()) == len(sounds())
        assert contrast.report.steps > 1
