"""Contrast on Whisper as it is used: with timestamps and with what generate may return."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from long_speech import USES, long_whisper

import kvprune

AGAINST = "trim:keep_ratio=0.3"


@dataclass(frozen=True, kw_only=True)
class Pruned(kvprune.CombineRule):
    """Only the second branch speaks."""

    name = "pruned"

    def combine(self, full, pruned, decided):
        return pruned


@pytest.mark.parametrize("more", [{"return_segments": True}, {"return_dict_in_generate": True}])
def test_what_generate_returns_of_windows_is_that_of_the_second_branch(more):
    model, (inputs, options) = long_whisper(), USES["long"]
    options = {"return_timestamps": True, "language": "en", "task": "transcribe", **options, **more}
    with kvprune.compress(model, AGAINST, reread=True):
        alone = model.generate(**inputs, **options)
    with kvprune.contrast(model, AGAINST, Pruned()):
        second = model.generate(**inputs, **options)
    assert torch.equal(alone["sequences"], second["sequences"])
