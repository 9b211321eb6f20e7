"""How Whisper transcribes: recordings longer than its window, times, languages, prompts, and second tries."""

from __future__ import annotations

import functools

import pytest
import torch
from long_speech import apart, long_whisper, transcribe
from surface_table import works

import kvprune
from kvprune.testing import masked_oracle

AREA = "Speech: Whisper's generate"
WHISPER = ("Whisper",)
SPECS = ("full", "trim:keep_ratio=0.5", "norm:keep_ratio=0.5")


@functools.cache
def model():
    return long_whisper()


def check(use, specs=SPECS, reread=False, exactly=True, **options):
    """Check each policy against the oracle, window by window, and return what the last run reports."""
    for spec in specs:
        with kvprune.compress(model(), spec, reread=reread) as run, run.recording() as kept:
            found = transcribe(model(), use, **options)
        assert run.report.prefills == len(kept) == len(run.report.windows)
        if spec == "full":
            assert apart(found, transcribe(model(), use, **options)) <= (0 if exactly else 1e-12)
            continue
        selections = [one.selections for one in kept], [one.prefill_selections for one in kept]
        with masked_oracle(model(), *selections, reread=reread):
            expected = transcribe(model(), use, **options)
        assert apart(found, expected) <= 1e-12
    return run.report


@works(AREA, "longer recordings, read window by window", "the oracle; each window is decided anew", WHISPER)
def test_long_recordings(family):
    report = check("long")
    starts = [window.starts[0] for window in report.windows]
    assert len(starts) > 1
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert all(window.rows == (0,) and window.attempt == 0 for window in report.windows)


@works(AREA, "batches of recordings of different lengths", "the oracle, also after some have ended", WHISPER)
def test_batches_of_long_recordings(family):
    report = check("batch")
    rows = [window.rows for window in report.windows]
    assert rows[0] == (0, 1, 2)
    assert len(rows[-1]) < 3
    for window in report.windows:
        assert len(window.kept_per_sample) == len(window.rows) == len(window.starts)


@works(AREA, "timestamps (return_timestamps)", "the oracle", WHISPER)
def test_timestamps(family):
    check("short")


@works(AREA, "word times (return_token_timestamps), of long recordings, too", "the oracle's", WHISPER)
def test_word_times(family):
    check("words", exactly=False)  # once asked for them, transformers stays with eager attention
    check("long words")


@works(AREA, "detecting the language", "stock's language: it reads all columns, and is no prefill", WHISPER)
def test_detecting_the_language(family):
    report = check("detection")
    assert report.windows[0].attempt == 0
    features = torch.randn(2, 8, 100, dtype=torch.float64)
    stock = model().detect_language(features)
    for spec in (*SPECS, "norm:keep_ratio=0.1,reach=onward"):
        with kvprune.compress(model(), spec, reread=True) as run:
            assert torch.equal(model().detect_language(features), stock)
        assert run.report.encoder_inputs == 0


@works(AREA, "prompts (prompt_ids), of the first window or of all", "the oracle", WHISPER)
def test_prompts(family):
    check("prompt")
    check("prompt of all")


@works(AREA, "text of earlier windows in the prompt (condition_on_prev_tokens)", "the oracle", WHISPER)
def test_text_of_earlier_windows(family):
    check("text before")


@works(AREA, "temperature fallback, thresholds", "the oracle; each try is a prefill of its own", WHISPER)
def test_temperature_fallback(family):
    report = check("fallback")
    assert {window.attempt for window in report.windows} == {0, 1, 2}
    for before, window in zip(report.windows, report.windows[1:], strict=False):
        if window.attempt:  # those rows that are tried again, at the same place
            again = dict(zip(before.rows, before.starts, strict=True))
            assert all(again[row] == at for row, at in zip(window.rows, window.starts, strict=True))


@works(AREA, "no_speech_threshold", "the oracle; silence is judged on all columns, as in stock", WHISPER)
def test_silence(family):
    check("silence")


@works(AREA, "beams and return sequences of long recordings", "the oracle", WHISPER)
def test_beams_of_long_recordings(family):
    report = check("beams")
    assert report.windows[0].rows == (0, 0, 0, 1, 1, 1)
    report = check("sequences")
    assert report.windows[0].rows == (0, 1, 2, 3)


@works(AREA, "an assistant, or prompt lookup, with timestamps", "the oracle", WHISPER)
def test_drafts_with_timestamps(family):
    check("assistant", SPECS[2:])
    check("lookup", SPECS[1:])


@works(AREA, "a static cache for long recordings", "the oracle; rows of padding are -1", WHISPER)
def test_static_cache_of_long_recordings(family):
    report = check("static")
    assert -1 in report.windows[-1].rows


@works(AREA, "re-reading in each window", "the oracle", WHISPER)
def test_rereading_in_each_window(family):
    for use in ("batch", "detection", "text before"):
        report = check(use, SPECS[1:], reread=True)
        assert report.rereads == report.prefills


@pytest.mark.slow
@pytest.mark.parametrize("use", ["batch", "long words", "prompt of all", "text before", "fallback", "beams"])
@pytest.mark.parametrize("reread", [False, True])
def test_more_policies(use, reread):
    policies = ("h2o", "divprune", "random", "snapkv", "adakv", "csp", "elastic", "fastv")
    check(use, [f"{name}:keep_ratio=0.5" for name in policies], reread=reread)
