"""Whatever is added, changed or killed, and in whatever order: nothing is computed twice, nothing is mixed.

A fake model answers at once. What it says depends on all ingredients, so that one answer of other ingredients
in a summary would be noticed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from PIL import Image

from kvprune.comparison import Progress, Settings, Summary, compare, describe_folder, read_run
from kvprune.comparison.data.examples import Example
from kvprune.comparison.execution import run
from kvprune.comparison.execution.encoder_reuse import EncoderReuse
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.storage import identity, manifest
from kvprune.comparison.storage.answers import Answer
from kvprune.comparison.storage.differences import differences
from kvprune.comparison.storage.results_folder import ResultsFolder

POLICIES = ("trim", "norm:reach=onward", "random:reach=onward", "lossless")
RATIOS = (0.5, 0.25, 0.1)


class World:
    """The ingredients of now, and a model that answers from them alone."""

    comparisons: ClassVar[int] = 0

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "results"
        self.encoder = EncoderReuse(None)
        self.model, self.tokens, self.source = "model-0", 16, {"trim": 0, "norm": 0}
        self.rows = [self.row(number) for number in range(6)]
        Image.new("RGB", (4, 4), "red").save(root / "picture.png")
        self.write()

    def row(self, number: int, version: int = 0) -> dict[str, Any]:
        question = f"question {number}, version {version}"
        task = ("read", "count")[number % 2]
        return {"id": f"q{number}", "task": task, "image": "picture.png"} | {
            "question": question,
            "answers": ["yes"],
        }

    def write(self) -> None:
        (self.root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def settings(self, folder: Path, **changes: Any) -> Settings:
        own = {"max_new_tokens": self.tokens, "data": self.root / "data.jsonl", "repetitions": 0}
        return Settings(
            output=folder, model="fake", device="cpu", answer_attention=False, **{**own, **changes}
        )

    def luck(self, *ingredients: object) -> int:
        return hashlib.sha256(repr((self.model, self.tokens, *ingredients)).encode()).digest()[0]

    # What stands in for the model.

    def check(self, examples: Sequence[Example]) -> None:
        pass

    def encode(self, examples: Sequence[Example]) -> Mapping[str, Any]:
        return {}

    def ask(
        self,
        generator: World,
        batch: Sequence[Example],
        inputs: Mapping[str, Any],
        one: Configuration,
        seed: int,
        full: Mapping[str, Answer],
    ) -> list[Answer]:
        name = one.policy.name
        drawn = seed if name == "random" else None
        self.never_twice(batch, one, drawn)
        answers = []
        for example in batch:
            right = self.luck(one.spec, self.source.get(name), drawn, example.digest) % 3 > 0
            said = "yes" if right else f"no {one.spec}"
            answers.append(
                Answer(
                    spec=one.spec,
                    seed=drawn,
                    id=example.id,
                    task=example.task,
                    answer=said,
                    correct=right,
                    agrees_with_full=name == REFERENCE or said == full[example.id].answer,
                    finished=True,
                    kept_fraction=one.keep_ratio or 1.0,
                    bytes_held=self.luck(one.spec, example.digest),
                    bytes_full=1000,
                    receipt=hashlib.sha256(f"{one.spec} {drawn} {example.id}".encode()).hexdigest(),
                )
            )
        return answers

    def never_twice(self, batch: Sequence[Example], one: Configuration, drawn: int | None) -> None:
        """Fail if the folder has all answers of a unit that is computed now."""
        folder = self.asked
        grid = ResultsFolder(folder).grid
        assert grid is not None
        ids = tuple(example.id for example in batch)
        address = grid.addresses().of(one.spec, ids, drawn)
        done = {row["id"] for row in rows(folder) if row["unit"] == address}
        assert done < set(ids), f"{one.spec} with seed {drawn} has answered {ids} already"

    def compare(
        self, folder: Path, policies: Sequence[str], ratios: Sequence[float], **changes: Any
    ) -> Summary:
        self.asked = folder
        World.comparisons += 1
        stop = changes.pop("stop_after", None)

        def on_progress(progress: Progress) -> None:
            nonlocal stop
            if stop is not None:
                stop -= 1
                if stop < 0:
                    raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "load_generator", lambda *_: self)
            patch.setattr(run, "ask", self.ask)
            patch.setattr(manifest, "model_digest", lambda _: self.model)
            real = identity._source_digest

            def source(cls: type) -> str:
                return f"{real(cls)} {self.source.get(getattr(cls, 'name', ''))}"

            patch.setattr(identity, "_source_digest", source)
            return compare(policies, ratios, self.settings(folder, **changes), on_progress)


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "results.jsonl"
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        yield json.loads(line)


class GrowingGrid(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.world = World(self.root)
        self.policies: set[str] = set()
        self.asked: set[tuple[str, float]] = set()
        self.ids: set[str] = set()
        self.draws = 1
        self.newest = 6
        self.lines: list[bytes] = []

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    @rule(
        policies=st.sets(st.sampled_from(POLICIES), min_size=1, max_size=2),
        ratios=st.sets(st.sampled_from(RATIOS), min_size=1, max_size=2),
        limit=st.integers(1, 3),
        tasks=st.sampled_from([("read",), ("count",), None]),
        draws=st.integers(1, 2),
        batch_size=st.integers(1, 4),
        stop_after=st.none() | st.integers(0, 12),
    )
    def ask(
        self,
        policies: set[str],
        ratios: set[float],
        limit: int,
        tasks: tuple[str, ...] | None,
        draws: int,
        batch_size: int,
        stop_after: int | None,
    ) -> None:
        """Ask for anything; perhaps be interrupted."""
        if tasks is not None and not any(row["task"] in tasks for row in self.world.rows):
            return
        try:
            self.world.compare(
                self.world.folder,
                sorted(policies),
                sorted(ratios),
                limit=limit,
                tasks=tasks,
                draws=draws,
                batch_size=batch_size,
                stop_after=stop_after,
            )
        except KeyboardInterrupt:
            return
        chosen = [row for row in self.world.rows if tasks is None or row["task"] in tasks]
        for task in ("read", "count"):
            self.ids |= {row["id"] for row in [row for row in chosen if row["task"] == task][:limit]}
        self.asked |= {(policy, ratio) for policy in policies for ratio in ratios}
        if any(policy.startswith("random") for policy, _ in self.asked):
            self.draws = max(self.draws, draws)  # seeds that nothing drew with are forgotten
        self.same_as_fresh()

    @rule(model=st.sampled_from(["model-0", "model-1"]), tokens=st.sampled_from([16, 8]))
    def change_what_all_share(self, model: str, tokens: int) -> None:
        self.world.model, self.world.tokens = model, tokens

    @rule(name=st.sampled_from(["trim", "norm"]), version=st.integers(0, 1))
    def edit_a_policy(self, name: str, version: int) -> None:
        self.world.source[name] = version

    @rule(at=st.floats(0, 1, exclude_max=True), version=st.integers(0, 1))
    def edit_a_question(self, at: float, version: int) -> None:
        at = int(at * len(self.world.rows))
        self.world.rows[at] = self.world.row(int(self.world.rows[at]["id"][1:]), version)
        self.world.write()

    @precondition(lambda self: len(self.world.rows) > 3)
    @rule(at=st.floats(0, 1, exclude_max=True))
    def remove_a_question(self, at: float) -> None:
        self.ids.discard(self.world.rows.pop(int(at * len(self.world.rows)))["id"])
        self.world.write()

    @rule()
    def add_a_question(self) -> None:
        self.world.rows.append(self.world.row(self.newest))
        self.newest += 1
        self.world.write()

    @rule(share=st.floats(0.3, 1))
    def kill(self, share: float) -> None:
        """Cut the results at any byte, as a kill in the middle of a write leaves them."""
        path = self.world.folder / "results.jsonl"
        if path.exists():
            content = path.read_bytes()
            path.write_bytes(content[: round(share * len(content))])
            self.lines = path.read_bytes().split(b"\n")[:-1]
            self.asked, self.ids, self.draws = set(), set(), 1  # what has no answer left is forgotten

    @invariant()
    def lines_never_go(self) -> None:
        path = self.world.folder / "results.jsonl" if hasattr(self, "world") else Path("none")
        if path.exists():
            now = path.read_bytes().split(b"\n")[:-1]
            assert now[: len(self.lines)] == self.lines
            self.lines = now

    def same_as_fresh(self) -> None:
        """Compare with a folder that asks for everything at once."""
        whole = read_run(self.world.folder)
        assert self.ids <= {one.id for one in whole.examples}
        labels = {(one.label, one.keep_ratio) for one in whole.configurations}
        assert {(p, r) for p, r in self.asked if p != "lossless"} <= labels
        assert set(range(self.draws)) <= set(whole.grid.seeds)
        fresh = self.root / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        kept = self.world.rows
        self.world.rows = [row for row in kept if row["id"] in whole.grid.digests]
        self.world.write()
        specs = [one.spec for one in whole.configurations]
        expected = self.world.compare(fresh, specs, (), draws=len(whole.grid.seeds), batch_size=4)
        self.world.rows = kept
        self.world.write()
        again = read_run(fresh)
        assert whole.answers == again.answers
        assert whole.missing == 0
        described = describe_folder(self.world.folder)
        assert (described.answers, described.missing) == (len(whole.answers), 0)
        assert described.old == sum(whole.old.values())
        assert described.answers + described.old == len(list(rows(self.world.folder)))
        found = json.loads((self.world.folder / "summary.json").read_text())
        wanted = json.loads(json.dumps(expected.to_dict()))
        assert not list(differences(by_spec(found), by_spec(wanted), tolerance=1e-12))


def by_spec(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what depends on the order and the size of batches."""
    rows = {row["spec"]: row for row in summary["rows"]}
    return {**summary, "rows": rows, "batch_size": 0, "tasks": sorted(summary["tasks"])}


def run_machine(examples: int) -> int:
    """Take steps at random and return how often something was compared.

    What the steps find is not shrunk, which would take minutes. The first examples hypothesis draws are so
    small that they compare nothing.
    """
    World.comparisons = 0
    run_state_machine_as_test(
        GrowingGrid,
        settings=settings(
            max_examples=examples,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            phases=(Phase.explicit, Phase.generate),
        ),
    )
    return World.comparisons


def test_whatever_happens_nothing_is_computed_twice_or_mixed() -> None:
    assert run_machine(40) > 10


@pytest.mark.slow
def test_whatever_happens_nothing_is_computed_twice_or_mixed_in_more_runs() -> None:
    assert run_machine(100) > 50


def test_an_answer_of_other_ingredients_would_be_noticed(tmp_path: Path) -> None:
    """The fake model's answers depend on each ingredient."""
    world = World(tmp_path)

    def found() -> Any:
        with suppress(FileNotFoundError):
            shutil.rmtree(world.folder)
        world.compare(world.folder, ["trim", "random:reach=onward"], RATIOS, limit=3)
        return frozenset((one.key, one.correct) for one in read_run(world.folder).answers.values())

    seen = [found()]
    for name, value in (("model", "model-1"), ("tokens", 8), ("source", {"trim": 1})):
        setattr(world, name, value)
        seen.append(found())
    world.rows[0] = world.row(0, 1)
    world.write()
    seen.append(found())
    assert len(set(seen)) == 5
