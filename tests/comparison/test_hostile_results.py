"""Files of a results folder, damaged in every way: typed errors only, and what was there stays there.

No model is needed: `compare` on a finished folder only reads, and loading the model is made an error of its
own that stands for "this would be computed again".
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import SMALL_POLICIES, SMALL_RATIOS, forge_context, small_settings
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvprune.comparison import compare, verify
from kvprune.comparison.execution.generation import Generator
from kvprune.errors import KVPruneError, ResultsError

FILES = ("manifest.json", "results.jsonl", "timings.jsonl", "summary.json")
JOURNALS = ("results.jsonl", "timings.jsonl")

HOSTILE = {
    "nothing": b"",
    "zeros": b"\0" * 200,
    "no text": b"\xff\xfe\x00rubbish\x80",
    "lists without end": b"[" * 100_000,
    "objects without end": b'{"kind":' * 100_000,
    "not a number": b'{"kind": NaN}',
    "infinity": b'{"kind": -Infinity}',
    "larger than floats": b'{"kind": 1e999}',
    "a huge number": b'{"kind": ' + b"9" * 100_000 + b"}",
    "a key twice": b'{"kind": "kvprune comparison", "kind": "kvprune comparison"}',
    "half a pair": b'{"kind": "\\ud800"}',
    "null": b"null",
    "a list": b"[]",
    "text": b'"kvprune comparison"',
    "an empty object": b"{}",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}


class WouldComputeError(KVPruneError):
    """Stands for loading the model."""


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise WouldComputeError("something is left to compute")

    monkeypatch.setattr(Generator, "load", load)
    monkeypatch.setattr("kvprune.comparison.storage.manifest.model_digest", lambda *_: "sha256:fixed")


@pytest.fixture(scope="module")
def whole(finished_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder whose manifest has the digest that `no_model` puts there, and addresses with it."""
    folder = shutil.copytree(finished_folder, tmp_path_factory.mktemp("hostile") / "results")
    forge_context(folder, model_digest="sha256:fixed")
    return folder


@contextmanager
def copy_of(whole: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield shutil.copytree(whole, Path(name) / "results")


def attempt(folder: Path) -> str:
    """Verify and resume; return how resuming ended. Anything but a typed error fails the test."""
    before = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    with suppress(KVPruneError):
        verify(folder, sample=1)
    assert {name: (folder / name).read_bytes() for name in before} == before, "verify changes nothing"
    try:
        compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder))
        outcome = "done"
    except WouldComputeError:
        outcome = "would compute"
    except KVPruneError:
        outcome = "refused"
    for name, content in before.items():
        after = (folder / name).read_bytes()
        if name in JOURNALS and outcome != "refused":
            content = content[: content.rfind(b"\n") + 1]  # the unfinished last line may go
        if name in JOURNALS and outcome == "refused":
            assert after in (content, content[: content.rfind(b"\n") + 1])
        elif name == "manifest.json" and outcome != "refused":  # where the model and the data are may change
            kept = ("kind", "format", "created", "run", "run_sha256", "earlier")
            was, now = json.loads(content), json.loads(after)
            assert {part: was[part] for part in kept} == {part: now[part] for part in kept}
        elif name != "summary.json" or outcome != "done":  # it is made again from the other files
            assert after == content, name
    return outcome


def test_the_undamaged_folder_is_done(whole: Path) -> None:
    with copy_of(whole) as folder:
        assert attempt(folder) == "done"


@settings(max_examples=12)
@given(name=st.sampled_from(FILES), share=st.floats(0, 1))
@example(name="manifest.json", share=0.0)
@example(name="results.jsonl", share=0.0)
@example(name="timings.jsonl", share=0.0)
@example(name="summary.json", share=0.0)
def test_cut_at_any_byte(whole: Path, name: str, share: float) -> None:
    with copy_of(whole) as folder:
        content = (folder / name).read_bytes()
        left = round(share * len(content))
        (folder / name).write_bytes(content[:left])
        outcome = attempt(folder)
        if left >= len(content.rstrip()):
            assert outcome in ("done", "would compute")
        elif name == "manifest.json":
            assert outcome == "refused"
        else:
            assert outcome == ("would compute" if name in JOURNALS else "done")


@settings(max_examples=20)
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_byte_flipped(whole: Path, name: str, share: float, flip: int) -> None:
    with copy_of(whole) as folder:
        content = bytearray((folder / name).read_bytes())
        content[int(share * len(content))] ^= flip
        (folder / name).write_bytes(content)
        attempt(folder)


@settings(max_examples=15)
@given(name=st.sampled_from(FILES), start=st.floats(0, 1), rubbish=st.binary(min_size=1, max_size=64))
def test_rubbish_in_the_middle(whole: Path, name: str, start: float, rubbish: bytes) -> None:
    with copy_of(whole) as folder:
        content = (folder / name).read_bytes()
        at = round(start * len(content))
        (folder / name).write_bytes(content[:at] + rubbish + content[at + len(rubbish) :])
        attempt(folder)


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_content(whole: Path, content: bytes) -> None:
    for name in FILES:
        with copy_of(whole) as folder:
            (folder / name).write_bytes(content + b"\n")
            outcome = attempt(folder)
            assert outcome == ("done" if name == "summary.json" else "refused"), name


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in items for found in nodes(part, (*path, key)))][:400]


ODD = [None, True, -1, 0, 1e300, -0.5, 2**70, "", "x", "\u2028", [], {}, [[]], [1, 2], {"a": {}}, ["a", "b"]]


@settings(max_examples=40)
@given(data=st.data(), name=st.sampled_from(FILES), odd=st.sampled_from(ODD))
def test_values_of_another_kind(whole: Path, data: st.DataObject, name: str, odd: Any) -> None:
    with copy_of(whole) as folder:
        text = (folder / name).read_text()
        rows = [json.loads(line) for line in text.splitlines()] if name in JOURNALS else [json.loads(text)]
        path = data.draw(st.sampled_from([path for path in nodes(rows) if len(path) > 1]))
        holder = rows
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = odd
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        attempt(folder)


@pytest.mark.parametrize("name", [*FILES, "accuracy_vs_kept.png", "data"])
@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "pipe"])
def test_something_else_in_a_files_place(whole: Path, tmp_path: Path, name: str, kind: str) -> None:
    treasure = tmp_path / "treasure"
    treasure.write_text("years of work")
    with copy_of(whole) as folder:
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        if kind == "folder":
            if name == "data":
                return
            place.mkdir()
        elif kind == "pipe":
            os.mkfifo(place)
        else:
            place.symlink_to(treasure if kind == "link" else tmp_path / "nowhere")
        with pytest.raises(ResultsError, match=name):
            compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder))
        assert treasure.read_text() == "years of work"
        assert place.is_symlink() or place.exists()
        assert (folder / "results.jsonl").is_file() or name == "results.jsonl"
        if name != "accuracy_vs_kept.png":
            with pytest.raises(KVPruneError, match=name):
                verify(folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
@pytest.mark.parametrize("name", [*FILES, ""])
def test_unreadable_files(whole: Path, name: str) -> None:
    with copy_of(whole) as folder:
        (folder / name).chmod(0)
        try:
            with pytest.raises(KVPruneError):
                verify(folder)
            if name != "summary.json":
                with pytest.raises(ResultsError):
                    compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder))
        finally:
            (folder / name).chmod(0o755)


@pytest.mark.parametrize("name", FILES)
def test_errors_of_the_disk_are_typed(whole: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything, so the system's refusal is imitated."""
    real = Path.open

    def refuse(path: Path, *options: Any, **named: Any) -> Any:  # `read_bytes` calls it, too
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return real(path, *options, **named)

    with copy_of(whole) as folder:
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(ResultsError, match=f"{name} cannot be read: Permission denied"):
            verify(folder)
        monkeypatch.undo()


def test_a_full_disk_is_typed_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvprune.comparison.storage.journal import Journal, write_json

    journal = Journal(tmp_path / "results.jsonl")
    journal.append([{"a": 1}])
    write_json(tmp_path / "summary.json", {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"results.jsonl cannot be written: No space left on device"):
        journal.append([{"a": 2}])
    with pytest.raises(ResultsError, match=r"summary.json cannot be written: No space left on device"):
        write_json(tmp_path / "summary.json", {"a": 2})
    monkeypatch.undo()
    assert journal.recover()[0] == {"a": 1}
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["results.jsonl", "summary.json"]


@pytest.mark.parametrize(
    ("old", "new"), [('"max_new_tokens": 3', '"max_new_tokens": 4'), ("read-0001", "read-0009")]
)
def test_a_manifest_that_was_edited_is_not_written_again(whole: Path, old: str, new: str) -> None:
    with copy_of(whole) as folder:
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace(old, new))
        before = path.read_bytes()
        with pytest.raises(
            ResultsError, match=r"manifest.json is damaged: its 'run' was changed after it was written"
        ):
            compare(SMALL_POLICIES, SMALL_RATIOS, small_settings(folder))
        assert path.read_bytes() == before
