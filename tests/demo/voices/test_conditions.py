"""Level, noise and silence of synthetic speech, measured on what comes out."""

import sys

import numpy as np
import pytest

from kvprune.demo.voices.conditions import (
    CONDITIONS,
    RATE,
    Recipe,
    decibels,
    pink_noise,
    prepared,
    speech_power,
)
from kvprune.demo.voices.synthesisers import Sound
from kvprune.errors import SynthesisError

RECIPE = Recipe()


def rng(seed=0):
    return np.random.default_rng(seed)


def tone(seconds=2.0, rate=RATE, loud=0.3):
    return Sound(loud * np.sin(2 * np.pi * 200 * np.arange(round(seconds * rate)) / rate), rate)


@pytest.mark.parametrize("loud", [0.01, 0.9])
@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_clean_speech_has_the_level_whatever_it_had(rate, loud):
    samples = prepared(tone(rate=rate, loud=loud), RECIPE, RECIPE.draw("clean", rng()), rng())
    assert len(samples) == 2 * RATE
    assert decibels(speech_power(samples)) == pytest.approx(-26.0, abs=1e-6)


def test_pauses_do_not_count_as_speech():
    loud = tone(1.0).samples
    with_pauses = np.concatenate([np.zeros(RATE), loud, np.zeros(2 * RATE), loud])
    assert decibels(speech_power(with_pauses)) == pytest.approx(decibels(float((loud**2).mean())), abs=0.01)


def test_noise_is_so_many_decibels_below_the_speech():
    clean = prepared(tone(), RECIPE, {}, rng())
    noisy = prepared(tone(), RECIPE, RECIPE.draw("noisy", rng()), rng(7))
    noise = noisy - clean
    ratio = decibels(speech_power(clean)) - decibels(float((noise**2).mean()))
    assert ratio == pytest.approx(20.0, abs=1e-6)
    assert np.array_equal(noisy, prepared(tone(), RECIPE, {"snr_db": 20.0}, rng(7)))
    assert not np.array_equal(noisy, prepared(tone(), RECIPE, {"snr_db": 20.0}, rng(8)))


def test_silence_goes_around_the_speech_and_is_a_quiet_room():
    facts = {"silence_before": 1.25, "silence_after": 0.5, "room_snr_db": 45.0}
    samples = prepared(tone(), RECIPE, facts, rng())
    assert len(samples) == round(3.75 * RATE)
    before, speech, after = np.split(samples, [round(1.25 * RATE), round(3.25 * RATE)])
    assert decibels(float((speech**2).mean())) == pytest.approx(-26.0, abs=0.01)
    for part in (before, after):
        assert decibels(float((part**2).mean())) == pytest.approx(-71.0, abs=3.0)


def test_what_is_drawn_for_each_condition():
    assert RECIPE.draw("clean", rng()) == {}
    assert RECIPE.draw("noisy", rng()) == {"snr_db": 20.0}
    drawn = [RECIPE.draw("silence", rng(seed)) for seed in range(300)]
    for name in ("silence_before", "silence_after"):
        values = [facts[name] for facts in drawn]
        assert 0.5 <= min(values) < 0.55
        assert 2.95 < max(values) <= 3.0
    assert len(CONDITIONS) == 3


def test_power_of_pink_noise_falls_as_one_over_f():
    noise = pink_noise(1 << 18, -30.0, rng())
    assert decibels(float((noise**2).mean())) == pytest.approx(-30.0, abs=1e-9)
    power = np.abs(np.fft.rfft(noise)) ** 2
    frequency = np.fft.rfftfreq(len(noise), 1 / RATE)
    octaves = [float(power[(frequency >= low) & (frequency < 2 * low)].sum()) for low in (50, 200, 800, 3200)]
    assert max(octaves) / min(octaves) == pytest.approx(1.0, abs=0.2)  # each octave has the same power
    assert power[frequency < 20].max() < 1e-12 * power.max()


def test_a_click_that_would_be_clipped_is_refused():
    samples = np.full(RATE, 1e-6)
    samples[: RATE // 2] = 1e-3 * np.sin(np.arange(RATE // 2))
    samples[100] = 0.9
    samples[5000::320] = 0.05  # one high sample in each frame
    with pytest.raises(SynthesisError, match=r"clipped: the largest sample is [\d.]+ of full scale"):
        prepared(Sound(samples, RATE), RECIPE, {}, rng())


def test_without_soxr(monkeypatch):
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ModuleNotFoundError, match=r'recordings need soxr.*pip install "kvprune\[speech\]"'):
        prepared(tone(rate=8000), RECIPE, {}, rng())
    assert len(prepared(tone(), RECIPE, {}, rng())) == 2 * RATE


def test_the_facts_say_all_numbers():
    assert RECIPE.facts() == {
        "level": -26.0,
        "snr": 20.0,
        "room": 45.0,
        "silence": (0.5, 3.0),
        "rate": 16000,
        "noise": "pink (power falls as 1/f from 20 Hz upward)",
        "power": "mean over the frames of 20 ms that are at most 30 dB below the loudest one",
    }
