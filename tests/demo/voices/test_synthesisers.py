"""The programs that speak, mostly replaced by small ones: what is asked of them, and how they fail."""

import shutil
import stat
import sys
import textwrap

import numpy as np
import pytest

from kvprune.demo.voices import synthesisers
from kvprune.demo.voices.synthesisers import SYNTHESISERS, EspeakNg, Flite
from kvprune.errors import SynthesisError
from kvprune.session.packages import load_speech_package

FLITE = """
if "-lv" in given:
    print("Voices available: kal awb_time kal16 awb rms slt ")
elif "--version" in given:
    print("flite: a small simple speech synthesizer\\n  version: flite-9.8 Sep 2018 (somewhere)")
    sys.exit(1)
else:
    speak(given[given.index("-o") + 1])
"""

ESPEAK = """
if "--voices=en" in given:
    print("Pty Language Age/Gender VoiceName File Other Languages")
    for name in ("en-gb", "en-us", "en-gb-scotland"):
        print(f" 2  {name}  --/M  English_(Somewhere)  gmw/en  (en 2)")
elif "--voices=variant" in given:
    print("Pty Language Age/Gender VoiceName File")
    for name in ("f3", "f4", "m3"):
        print(f" 5  variant  --/F  {name}  !v/{name}")
elif "--version" in given:
    print("eSpeak NG text-to-speech: 9.7  Data at: /somewhere")
else:
    speak(given[given.index("-w") + 1])
"""

SPEAK = """
import wave
def speak(path, samples=b"\\x01\\x02" * 800):
    with wave.open(path, "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(22050)
        file.writeframes(samples)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program on the PATH: ``program(name, source)``; nothing else is on it."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def program(name, source):
        path = tmp_path / name
        path.write_text(
            f"#!{sys.executable}\nimport sys\ngiven = sys.argv[1:]\n{SPEAK}\n{textwrap.dedent(source)}"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return program


def test_what_is_used():
    assert [one.name for one in SYNTHESISERS] == ["flite", "espeak-ng"]
    voices = [voice for one in SYNTHESISERS for voice in one.voices]
    assert len(voices) == len(set(voices)) >= 6
    assert all("Copyright" in one.licence and one.name in one.licence for one in SYNTHESISERS)


def test_versions_are_read(program):
    program("flite", FLITE)
    program("espeak-ng", ESPEAK)
    assert Flite().version() == "flite-9.8"
    assert EspeakNg(voices=("en-us", "en-gb", "en-us+f3", "en-gb-scotland+m3")).version() == "9.7"


@pytest.mark.parametrize("one", [Flite(), EspeakNg()], ids=lambda one: one.name)
def test_a_missing_program_names_its_package(program, one):
    for call in (one.version, lambda: one.speak("Hello there.", one.voices[0])):
        with pytest.raises(
            SynthesisError, match=f"the program {one.name} is not installed.*apt install {one.name}"
        ):
            call()


@pytest.mark.parametrize(
    ("one", "missing"),
    [
        (Flite(voices=("slt", "nina")), "nina"),
        (EspeakNg(voices=("en-us", "en-mars")), "en-mars"),
        (EspeakNg(voices=("en-us+f3", "en-us+f9")), "f9"),
    ],
)
def test_a_missing_voice_names_the_package_and_the_voices_that_are_there(program, one, missing):
    program("flite", FLITE)
    program("espeak-ng", ESPEAK)
    with pytest.raises(
        SynthesisError, match=rf"{one.name} has no voice '{missing}'.*apt install.*it lists: \w+"
    ):
        one.version()


@pytest.mark.parametrize("one", [Flite(), EspeakNg()], ids=lambda one: one.name)
class TestFailures:
    def speak(self, one):
        return one.speak("The cat sat down.", one.voices[1])

    def test_none(self, program, one):
        program(one.name, "speak(given[-1])")
        sound = self.speak(one)
        assert (sound.rate, sound.samples.shape, sound.samples.dtype) == (22050, (800,), np.float64)
        assert sound.samples[0] == 0x0201 / 32768

    def test_what_it_is_called_with(self, program, one):
        program(one.name, "print(given, file=sys.stderr)\nsys.exit(4)")
        with pytest.raises(SynthesisError, match=rf"{one.name} failed with exit status 4") as caught:
            self.speak(one)
        assert f"'{one.voices[1]}'" in str(caught.value)
        assert "'The cat sat down.'" in str(caught.value)

    def test_a_failure_without_a_word(self, program, one):
        program(one.name, "sys.exit(3)")
        with pytest.raises(SynthesisError, match=r"exit status 3 \(it printed no error\)"):
            self.speak(one)

    def test_no_file(self, program, one):
        program(one.name, "pass")
        with pytest.raises(SynthesisError, match=f"{one.name} with voice .* wrote no file"):
            self.speak(one)

    def test_no_wav(self, program, one):
        program(one.name, "open(given[-1], 'w').write('oh')")
        with pytest.raises(SynthesisError, match="wrote no readable WAV file"):
            self.speak(one)

    @pytest.mark.parametrize("samples", [b"", b"\0\0" * 500])
    def test_no_sound(self, program, one, samples):
        program(one.name, f"speak(given[-1], {samples!r})")
        with pytest.raises(SynthesisError, match=f"gave no sound: {len(samples) // 2} samples, none"):
            self.speak(one)

    def test_no_end(self, program, one, monkeypatch):
        monkeypatch.setattr(synthesisers, "_LONGEST_WAIT", 0.2)
        program(one.name, "import time\ntime.sleep(30)")
        with pytest.raises(SynthesisError, match=rf"{one.name} did not end in 0.2 s"):
            self.speak(one)

    def test_no_version(self, program, one):
        source = FLITE if one.name == "flite" else ESPEAK
        program(one.name, source.replace("version:", "edition:").replace("text-to-speech:", "speech:"))
        known = type(one)(voices=one.voices[:1])
        with pytest.raises(SynthesisError, match=f"{one.name} --version states no version"):
            known.version()

    def test_no_program_after_all(self, program, one, tmp_path):
        (tmp_path / one.name).write_text("#!/no/such/interpreter\n")
        (tmp_path / one.name).chmod(0o755)
        with pytest.raises(SynthesisError, match=f"{one.name} cannot be started: No such file"):
            self.speak(one)


@pytest.mark.parametrize(("name", "debian"), [("soundfile", "apt install python3-soundfile"), ("soxr", "")])
def test_a_missing_package(monkeypatch, name, debian):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf'{name}.*pip install "kvprune\[speech\]".*{debian}'
    ) as caught:
        load_speech_package(name)
    assert caught.value.name == name


@pytest.mark.parametrize("one", SYNTHESISERS, ids=lambda one: one.name)
def test_the_real_programs(one):
    if shutil.which(one.name) is None:
        pytest.skip(f"{one.name} is not installed")
    assert one.version()
    sounds = {voice: one.speak("The boat crossed the wide river.", voice) for voice in one.voices}
    assert all(1.0 < len(sound.samples) / sound.rate < 6.0 for sound in sounds.values())
    assert len({sound.samples.tobytes() for sound in sounds.values()}) == len(one.voices)
    voice = one.voices[-1]
    again = one.speak("The boat crossed the wide river.", voice)
    assert np.array_equal(again.samples, sounds[voice].samples)
    wrong = type(one)(voices=(one.voices[0], "nobody"))
    with pytest.raises(SynthesisError, match=f"{one.name} has no voice 'nobody'"):
        wrong.version()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_an_unknown_variant_of_the_real_program():
    with pytest.raises(SynthesisError, match="espeak-ng has no voice 'f99'"):
        EspeakNg(voices=("en-us", "en-us+f99")).version()
