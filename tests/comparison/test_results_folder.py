"""A results folder takes its own answers back, keeps those of other ingredients apart, and refuses damage."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import answer, build_grid, example, with_seeds, write_folder

from kvprune.comparison.plan.grid import Configuration, expand
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage.addresses import Addresses
from kvprune.comparison.storage.answer_lines import answer_rows, current
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.differences import differences
from kvprune.comparison.storage.growth import Growth, grow
from kvprune.comparison.storage.identity import model_digest
from kvprune.comparison.storage.manifest import build_about
from kvprune.comparison.storage.recorded_grid import Earlier, RecordedGrid, read_earlier, read_grid
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.comparison.storage.timings import read_timings, timing_row
from kvprune.errors import ResultsError

EXAMPLES = [example(number) for number in range(4)]
FULL = [answer("full", one, "7") for one in EXAMPLES]


@pytest.fixture
def grid(configurations: tuple[Configuration, ...]) -> RecordedGrid:
    return build_grid(configurations, EXAMPLES)


def read(path: Path, grid: RecordedGrid, *earlier: Earlier) -> tuple[dict[Key, Answer], dict[str, int]]:
    with ResultsFolder(path) as folder:
        folder.check()
        return current("results.jsonl", folder.answers(), grid, earlier)


def chunks(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(names[at : at + size]) for at in range(0, len(names), size)]


def grown(old: RecordedGrid, asked: RecordedGrid, batch_size: int = 4, **options: Any) -> Growth:
    given = {"available": dict(asked.digests), "answered": set(old.digests), "former": ()}
    return grow(old, asked, form=lambda names: chunks(names, batch_size), **{**given, **options})


def test_own_answers_are_taken_back(tmp_path: Path, grid: RecordedGrid) -> None:
    path = write_folder(tmp_path / "new" / "folder", grid, FULL[:1])
    before = (path / "manifest.json").read_bytes()
    with ResultsFolder(path) as folder:
        folder.check()
        assert folder.grid == grid
        folder.record(grid, (), build_about(Settings()))
    assert list(read(path, grid)[0]) == [("full", None, "e0")]
    assert (path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_new_tokens": 4}, "max_new_tokens was 16 and is now 4"),
        ({"attn_implementation": "eager"}, 'attn_implementation was null and is now "eager"'),
        ({"versions": {"torch": "1"}}, 'versions.torch was .* and is now "1"; versions.transformers was'),
        ({"kvprune_source_sha256": "0"}, 'kvprune_source_sha256 was ".*" and is now "0"'),
        ({"reference": "0"}, 'reference was ".*" and is now "0"'),
        ({"kind": "speech", "device": "x", "dtype": "y", "reread": False}, "kind .*; and 1 more$"),
    ],
)
def test_answers_of_other_ingredients_are_kept_apart_and_named(
    tmp_path: Path, grid: RecordedGrid, change: dict[str, Any], reason: str
) -> None:
    path = write_folder(tmp_path, grid, FULL)
    other = dataclasses.replace(grid, context={**grid.context, **change})
    growth = grown(grid, other)
    assert growth.replaced is not None
    assert growth.grid.batches == grid.batches
    answers, old = read(path, growth.grid, growth.replaced)
    assert not answers
    ((found, count),) = old.items()
    assert re.match(reason, found)
    assert count == 4
    back = grown(growth.grid, grid)
    assert len(read(path, back.grid, growth.replaced)[0]) == 4, "what was finished is found again"


def test_policies_join(grid: RecordedGrid) -> None:
    more = build_grid(expand(["norm:keep_ratio=0.5"], []), EXAMPLES)
    both = dataclasses.replace(grid, policies=(*grid.policies, more.policies[1]))
    growth = grown(grid, both)
    assert growth.replaced is None
    assert growth.notes == ()
    assert growth.grid.specs == [*grid.specs, "norm:keep_ratio=0.5"]


def test_answers_of_an_edited_policy_are_kept_apart_and_named(
    tmp_path: Path, configurations: tuple[Configuration, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = build_grid(configurations, EXAMPLES)
    trim = configurations[-1].spec
    path = write_folder(tmp_path / "out", grid, [*FULL, *(answer(trim, one, "7") for one in EXAMPLES)])
    policies = [{**one, "source_sha256": "edited"} if one["spec"] == trim else one for one in grid.policies]
    growth = grown(grid, dataclasses.replace(grid, policies=tuple(policies)))
    answers, old = read(path, growth.grid, growth.replaced)
    assert {spec for spec, _, _ in answers} == {"full"}, "policies that were not edited"
    ((reason, count),) = old.items()
    assert count == 4
    assert reason.startswith(f"policies.{trim}.source_sha256 was ")
    assert reason.endswith(f"the code of {trim} has changed since")


def test_a_policy_that_left_is_named(tmp_path: Path, grid: RecordedGrid) -> None:
    spec = grid.specs[-1]
    path = write_folder(tmp_path, grid, [answer(spec, one, "7") for one in EXAMPLES])
    growth = grown(grid, dataclasses.replace(grid, policies=grid.policies[:-1]))
    assert read(path, growth.grid, growth.replaced) == (
        {},
        {f"{spec} is no longer part of this folder's comparison": 4},
    )


def test_batches_stay_and_new_questions_form_new_ones(grid: RecordedGrid) -> None:
    asked = dataclasses.replace(grid, digests={one.id: one.digest for one in map(example, range(9))})
    growth = grown(grid, asked, batch_size=3)
    assert growth.grid.batches == (("e0", "e1", "e2", "e3"), ("e4", "e5", "e6"), ("e7", "e8"))
    assert list(growth.grid.digests) == [f"e{number}" for number in range(9)]
    assert growth.replaced is None
    fewer = dataclasses.replace(grid, digests={"e1": EXAMPLES[1].digest})
    kept = grown(growth.grid, fewer, batch_size=1, available=asked.digests)
    assert kept.grid == growth.grid
    assert kept.notes == ("this folder asks 9 questions, 8 more than this command; all of them are shown",)


def test_questions_without_any_answer_are_forgotten(grid: RecordedGrid) -> None:
    asked = dataclasses.replace(grid, digests={one.id: one.digest for one in EXAMPLES[:1]})
    growth = grown(grid, asked, answered=set(), available=grid.digests)
    assert growth.grid.batches == (("e0",),)


def test_changed_and_missing_questions_are_named_and_found_again(tmp_path: Path, grid: RecordedGrid) -> None:
    path = write_folder(tmp_path, grid, FULL)
    edited = {**{name: digest for name, digest in grid.digests.items() if name != "e3"}, "e1": "other"}
    growth = grown(grid, dataclasses.replace(grid, digests=edited))
    assert growth.grid.batches == (("e0", "e1", "e2"),)
    assert growth.notes == (
        "1 of 4 examples no longer in the data: e3",
        "1 of 4 examples changed in the data: e1",
    )
    assert growth.replaced is not None
    assert read(path, growth.grid, growth.replaced) == (
        {},
        {"a question of their batch has changed, or is gone from the data": 4},
    )
    elsewhere = dataclasses.replace(grid, digests={"x": "0"})
    gone = grown(grid, elsewhere)
    assert gone.grid.batches == (("x",),)
    assert gone.replaced is not None
    back = grown(gone.grid, grid, former=[gone.replaced], batch_size=1)
    assert back.grid.batches == grid.batches, "as it was, whatever the batch size is now"
    assert len(read(path, back.grid)[0]) == 4


def test_seeds_have_addresses_of_their_own(tmp_path: Path, grid: RecordedGrid) -> None:
    spec = grid.specs[2]
    drawn = [dataclasses.replace(answer(spec, EXAMPLES[0], "7"), seed=seed) for seed in (0, 1)]
    path = write_folder(tmp_path, with_seeds(grid, 0, 1), drawn)
    assert list(read(path, with_seeds(grid, 0, 1, 2))[0]) == [(spec, 0, "e0"), (spec, 1, "e0")]
    answers, old = read(path, with_seeds(grid, 1))
    assert list(answers) == [(spec, 1, "e0")]
    assert old == {"seed 0 is not among the seeds of this comparison": 1}


def test_addresses_depend_on_all_ingredients(grid: RecordedGrid) -> None:
    (batch,) = grid.batches
    first = grid.addresses().of("full", batch, None)
    digests = {**grid.digests, "e3": "other"}
    others = [
        dataclasses.replace(grid, context={**grid.context, name: "other"}).addresses().of("full", batch, None)
        for name in grid.context
    ]
    policies = grid.policies
    for name in policies[0]:
        changed = {**policies[0], name: "full" if name == "spec" else "other"}
        given = dataclasses.replace(grid, policies=(changed, *policies[1:]))
        others.append(given.addresses().of("full", batch, None) if name != "spec" else "same")
    others.append(dataclasses.replace(grid, digests=digests).addresses().of("full", batch, None))
    others.append(grid.addresses().of("full", batch, 0))
    turned = tuple(reversed(batch))
    others.append(dataclasses.replace(grid, batches=(turned,)).addresses().of("full", turned, None))
    assert len({first, *others}) == len(others) + 1
    unit = grid.addresses().find(first)
    assert unit is not None
    assert (unit.spec, unit.seed, unit.ids) == ("full", None, batch)
    assert isinstance(grid.addresses(), Addresses)
    assert grid.addresses().find("0" * 48) is None


def test_earlier_ingredients_come_back_from_json(grid: RecordedGrid) -> None:
    other = dataclasses.replace(grid, context={**grid.context, "dtype": "x"}, digests={"e9": "0"})
    replaced = grown(grid, other).replaced
    assert replaced is not None
    manifest = json.loads(json.dumps({"run": grid.to_json(), "earlier": [replaced.to_json()]}))
    assert read_earlier(Path("m"), manifest) == [replaced]
    assert read_grid(Path("m"), manifest["run"]) == grid


def test_a_manifest_that_was_changed_is_refused(tmp_path: Path, grid: RecordedGrid) -> None:
    path = write_folder(tmp_path, grid, FULL)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"max_new_tokens": 16', '"max_new_tokens": 17'))
    before = manifest.read_bytes()
    with ResultsFolder(path) as folder, pytest.raises(ResultsError, match="its 'run' was changed after it"):
        folder.check()
    assert manifest.read_bytes() == before


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ResultsError, match=r"is not a results folder: it holds 'thesis.tex' but no manifest.json"
    ):
        ResultsFolder(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ResultsError, match="file is a file; --output must name a folder"):
        ResultsFolder(path)


def test_leftovers_of_a_killed_start_are_no_obstacle(tmp_path: Path, grid: RecordedGrid) -> None:
    (tmp_path / ".kvprune-x1y2").write_text('{"kind": "kvpru')
    write_folder(tmp_path, grid)
    assert (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest.json is damaged"),
        (b'{"kind": "kvprune comp', "manifest.json is damaged .*Unterminated"),
        (b"\xff\xfe", "manifest.json is damaged .*utf-8"),
        (b"[]", "is not the manifest of a kvprune comparison"),
        (b'{"kind": "grocery list"}', "is not the manifest of a kvprune comparison"),
        (b'{"kind": "kvprune comparison", "format": 99}', "has format 99, but this kvprune reads 4"),
        (b'{"kind": "kvprune comparison", "format": 1}', "reads 4, since format 1 has no receipts"),
        (
            b'{"kind": "kvprune comparison", "format": 2}',
            "reads 4, since format 2 does not say how many tokens",
        ),
        (b'{"kind": "kvprune comparison", "format": 3}', "reads 4, since format 3 does not say with which"),
        (b'{"kind": "kvprune comparison", "format": 4, "run": 3}', "damaged: field 'run' is 3"),
    ],
)
def test_damaged_manifest_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ResultsError, match=message):
        ResultsFolder(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "norm"}, "line 2: spec 'norm' with seed None and example 'e1' is not part of unit"),
        ({"id": "e9"}, "line 2: spec 'full' with seed None and example 'e9' is not part of unit"),
        ({"seed": 0}, "line 2: spec 'full' with seed 0 and example 'e1' is not part of unit"),
        ({"seed": True}, "line 2 is damaged: field 'seed' is True"),
        ({"unit": "0" * 47}, "line 2 is damaged: field 'unit' is '0+', not 48 hexadecimal digits"),
        ({"unit": None}, "line 2 is damaged: field 'unit' is None, not 48 hexadecimal digits"),
        ({"id": "e0"}, "line 2: spec 'full' with example 'e0' appears twice"),
        ({"correct": 1}, "line 2 is damaged: field 'correct' is 1, not a bool"),
        ({"bytes_held": True}, "line 2 is damaged: field 'bytes_held' is True, not a int"),
        (
            {"words": 1, "word_errors": 0, "characters": 1, "character_errors": 0, "tokens": 1, "cap": 1}
            | {"loops": False},
            "line 2 is damaged: it is of the kind Transcript, not Answer",
        ),
        ({"answer": None}, "line 2 is damaged: field 'answer' is None"),
        ({"extra": 1}, "line 2 is damaged: field 'extra' is unknown"),
        ({"kept_fraction": 1.5}, "field 'kept_fraction' is 1.5, not between 0 and 1"),
        ({"bytes_held": -1}, "field 'bytes_held' is -1, not a number of bytes"),
        ({"bytes_full": 10**400}, "field 'bytes_full' is 1000.*, not a number of bytes"),
        ({"receipt": "A" * 64}, "field 'receipt' is 'AAA.*, not 64 hexadecimal digits"),
    ],
)
def test_lines_that_do_not_belong_are_refused(
    tmp_path: Path, grid: RecordedGrid, change: dict[str, Any], message: str
) -> None:
    path = write_folder(tmp_path, grid)
    unit = grid.addresses().of("full", grid.batches[0], None)
    first, second = answer_rows(unit, FULL[:2])
    ResultsFolder(path).results.append([first, {**second, **change}])
    before = (path / "results.jsonl").read_bytes()
    with pytest.raises(ResultsError, match=message):
        read(path, grid)
    assert (path / "results.jsonl").read_bytes() == before


def test_old_lines_are_checked_too(tmp_path: Path, grid: RecordedGrid) -> None:
    path = write_folder(tmp_path, grid)
    rows = answer_rows("0" * 48, FULL[:2])
    ResultsFolder(path).results.append(rows)
    reason = "they are of a run that manifest.json does not name"
    assert read(path, grid) == ({}, {reason: 2})
    ResultsFolder(path).results.append(rows[:1])
    with pytest.raises(ResultsError, match="line 3: spec 'full' with example 'e0' appears twice"):
        read(path, grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stock": [0, 1]}, r"\[0, 1\] is not a pair of seconds"),
        ({"stock": [1, 1e10]}, "is not a pair of seconds"),
        ({"stock": [1, 2, 3]}, "is not a pair of seconds"),
        ({"policies": {"full": ["1", "2"]}}, "is not a pair of seconds"),
        ({"policies": {}}, "it does not time 'full'"),
        ({"policies": 3}, "policies is 3"),
        ({"keys": {}}, "its keys are not those of its times"),
        ({"keys": 3}, "its keys are not those of its times"),
        ({"examples": []}, r"examples is \[\]"),
        ({"examples": [1]}, r"examples is \[1\]"),
        ({"repetition": 0}, "repetition is 0"),
        ({"repetition": True}, "repetition is True"),
    ],
)
def test_timings_that_cannot_be_are_refused(grid: RecordedGrid, change: dict[str, Any], message: str) -> None:
    addresses = grid.addresses()
    measured = {"repetition": 0, "stock": [1, 2.5], "policies": {"full": [1.5, 3]}}
    first = timing_row(measured, addresses, ["e0"], grid.digests)
    assert read_timings("timings.jsonl", [first], addresses, grid.digests).laps[0]["full"].all == 3
    with pytest.raises(ResultsError, match=rf"timings.jsonl, line 2 is damaged \(.*{message}"):
        read_timings("timings.jsonl", [first, {**first, "repetition": 1, **change}], addresses, grid.digests)


def test_times_of_other_ingredients_do_not_count(grid: RecordedGrid) -> None:
    measured = {
        "repetition": 3,
        "stock": [1, 2.5],
        "policies": {spec: [1.5, 3] for spec in ("full", "lossless")},
    }
    row = timing_row(measured, grid.addresses(), ["e0", "e2"], grid.digests)

    def timed(of: RecordedGrid) -> tuple[list[set[str | None]], int, tuple[str, ...] | None]:
        found = read_timings("timings.jsonl", [row], of.addresses(), of.digests)
        assert found.next == 4
        return [set(laps) for laps in found.laps.values()], found.old, found.examples

    assert timed(grid) == ([{None, "full", "lossless"}], 0, ("e0", "e2"))
    other = dataclasses.replace(grid, context={**grid.context, "dtype": "x"})
    assert timed(other) == ([], 1, None)
    edited = [{**one, "version": 99} if one["spec"] == "lossless" else one for one in grid.policies]
    assert timed(dataclasses.replace(grid, policies=tuple(edited))) == ([{None, "full"}], 0, ("e0", "e2"))
    assert timed(dataclasses.replace(grid, digests={**grid.digests, "e2": "x"})) == ([], 1, None)


def test_line_without_a_field_is_refused(tmp_path: Path, grid: RecordedGrid) -> None:
    path = write_folder(tmp_path, grid)
    (row,) = answer_rows("0" * 48, FULL[:1])
    del row["kept_fraction"]
    ResultsFolder(path).results.append([row])
    with pytest.raises(ResultsError, match="line 1 is damaged: field 'kept_fraction' is missing"):
        read(path, grid)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    second = ResultsFolder(tmp_path)
    with ResultsFolder(tmp_path), pytest.raises(ResultsError, match="is in use by another run"):
        second.__enter__()
    with ResultsFolder(tmp_path):
        pass


def test_differences_are_named_by_their_path() -> None:
    def first(old: object, new: object) -> str | None:
        return next(differences(old, new), None)

    assert first({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b was 2 and is now 3"
    assert first({"a": 1}, {"a": 1, "c": 2}) == "c was null and is now 2"
    assert first({"a": True}, {"a": 1}) == "a was true and is now 1"
    assert first(["a", "b"], ["a"]) == ' had 2 entries and now has 1 (first extra: "b")'


def test_model_digest_follows_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("first")
    before = model_digest(str(tmp_path))
    (tmp_path / "README.md").write_text("second")
    assert model_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert model_digest(str(tmp_path)) != before
