"""What is done to a spoken sentence: its level, noise, and a quiet room before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvprune.demo.voices.synthesisers import Sound
from kvprune.errors import SynthesisError
from kvprune.session.packages import load_speech_package

__all__ = ["CONDITIONS", "RATE", "Recipe", "decibels", "pink_noise", "prepared", "speech_power"]

Samples = NDArray[np.float64]

CONDITIONS = ("clean", "noisy", "silence")
"""The tasks of the set: as spoken; with noise; with a quiet room before and after."""

RATE = 16_000
"""Samples per second of the files, which is what Whisper hears."""

_FRAME = RATE // 50  # samples of 20 ms
_LOWEST = 20.0  # Hz; below it, noise has no energy


@dataclass(frozen=True)
class Recipe:
    """All numbers of the conditions.

    Attributes:
        level: power of the speech in every recording, in decibels relative to full scale.
        snr: ratio of speech to noise in "noisy", in decibels.
        room: ratio of speech to the noise of the room in "silence", in decibels. A room that is not
            digitally silent matters: Whisper fills each recording with zeros up to 30 s, so zeros at its end
            would change nothing.
        silence: shortest and longest time before, and after, the speech in "silence", in seconds.
    """

    level: float = -26.0
    snr: float = 20.0
    room: float = 45.0
    silence: tuple[float, float] = (0.5, 3.0)

    def facts(self) -> dict[str, Any]:
        """Return all numbers as JSON values, for the manifest."""
        return {
            **asdict(self),
            "rate": RATE,
            "noise": f"pink (power falls as 1/f from {_LOWEST:g} Hz upward)",
            "power": "mean over the frames of 20 ms that are at most 30 dB below the loudest one",
        }

    def draw(self, condition: str, rng: np.random.Generator) -> dict[str, float]:
        """Return what a row says of its condition: its noise, or its silence in seconds."""
        if condition == "noisy":
            return {"snr_db": self.snr}
        if condition == "silence":
            before, after = (round(float(seconds), 3) for seconds in rng.uniform(*self.silence, size=2))
            return {"silence_before": before, "silence_after": after, "room_snr_db": self.room}
        return {}


def prepared(sound: Sound, recipe: Recipe, facts: Mapping[str, float], rng: np.random.Generator) -> Samples:
    """Return the samples of a recording.

    Args:
        sound: The sentence as spoken, at any rate.
        recipe: Gives the level.
        facts: What `Recipe.draw` gave.
        rng: Source of the noise.

    Returns:
        float64 [n] at `RATE`, every sample inside -1..1.

    Raises:
        SynthesisError: If a sample would be clipped.
        ModuleNotFoundError: If the package soxr is missing.
    """
    samples = _resampled(sound)
    samples = samples * 10 ** ((recipe.level - decibels(speech_power(samples))) / 20)
    if "silence_before" in facts:
        around = [round(facts[name] * RATE) for name in ("silence_before", "silence_after")]
        samples = np.pad(samples, around)
        samples = samples + pink_noise(len(samples), recipe.level - facts["room_snr_db"], rng)
    elif "snr_db" in facts:
        samples = samples + pink_noise(len(samples), recipe.level - facts["snr_db"], rng)
    peak = float(np.abs(samples).max())
    if peak >= 1.0:
        raise SynthesisError(f"it would be clipped: the largest sample is {peak:.2f} of full scale")
    return samples


def speech_power(samples: Samples) -> float:
    """Return the mean power of the frames with speech: those at most 30 dB below the loudest frame.

    Args:
        samples: float64 [n] at `RATE`, not all 0.
    """
    squares = np.pad(samples, (0, -len(samples) % _FRAME)) ** 2
    power = squares.reshape(-1, _FRAME).mean(axis=1)  # [frames]
    return float(power[power >= power.max() * 1e-3].mean())


def pink_noise(count: int, level: float, rng: np.random.Generator) -> Samples:
    """Return noise whose power falls as 1/f.

    Args:
        count: Number of samples.
        level: Power in decibels relative to full scale, met exactly.
        rng: Source of randomness.

    Returns:
        float64 [count].
    """
    frequency = np.fft.rfftfreq(count, 1 / RATE)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    spectrum *= np.where(frequency >= _LOWEST, 1 / np.sqrt(np.maximum(frequency, _LOWEST)), 0.0)
    noise = np.fft.irfft(spectrum, count)
    return np.asarray(noise * 10 ** (level / 20) / np.sqrt((noise**2).mean()), dtype=np.float64)


def decibels(power: float) -> float:
    """Return a power in decibels relative to full scale."""
    return 10 * float(np.log10(power))


def _resampled(sound: Sound) -> Samples:
    if sound.rate == RATE:
        return sound.samples
    soxr = load_speech_package("soxr")
    return np.asarray(soxr.resample(sound.samples, sound.rate, RATE), dtype=np.float64)
