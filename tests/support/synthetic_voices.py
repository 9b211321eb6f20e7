"""A synthesiser that needs no program: it hums, as high as the voice is and as long as the text is."""

from dataclasses import dataclass, field

import numpy as np

from kvprune.demo.voices.synthesisers import Sound
from kvprune.errors import SynthesisError


@dataclass
class Hum:
    """Counts what it spoke; fails at the sentence of number `fails_at`, not counting the check of voices."""

    name: str = "hum"
    voices: tuple[str, ...] = ("low", "high")
    settings: dict[str, float] = field(default_factory=dict)
    licence: str = "none"
    number: str = "1.0"
    rate: int = 16_000
    fails_at: int | None = None
    longer: float = 0.0
    deaf: bool = False
    spoken: list[str] = field(default_factory=list)

    def version(self):
        return self.number

    def speak(self, text, voice):
        if text == "The quick boat crossed the wide river.":  # the check of voices
            return self._hum(text, voice)
        if self.fails_at == len(self.spoken):
            raise SynthesisError("hum is hoarse")
        self.spoken.append(text)
        return self._hum(text, voice)

    def _hum(self, text, voice):
        pitch = 120.0 if self.deaf else 120.0 + 40.0 * self.voices.index(voice)
        seconds = np.arange(int((0.05 * len(text) + self.longer) * self.rate)) / self.rate
        return Sound(0.3 * np.sin(2 * np.pi * pitch * seconds), self.rate)
