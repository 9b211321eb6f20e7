"""The recordings of the demo of speech: what they are, that they are whole, and that they are installed."""

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import soundfile

from kvprune import demo
from kvprune.comparison.data.examples import Utterance, read_examples

ROOT = Path(__file__).parents[2]
FOLDER = demo.speech_data().parent
README = (FOLDER / "README.md").read_text("utf-8")


def test_five_utterances_are_read():
    found = read_examples(demo.speech_data())
    assert all(isinstance(one, Utterance) and one.language == "en" for one in found)
    assert [one.id for one in found] == [
        f"austen-{number}" for number in ("0870", "0880", "0890", "0920", "0930")
    ]
    assert sum(one.seconds for one in found) == pytest.approx(24.73, abs=0.01)
    assert sum(len(one.reference.split()) for one in found) == 71


def test_the_readme_says_what_each_file_is():
    rows = re.findall(r"^\| `(.*?\.flac)` \| `(.*?\.wav)` \| ([\d.]+) \| `(\w{64})` \|", README, re.MULTILINE)
    assert {name for name, *_ in rows} == {path.name for path in FOLDER.glob("*.flac")}
    for name, _, seconds, digest in rows:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest
        info = soundfile.info(FOLDER / name)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.duration == pytest.approx(float(seconds), abs=0.005)


@pytest.mark.parametrize(
    "words", ["LibriVox", "public domain", "Jane Austen", "Pocketsphinx", "a more a amiable", "16000 samples"]
)
def test_the_readme_says_where_they_come_from(words):
    assert words in " ".join(README.split())


def test_their_names_say_nothing_else():
    assert {path.suffix for path in FOLDER.iterdir()} == {".flac", ".jsonl", ".md"}


@pytest.mark.skipif(not (ROOT / "kvprune").exists(), reason="what is tested is installed, not in place")
def test_a_wheel_has_them(tmp_path):
    source = tmp_path / "source"
    for folder in ("kvprune", "strategies"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("model", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    (source / "wheels").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {
            name: archive.read(name) for name in archive.namelist() if name.startswith("kvprune/demo/speech/")
        }
    assert held == {f"kvprune/demo/speech/{path.name}": path.read_bytes() for path in FOLDER.iterdir()}


def test_the_extra_for_speech_needs_nothing_of_the_demo_of_pictures():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {re.split(r"[^\w-]", requirement)[0] for requirement in extras["speech"]}
    assert named == {"jiwer", "matplotlib", "pillow", "scipy", "soundfile", "soxr"}
    code = (
        "import sys\nsys.modules['sklearn'] = None\n"
        "from kvprune import demo\nfrom kvprune.comparison.data.examples import read_examples\n"
        "from kvprune.comparison.execution import comparison\nprint(len(read_examples(demo.speech_data())))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["5"]
