"""A folder of synthetic speech: its rows and recordings, resuming and growing, and what is refused."""

import hashlib
import json
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
from synthetic_voices import Hum

from kvprune.comparison.data.examples import Utterance, read_examples
from kvprune.demo.voices.conditions import CONDITIONS
from kvprune.demo.voices.sentences import sentences
from kvprune.demo.voices.speech_set import plan, write_speech_set
from kvprune.errors import DataError, SynthesisError


def rows(folder):
    return [json.loads(line) for line in (folder / "speech.jsonl").read_text("utf-8").splitlines()]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """A set of 12 recordings."""
    folder = tmp_path_factory.mktemp("speech") / "twelve"
    write_speech_set(folder, 12, seed=3, synthesisers=[Hum()])
    return folder


@pytest.fixture
def copy(twelve, tmp_path):
    """A copy of that set, to change."""
    return shutil.copytree(twelve, tmp_path / "copy")


def test_compare_reads_it(twelve):
    found = read_examples(twelve / "speech.jsonl")
    assert all(isinstance(one, Utterance) and one.language == "en" for one in found)
    assert [one.task for one in found] == list(CONDITIONS) * 4
    assert [one.reference for one in found] == sentences(12, seed=3)


def test_each_row_says_what_the_recording_is(twelve):
    for number, row in enumerate(rows(twelve)):
        assert row["id"] == f"{number:04d}-{row['voice']}-{row['task']}"
        assert row["audio"] == f"audio/{row['id']}.flac"
        assert row["synthesiser"] == "hum"
        info = soundfile.info(twelve / row["audio"])
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16000, 1)
        assert row["seconds"] == pytest.approx(info.duration, abs=0.0005)
        assert row["sha256"] == hashlib.sha256((twelve / row["audio"]).read_bytes()).hexdigest()
        speech = 0.05 * len(row["text"])
        around = row.get("silence_before", 0.0) + row.get("silence_after", 0.0)
        assert row["seconds"] == pytest.approx(speech + around, abs=0.002)
        assert ("snr_db" in row) == (row["task"] == "noisy")
        assert ("silence_before" in row) == (row["task"] == "silence")


def test_conditions_and_voices_are_crossed():
    found = plan(216)
    voices = {one.voice for one in found}
    assert Counter(one.condition for one in found) == dict.fromkeys(CONDITIONS, 72)
    assert set(Counter((one.condition, one.voice) for one in found).values()) == {72 // len(voices)}
    assert {one.synthesiser.name for one in found} == {"flite", "espeak-ng"}


def test_a_row_depends_on_the_seed_and_its_number_only(twelve, tmp_path):
    write_speech_set(tmp_path, 5, seed=3, synthesisers=[Hum()])
    assert rows(tmp_path) == rows(twelve)[:5]
    for row in rows(tmp_path):
        assert (tmp_path / row["audio"]).read_bytes() == (twelve / row["audio"]).read_bytes()
    other = plan(12, seed=4, synthesisers=[Hum()])
    assert not {one.text for one in other} & {row["text"] for row in rows(twelve)}


def test_the_manifest_says_where_all_comes_from(twelve):
    manifest = json.loads((twelve / "manifest.json").read_text("utf-8"))
    assert manifest["kind"] == "kvprune synthetic speech"
    assert manifest["seed"] == 3
    assert manifest["recordings"] == 12
    assert manifest["synthesisers"] == {
        "hum": {"version": "1.0", "voices": ["low", "high"], "settings": {}, "licence": "none"}
    }
    assert manifest["counts"] == {
        "task": dict.fromkeys(CONDITIONS, 4),
        "synthesiser": {"hum": 12},
        "voice": {"low": 6, "high": 6},
    }
    assert manifest["seconds"] == pytest.approx(sum(row["seconds"] for row in rows(twelve)), abs=0.06)
    assert manifest["conditions"]["snr"] == 20.0
    assert set(manifest["packages"]) == {"numpy", "soxr", "soundfile", "libsndfile"}
    assert manifest["command"] == "python -m kvprune.demo.voices --output FOLDER --count 12 --seed 3"
    assert str(twelve) not in json.dumps(manifest)


def test_other_rates_are_resampled(tmp_path):
    write_speech_set(tmp_path, 3, synthesisers=[Hum(rate=22050)])
    assert soundfile.info(tmp_path / rows(tmp_path)[0]["audio"]).samplerate == 16000


class TestResuming:
    def test_an_interrupted_call_is_continued(self, twelve, tmp_path):
        with pytest.raises(SynthesisError, match="hum is hoarse"):
            write_speech_set(tmp_path, 12, seed=3, synthesisers=[Hum(fails_at=7)])
        assert not (tmp_path / "speech.jsonl").exists()
        assert json.loads((tmp_path / "manifest.json").read_text())["recordings"] == 0
        hum = Hum()
        write_speech_set(tmp_path, 12, seed=3, synthesisers=[hum])
        assert hum.spoken == sentences(12, seed=3)[7:]
        assert contents(tmp_path) == contents(twelve)

    def test_a_finished_set_is_not_spoken_again(self, twelve, copy):
        hum = Hum()
        write_speech_set(copy, 12, seed=3, synthesisers=[hum])
        assert hum.spoken == []
        assert contents(copy) == contents(twelve)

    def test_a_set_grows(self, twelve, copy):
        hum = Hum()
        write_speech_set(copy, 15, seed=3, synthesisers=[hum])
        assert hum.spoken == sentences(15, seed=3)[12:]
        assert rows(copy)[:12] == rows(twelve)
        assert len(rows(copy)) == json.loads((copy / "manifest.json").read_text())["recordings"] == 15

    def test_a_set_that_fails_to_grow_stays_whole(self, twelve, copy):
        with pytest.raises(SynthesisError, match="hoarse"):
            write_speech_set(copy, 20, seed=3, synthesisers=[Hum(fails_at=2)])
        assert rows(copy) == rows(twelve)
        assert json.loads((copy / "manifest.json").read_text())["recordings"] == 12

    def test_what_a_killed_process_left_is_overwritten(self, twelve, tmp_path):
        (tmp_path / "manifest.json.part").write_text("{")
        write_speech_set(tmp_path, 1, seed=3, synthesisers=[Hum()])
        (tmp_path / "audio" / "0001-low-noisy.flac.part").write_text("fL")
        write_speech_set(tmp_path, 12, seed=3, synthesisers=[Hum()])
        assert contents(tmp_path) == contents(twelve)

    def test_a_recording_that_was_deleted_is_made_again(self, twelve, copy):
        (copy / rows(copy)[4]["audio"]).unlink()
        (copy / "speech.jsonl").unlink()
        write_speech_set(copy, 12, seed=3, synthesisers=[Hum()])
        assert contents(copy) == contents(twelve)

    def test_progress(self, copy):
        seen = []
        write_speech_set(copy, 14, 3, [Hum()], on_progress=lambda done, total: seen.append((done, total)))
        assert seen == [(done, 14) for done in range(15)]


class TestRefused:
    def call(self, folder, count=12, seed=3, **changed):
        return write_speech_set(folder, count, seed, [Hum(**changed)])

    def test_a_folder_with_other_files(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("all of it")
        with pytest.raises(
            DataError, match=r"holds other files, such as 'thesis.txt'; choose a new or empty folder"
        ):
            self.call(tmp_path)
        assert contents(tmp_path) == {"thesis.txt": b"all of it"}

    def test_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="file is no folder"):
            self.call(tmp_path / "file")

    @pytest.mark.parametrize(
        ("manifest", "message"),
        [
            ("{", "is no JSON file"),
            ("[]", "holds something else than kvprune synthetic speech"),
            ('{"kind": "results"}', "holds something else than kvprune synthetic speech"),
        ],
    )
    def test_a_folder_with_another_manifest(self, tmp_path, manifest, message):
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(DataError, match=message):
            self.call(tmp_path)
        assert contents(tmp_path) == {"manifest.json": manifest.encode()}

    def test_a_manifest_without_a_count(self, copy):
        path = copy / "manifest.json"
        path.write_text(path.read_text().replace('"recordings": 12', '"recordings": "many"'))
        with pytest.raises(DataError, match="recordings is 'many', not a number"):
            self.call(copy)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"seed": 4}, "other seed: 3, now 4"),
            ({"number": "1.1"}, "other synthesisers: .*1.0.*, now .*1.1"),
            ({"voices": ("low", "high", "deep")}, "other synthesisers: .*, now .*deep"),
            ({"settings": {"speed": 2.0}}, "other synthesisers: .*, now .*speed"),
        ],
    )
    def test_to_continue_a_set_of_another_origin(self, twelve, copy, changed, message):
        with pytest.raises(DataError, match=message):
            self.call(copy, **changed)
        assert contents(copy) == contents(twelve)

    def test_to_shrink(self, twelve, copy):
        with pytest.raises(DataError, match=r"holds 12 recordings, and 11 are asked for; ask for 12 or more"):
            self.call(copy, count=11)
        assert contents(copy) == contents(twelve)

    def test_another_recording_in_its_place(self, copy):
        one, other = (copy / row["audio"] for row in rows(copy)[:2])
        shutil.copy(one, other)
        with pytest.raises(
            DataError, match=r"noisy.flac is not the recording that speech.jsonl lists.*delete it"
        ):
            self.call(copy)

    @pytest.mark.parametrize("content", [b"", b"oh", None])
    def test_a_damaged_recording(self, copy, content):
        (copy / "speech.jsonl").unlink()
        path = copy / "audio" / "0001-low-noisy.flac"
        path.write_bytes(path.read_bytes()[:9000] if content is None else content)
        with pytest.raises(DataError, match=r"noisy.flac is (damaged|no whole FLAC).*delete it"):
            self.call(copy)

    def test_a_recording_of_another_kind(self, copy):
        (copy / "speech.jsonl").unlink()
        samples = np.full(100, 0.5)
        soundfile.write(copy / "audio" / "0001-low-noisy.flac", samples, 8000, format="FLAC")
        with pytest.raises(
            DataError, match="no whole FLAC of 16 bits, one channel and 16000 samples per second"
        ):
            self.call(copy)

    @pytest.mark.parametrize("table", ["{", "[]\n", '{"id": "a"}\n', "1\n"])
    def test_a_damaged_table(self, copy, table):
        (copy / "speech.jsonl").write_text(table)
        with pytest.raises(DataError, match=r"speech.jsonl is damaged; delete it"):
            self.call(copy)

    def test_voices_that_sound_the_same(self, tmp_path):
        with pytest.raises(SynthesisError, match="voices 'hum low' and 'hum high' sound the same"):
            self.call(tmp_path / "new", deaf=True)
        assert not (tmp_path / "new").exists()

    def test_more_than_thirty_seconds(self, tmp_path):
        with pytest.raises(
            SynthesisError, match=r"recording 0000-low-clean lasts 3\d.\d s; Whisper hears 30 s"
        ):
            self.call(tmp_path, longer=29.0)

    def test_clipping_names_the_recording(self, tmp_path):
        class Click(Hum):
            def _hum(self, text, voice):
                sound = super()._hum(text, voice)
                sound.samples[:] *= 1e-6
                sound.samples[::320] = 0.05 + 0.01 * self.voices.index(voice)
                sound.samples[0] = 1.0  # in one frame; the others are weak enough to need much gain
                return sound

        with pytest.raises(SynthesisError, match="recording 0000-low-clean: it would be clipped"):
            write_speech_set(tmp_path, 1, synthesisers=[Click()])

    @pytest.mark.parametrize("count", [0, -3, 10_001])
    def test_a_count_out_of_range(self, tmp_path, count):
        with pytest.raises(ValueError, match=f"count must be .* {count}"):
            self.call(tmp_path / "new", count=count)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("name", ["soundfile", "soxr"])
    def test_a_missing_package(self, tmp_path, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=f"recordings need {name}"):
            self.call(tmp_path / "new")
        assert not (tmp_path / "new").exists()
