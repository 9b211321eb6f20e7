"""A guide in a comparison: its rows, their identity, what it gains and costs, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import contents, small_settings
from small_guides import save_guide

import kvprune
from kvprune import demo
from kvprune.comparison import Summary, compare, notes, read_run, verify
from kvprune.comparison.display.records import provenance, row_records
from kvprune.comparison.execution.batches import load_generator
from kvprune.comparison.execution.run import Run
from kvprune.comparison.plan.grid import exactly, expand, unite, with_guide
from kvprune.comparison.plan.settings import EMBEDDED_GUIDE, NO_GUIDE
from kvprune.comparison.statistics.columns import columns
from kvprune.comparison.statistics.contrasts import accuracy_contrast
from kvprune.comparison.storage.answers import Answer
from kvprune.errors import GuideError, PolicyOptionError, UnsupportedModelError

ALONE, OWN, OTHER = "full:model=guide", "guided:keep_ratio=0.25", "guided:guide=other,keep_ratio=0.25"
SPECS = ["full", ALONE, OWN, OTHER]


@pytest.fixture(scope="session")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_guide(tmp_path_factory.mktemp("guide") / "small", 1)


def run(output: Path, *policies: str, **changes: Any) -> Summary:
    """Compare at a quarter; without policies, guided."""
    return compare(policies or ["guided"], [0.25], small_settings(output, **changes))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, guide: Path) -> Path:
    """A finished comparison with a guide; tests copy it before they add to it."""
    folder = tmp_path_factory.mktemp("guided") / "results"
    run(folder, guide=str(guide))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "results")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Run) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Run, "_model", refuse)


# Rows


def test_a_guide_adds_a_row_to_each_that_asks_and_one_of_itself() -> None:
    found = with_guide(expand(["trim", "guided", "guided:keep_ratio=0.3,start=0.3"], [0.25, 0.1]))
    assert [one.spec for one in found] == [
        "full",
        ALONE,
        "trim:keep_ratio=0.25",
        "trim:keep_ratio=0.1",
        OWN,
        OTHER,
        "guided:keep_ratio=0.1",
        "guided:guide=other,keep_ratio=0.1",
        "guided:keep_ratio=0.3,start=0.3",
        "guided:guide=other,keep_ratio=0.3,start=0.3",
    ]
    own, other = found[4:6]
    assert other == replace(own, spec=OTHER, label="guided:guide=other", guide="guides")
    assert (found[1].label, found[1].budget, found[1].guide) == (ALONE, "", "answers")
    assert with_guide(found) == found
    plain = expand(["trim", "answer-attention"], [0.25])
    assert with_guide(plain) == plain


def test_rows_of_a_guide_are_read_back_from_their_specs() -> None:
    found = with_guide(expand(["guided"], [0.25]))
    assert exactly(SPECS) == found
    assert expand(["guided:guide=other", "full:model=guide"], [0.25]) == (found[0], found[3], found[1])
    whole, gone = unite(SPECS, expand(["guided"], [0.1]), with_answer_attention=False)
    assert [one.spec for one in whole] == [*SPECS, "guided:keep_ratio=0.1"]
    assert not gone


@pytest.mark.parametrize("spec", ["norm:guide=other", "guided:guide=mine", "lossless:model=guide"])
def test_only_what_can_have_a_guide_takes_one(spec: str) -> None:
    with pytest.raises(PolicyOptionError, match="has no option"):
        expand([spec], [0.25])


def test_a_policy_with_such_an_option_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = expand(["guided"], [0.25])
    types = type(plain[1].policy).option_types()
    monkeypatch.setattr(type(plain[1].policy), "option_types", lambda: {**types, "guide": str})
    with pytest.raises(PolicyOptionError, match=r"'guided' has an option 'guide' of its own.*--guide self"):
        with_guide(plain)


# Answers


def test_rows_answer_as_by_hand(finished: Path, guide: Path) -> None:
    stored = read_run(finished)
    assert [one.spec for one in stored.configurations] == SPECS
    generator = load_generator(stored.settings, "pictures")
    assert generator.guide is not None
    by_id = {one.id: one for one in stored.examples}
    for batch in stored.batches:
        inputs = generator.encode([by_id[name] for name in batch])
        expected = {ALONE: generator.guide.texts(generator.guide.generate(inputs))}
        for spec, other in ((OWN, None), (OTHER, generator.guide.model)):
            with kvprune.compress(generator.model, OWN, guide=other, reread=True) as compressed:
                expected[spec] = generator.texts(generator.generate(inputs))
            held = stored.answers[spec, None, batch[0]].bytes_held
            assert held == compressed.report.bytes_held // len(batch)
        for spec, texts in expected.items():
            assert [stored.answers[spec, None, name].answer for name in batch] == texts
    answers: list[Answer] = [stored.answers[spec, None, stored.examples[0].id] for spec in SPECS]
    assert len({one.receipt for one in answers}) == 4
    assert answers[1].bytes_held == answers[1].bytes_full == 2 * 260 * 16 * 2 * 4, "the guide's own cache"
    assert answers[0].bytes_full == answers[3].bytes_full != answers[1].bytes_full


def test_both_models_look_at_each_batch_once(folder: Path, guide: Path) -> None:
    stored = read_run(folder)
    generator = load_generator(stored.settings, "pictures")
    inputs = generator.encode(stored.examples)
    for one in stored.configurations:
        with generator.encoding_once(one), generator.compress_for(one, inputs, 0):
            generator.answering(one).generate(inputs)
    assert generator.guide is not None
    assert (generator.encoder.computed, generator.encoder.reused) == (1, 2)
    assert (generator.guide.encoder.computed, generator.guide.encoder.reused) == (1, 1)


def test_a_folder_with_a_guide_reproduces(folder: Path) -> None:
    before = contents(folder)
    found = verify(folder, sample=None)
    assert (found.differences, found.notes) == ((), ())
    assert found.answers == 16
    assert contents(folder) == before


def test_a_lost_or_changed_guide_is_noticed(folder: Path, guide: Path, tmp_path: Path) -> None:
    other = save_guide(tmp_path / "other", 7)
    place_guide(folder, other)
    found = verify(folder, sample=None)
    assert {one.spec for one in found.differences} == {ALONE, OTHER}
    changed = [note for note in found.notes if note.startswith("changed since: policies.")]
    assert [note.partition(" was ")[0] for note in changed] == [
        f"changed since: policies.{spec}.guide_digest" for spec in (ALONE, OTHER)
    ]
    place_guide(folder, tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match=r"cannot find model .*none.*--guide FOLDER"):
        verify(folder)


def place_guide(folder: Path, guide: Path) -> None:
    """Let the manifest of a folder say that its guide is elsewhere."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["about"]["guide"] = str(guide)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# Identity


def test_the_guide_is_part_of_the_identity_of_its_rows_and_of_no_other(
    folder: Path, guide: Path, tmp_path: Path
) -> None:
    stored = read_run(folder)
    having = [one["spec"] for one in stored.grid.policies if "guide_digest" in one]
    assert having == [ALONE, OTHER]
    said: list[str] = []
    changed = small_settings(folder, guide=str(save_guide(tmp_path / "other", 7)))
    compare(["guided"], [0.25], changed, on_note=said.append)
    again = read_run(folder)
    assert sum(again.old.values()) == 8, "the answers of both rows"
    for reason in again.old:
        assert "guide_digest was" in reason
        assert any(reason in note for note in said)
    for spec in SPECS:
        same = {
            again.answers[spec, None, one.id].receipt == stored.answers[spec, None, one.id].receipt
            for one in stored.examples
        }
        assert (same == {True}) == (spec in ("full", OWN)) or spec == ALONE  # it drops nothing


def test_a_finished_folder_is_summarised_without_loading_anything(
    folder: Path, guide: Path, no_model: None, tmp_path: Path, drawn: None
) -> None:
    before = contents(folder)
    run(folder, guide=str(guide))
    assert contents(folder) == before
    moved = shutil.copytree(guide, tmp_path / "moved")
    run(folder, "full", guide=str(moved), repetitions=0)  # named again, for the rows that the folder has
    assert read_run(folder).settings.guide == str(moved)


def test_a_folder_keeps_its_guide_until_another_is_named(folder: Path, guide: Path) -> None:
    found = run(folder, "guided:keep_ratio=0.1", repetitions=0)
    assert [row.spec for row in found.rows] == [
        *SPECS,
        "guided:keep_ratio=0.1",
        "guided:guide=other,keep_ratio=0.1",
    ]
    found = run(folder, "guided:keep_ratio=0.5", guide=NO_GUIDE, repetitions=0)
    assert [row.spec for row in found.rows][6:] == ["guided:keep_ratio=0.5"]
    assert read_run(folder).settings.guide == str(guide)


def test_a_guide_joins_a_folder_without_one(tmp_path: Path, guide: Path) -> None:
    found = run(tmp_path / "results", guide=NO_GUIDE, repetitions=0)
    assert [row.spec for row in found.rows] == ["full", OWN]
    assert read_run(tmp_path / "results").settings.guide == NO_GUIDE
    said: list[str] = []
    later = small_settings(tmp_path / "results", guide=str(guide), repetitions=0)
    found = compare(["guided"], [0.25], later, on_note=said.append)
    assert [row.spec for row in found.rows] == ["full", OWN, ALONE, OTHER]
    assert not read_run(tmp_path / "results").old
    assert not any("former runs" in note for note in said)


def test_the_embedded_guide_is_the_default_of_the_embedded_model(
    guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "guide_path", lambda: guide)
    found = run(tmp_path / "results", repetitions=0)
    assert [row.spec for row in found.rows] == SPECS
    assert read_run(tmp_path / "results").settings.guide == EMBEDDED_GUIDE
    assert verify(tmp_path / "results", sample=3).reproduces
    copied = shutil.copytree(demo.model_path(), tmp_path / "copy")
    found = run(tmp_path / "copied", repetitions=0, model=str(copied))
    assert [row.spec for row in found.rows] == ["full", OWN], "another model has no guide unless one is named"


# Gain and cost


def test_gain_is_paired_with_the_model_that_guides_itself(finished: Path, guide: Path) -> None:
    stored = read_run(finished)
    found = json.loads((finished / "summary.json").read_text())["rows"]
    assert [row["guide"] for row in found] == [None, "answers", None, "guides"]
    assert [row["self_guided"] for row in found] == [None, None, None, OWN]
    ids = [one.id for one in stored.examples]
    own, other = (columns(stored.answers, spec, (), ids) for spec in (OWN, OTHER))
    expected = accuracy_contrast(other, own)
    assert found[3]["versus_self_guided"] == json.loads(json.dumps(asdict(expected)))
    assert all(row["versus_self_guided"] is None for row in found[:3])


def test_the_cost_of_a_pass_is_timed_inside_the_call(finished: Path) -> None:
    (line,) = (finished / "timings.jsonl").read_text().splitlines()
    row = json.loads(line)
    times = row["policies"]
    assert [len(row["stock"]), *(len(times[spec]) for spec in SPECS)] == [2, 2, 2, 4, 4]
    for spec in (OWN, OTHER):
        first, _, seconds, _ = times[spec]
        assert 0 < seconds < first, "the guide runs before the first token"
    # One layer at a time: KV heads, columns, width, keys and values, float32; the demo model holds more.
    assert times[OTHER][3] == 260 * 16 * 2 * 4
    found = json.loads((finished / "summary.json").read_text())["rows"]
    assert found[3]["speed"]["guide_ratio"]["median"] == times[OTHER][2] / times["full"][1]
    assert found[3]["speed"]["guide_bytes"] == times[OTHER][3]
    assert (found[0]["speed"]["guide_ratio"], found[0]["speed"]["guide_bytes"]) == (None, 0)


def test_notes_say_what_a_guide_gains_and_costs_and_answers(folder: Path, guide: Path) -> None:
    summary = run(folder, guide=str(guide))
    gain, cost, alone = guided_notes(summary)
    own, other = summary.rows[2:]
    difference = other.versus_self_guided
    assert difference is not None
    assert gain == (
        "guided:guide=other is guided by another model, guided by the model itself. right % of both, and "
        f"their paired difference [95 %]: 25 %: {100 * other.main.value:.1f} and {100 * own.main.value:.1f}, "
        f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]."
    )
    assert other.speed is not None
    assert other.speed.guide_ratio is not None
    assert f"pass takes x{other.speed.guide_ratio.median:.2f} the time of a whole answer of full (32" in cost
    assert f"at most {260 * 16 * 2 * 4 / 2**20:.3g} MiB" in cost
    assert alone.startswith("full:model=guide is the guide alone with its own full cache: ")
    untimed = replace(summary, rows=tuple(replace(row, speed=None) for row in summary.rows))
    assert guided_notes(untimed) == [gain, alone]
    without = replace(summary, rows=(summary.rows[0], own))
    assert guided_notes(without) == []


def guided_notes(summary: Summary) -> list[str]:
    starts = ("guided:guide=other is", "The guide's pass", "full:model=guide is")
    return [note for note in notes(summary) if note.startswith(starts)]


def test_exports_have_the_guide(finished: Path, guide: Path) -> None:
    stored = read_run(finished)
    assert provenance(stored).guide == str(guide)
    summary = run(finished, guide=str(guide))
    records = row_records(summary)
    assert len({tuple(record) for record in records}) == 1
    assert [record["guide"] for record in records] == [None, "answers", None, "guides"]
    assert records[3]["versus_self_guided_pairs"] == 4
    assert records[3]["guide_bytes"] == 260 * 16 * 2 * 4


# What is refused


def test_a_guide_that_would_do_nothing_or_is_missing_is_refused(tmp_path: Path, guide: Path) -> None:
    with pytest.raises(GuideError, match=r"no policy here asks for a guide.*--policy guided"):
        run(tmp_path / "one", "trim", guide=str(guide))
    with pytest.raises(GuideError, match=f"{OTHER} needs a guide; name one with --guide FOLDER"):
        run(tmp_path / "two", "guided:guide=other", guide=NO_GUIDE)
    with pytest.raises(UnsupportedModelError, match=r"cannot find model .*--guide FOLDER"):
        run(tmp_path / "three", guide=str(tmp_path / "none"))


def test_a_missing_embedded_guide_is_an_error_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "guide_path", lambda: tmp_path / "none")
    with pytest.raises(UnsupportedModelError, match=r"comes without a guide: .*none is missing"):
        run(tmp_path / "results", guide=EMBEDDED_GUIDE)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "processor_config.json",
            lambda found: found["image_processor"].update(image_mean=[0.1, 0.5, 0.5]),
            r"picture processor 'image_mean' is \[0.1, 0.5, 0.5\] instead of \[0.5, 0.5",
        ),
        (
            "tokenizer.json",
            lambda found: found["model"]["vocab"].update(red=1000),
            "the id of token 'red' is 1000 instead of",
        ),
        ("chat_template.jinja", None, "it has another chat template"),
    ],
)
def test_a_guide_that_reads_prompts_otherwise_is_refused(
    file: str,
    change: Callable[[dict[str, Any]], Any] | None,
    message: str,
    guide: Path,
    tmp_path: Path,
) -> None:
    other = shutil.copytree(guide, tmp_path / "other")
    if change is None:
        (other / file).write_text((other / file).read_text() + " ")
    else:
        edit_json(other / file, change)
    with pytest.raises(GuideError, match=f"reads prompts otherwise than the model: .*{message}"):
        run(tmp_path / "results", guide=str(other))
    assert not (tmp_path / "results" / "results.jsonl").exists(), "nothing was computed"


def test_another_geometry_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    other = save_guide(tmp_path / "other", vision={"patch_size": 28})
    with pytest.raises(GuideError, match=r"another geometry \(patch size, columns per tile"):
        run(tmp_path / "results", guide=str(other))
    assert not (tmp_path / "results" / "results.jsonl").exists()
    found = run(tmp_path / "results", repetitions=0, model=str(demo.model_path()))
    assert [row.spec for row in found.rows] == ["full", OWN], "a guide that never took part is forgotten"
