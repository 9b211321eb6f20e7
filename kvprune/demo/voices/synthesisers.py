"""The programs that speak a sentence: flite and espeak-ng, as Debian packages them.

Neither program can be trusted to say that it did not do what was asked: flite speaks with its default voice
where it has no voice of that name, and so does espeak-ng with an unknown variant such as ``+f9``. So each
voice is looked up in the program's own list before anything is spoken.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvprune.errors import SynthesisError
from kvprune.session.packages import load_speech_package
from kvprune.text import printable

__all__ = ["SYNTHESISERS", "EspeakNg", "Flite", "Sound", "Synthesiser"]

_LONGEST_WAIT = 60.0
"""Seconds that a program may take for one sentence; it needs less than a tenth of a second."""


@dataclass(frozen=True)
class Sound:
    """One sentence as a synthesiser spoke it.

    Attributes:
        samples: float64 [n], one channel; full scale is 1.
        rate: samples per second.
    """

    samples: NDArray[np.float64]
    rate: int


class Synthesiser(Protocol):
    """What speaks."""

    @property
    def name(self) -> str:
        """Its name, which is also that of its Debian package."""
        ...

    @property
    def voices(self) -> tuple[str, ...]:
        """Voices that are used, in order."""
        ...

    @property
    def settings(self) -> Mapping[str, float]:
        """Numbers that the sound depends on; empty where all are the program's defaults."""
        ...

    @property
    def licence(self) -> str:
        """Licence of the program and its voices."""
        ...

    def version(self) -> str:
        """Return the version, after a check that the program and all its voices are there.

        Raises:
            SynthesisError: If one is missing; the message names the Debian package.
        """
        ...

    def speak(self, text: str, voice: str) -> Sound:
        """Speak a sentence; the same text and voice give the same samples.

        Raises:
            SynthesisError: If the program fails or gives no sound.
        """
        ...


@dataclass(frozen=True)
class Flite:
    """flite of Carnegie Mellon University; a voice's name is flite's own."""

    voices: tuple[str, ...] = ("awb", "rms", "slt", "kal16")
    name: str = "flite"
    licence: str = (
        "program and voices: free software under the permissive licence of Carnegie Mellon University, "
        "Copyright (c) 1999-2016 (Debian: /usr/share/doc/flite/copyright)"
    )
    settings: Mapping[str, float] = field(default_factory=dict)

    def version(self) -> str:
        """Return the version; see `Synthesiser.version`."""
        _, _, listed = _run(self, "-lv").partition(":")  # "Voices available: kal awb_time ..."
        _check_voices(self, self.voices, listed.split())
        # flite ends with status 1 after it printed its version.
        return _known(self, re.search(r"version: (\S+)", _run(self, "--version", fine=(0, 1))))

    def speak(self, text: str, voice: str) -> Sound:
        """Speak a sentence; see `Synthesiser.speak`."""
        return _spoken(self, text, voice, ("-voice", voice, "-t", text, "-o"))


@dataclass(frozen=True)
class EspeakNg:
    """espeak-ng; a voice is a language, and after a plus a variant of its sound, as in ``en-us+f3``.

    Version 1.51 ignores a variant of ``en-gb`` without a word, so ``en-gb+f3`` is no other voice.
    """

    voices: tuple[str, ...] = ("en-us", "en-gb-x-rp", "en-us+f2", "en-us+m1")
    name: str = "espeak-ng"
    licence: str = (
        "program and voices: GPL-3.0-or-later, Copyright (c) 2005-2014 Jonathan Duddington, 2013-2016 Reece "
        "H. Dunn and others (Debian: /usr/share/doc/espeak-ng/copyright)"
    )
    settings: Mapping[str, float] = field(default_factory=lambda: {"words_per_minute": 145})

    def version(self) -> str:
        """Return the version; see `Synthesiser.version`."""
        languages = [line.split()[1] for line in _run(self, "--voices=en").splitlines() if line.strip()]
        variants = re.findall(r"!v/(\S+)", _run(self, "--voices=variant"))
        for voice in self.voices:
            language, _, variant = voice.partition("+")
            _check_voices(self, [language], languages)
            if variant:
                _check_voices(self, [variant], variants)
        return _known(self, re.search(r"text-to-speech: (\S+)", _run(self, "--version")))

    def speak(self, text: str, voice: str) -> Sound:
        """Speak a sentence; see `Synthesiser.speak`."""
        options = ("-s", str(self.settings["words_per_minute"]), "-v", voice, text, "-w")
        return _spoken(self, text, voice, options)


SYNTHESISERS: tuple[Synthesiser, ...] = (Flite(), EspeakNg())


def _spoken(synthesiser: Synthesiser, text: str, voice: str, arguments: Sequence[str]) -> Sound:
    """Run a program that writes a WAV file; the file's name comes last among the arguments."""
    soundfile = load_speech_package("soundfile")
    said = f"{synthesiser.name} with voice {voice!r} and text {text!r}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        _run(synthesiser, *arguments, str(path))
        if not path.exists():
            raise SynthesisError(f"{said} wrote no file")
        try:
            samples, rate = soundfile.read(path, dtype="float64", always_2d=True)  # [n, channels]
        except soundfile.SoundFileError as error:
            raise SynthesisError(
                f"{said} wrote no readable WAV file: {printable(str(error), 200)}"
            ) from error
    if not samples.any():
        raise SynthesisError(f"{said} gave no sound: {len(samples)} samples, none of which differs from 0")
    return Sound(samples.mean(axis=1), int(rate))


def _run(synthesiser: Synthesiser, *arguments: str, fine: Collection[int] = (0,)) -> str:
    """Return what a program printed; `fine` has the exit statuses that are no failure.

    Raises:
        SynthesisError: If the program is missing, fails or does not end.
    """
    name = synthesiser.name
    program = shutil.which(name)
    if program is None:
        raise SynthesisError(f"the program {name} is not installed; on Debian: apt install {name}")
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, stdin=subprocess.DEVNULL, timeout=_LONGEST_WAIT
        )
    except subprocess.TimeoutExpired as error:
        raise SynthesisError(
            f"{name} did not end in {_LONGEST_WAIT:g} s; it was called with {list(arguments)}"
        ) from error
    except OSError as error:
        raise SynthesisError(f"{name} cannot be started: {error.strerror or error}") from error
    if done.returncode not in fine:
        reason = " ".join(done.stderr.decode(errors="replace").split()) or "it printed no error"
        raise SynthesisError(
            f"{name} failed with exit status {done.returncode} ({printable(reason, 300)}); it was called "
            f"with {list(arguments)}"
        )
    return (done.stdout + done.stderr).decode(errors="replace")


def _check_voices(synthesiser: Synthesiser, wanted: Sequence[str], listed: Sequence[str]) -> None:
    for voice in wanted:
        if voice not in listed:
            raise SynthesisError(
                f"{synthesiser.name} has no voice {voice!r}; on Debian: apt install {synthesiser.name} "
                f"(it lists: {printable(', '.join(listed), 600) or 'none'})"
            )


def _known(synthesiser: Synthesiser, found: re.Match[str] | None) -> str:
    if found is None:
        raise SynthesisError(
            f"{synthesiser.name} --version states no version that can be read; on Debian: apt install "
            f"{synthesiser.name}"
        )
    return found[1]
