"""Rows, examples and answers to build tests of comparisons from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvprune.comparison import Settings
from kvprune.comparison.data.examples import Example, Question
from kvprune.comparison.plan.grid import Configuration
from kvprune.comparison.storage.addresses import context_key, digest
from kvprune.comparison.storage.answer_lines import answer_rows
from kvprune.comparison.storage.answers import Answer
from kvprune.comparison.storage.identity import policy_identities
from kvprune.comparison.storage.manifest import build_about, build_context
from kvprune.comparison.storage.recorded_grid import RecordedGrid
from kvprune.comparison.storage.results_folder import ResultsFolder


def row(**changes: Any) -> dict[str, Any]:
    """A good row with changes; a value of None removes the field."""
    whole = {"image": "good.png", "question": "what?", "answers": ["red"], **changes}
    return {field: value for field, value in whole.items() if value is not None}


def example(number: int, task: str = "read", answers: tuple[str, ...] = ("7",)) -> Example:
    return Question(
        id=f"e{number}",
        task=task,
        file=Path("none.png"),
        question="which?",
        answers=answers,
        file_sha256=f"{number:064x}",
    )


def answer(spec: str, of: Example, text: str, full: str = "7", kept: float = 1.0) -> Answer:
    return Answer(
        spec=spec,
        id=of.id,
        task=of.task,
        answer=text,
        correct=text in of.answers,
        agrees_with_full=text == full,
        finished=True,
        kept_fraction=kept,
        bytes_held=round(1000 * kept),
        bytes_full=1000,
        receipt=f"{round(1e6 * kept):064x}",
    )


SMALL_POLICIES = ("trim", "random:reach=onward", "lossless")
SMALL_RATIOS = (0.25,)
SMALL_SPECS = ("full", "trim:keep_ratio=0.25", "random:keep_ratio=0.25,reach=onward", "lossless")


def small_settings(output: Path, **changes: Any) -> Settings:
    small = {"tasks": ("read", "count"), "limit": 2, "batch_size": 3, "max_new_tokens": 3, "repetitions": 1}
    return Settings(output=output, **{"answer_attention": False, **small, **changes})


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder, by its path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def build_grid(
    configurations: Sequence[Configuration], examples: Sequence[Example], batch_size: int = 4, **context: Any
) -> RecordedGrid:
    """A grid of configurations and examples; `context` replaces shared ingredients."""
    policies = policy_identities(configurations)
    shared = build_context(Settings(device="cpu", max_new_tokens=16), "pictures", policies[0])
    names = [one.id for one in examples]
    return RecordedGrid(
        context={**shared, **context},
        policies=tuple(policies),
        seeds=(0,),
        origin="pictures",
        data_seed=0,
        digests={one.id: one.digest for one in examples},
        batches=tuple(tuple(names[at : at + batch_size]) for at in range(0, len(names), batch_size)),
    )


def write_folder(path: Path, grid: RecordedGrid, answers: Sequence[Answer] = ()) -> Path:
    """A results folder with a grid and answers of it."""
    addresses = grid.addresses()
    with ResultsFolder(path) as folder:
        folder.check()
        folder.record(grid, (), build_about(Settings()))
        for one in answers:
            (batch,) = (batch for batch in grid.batches if one.id in batch)
            folder.results.append(answer_rows(addresses.of(one.spec, batch, one.seed), [one]))
    return path


def with_seeds(grid: RecordedGrid, *seeds: int) -> RecordedGrid:
    return replace(grid, seeds=seeds)


def forge_context(folder: Path, **changes: Any) -> None:
    """Change shared ingredients of a folder, its addresses and its digest, so that nothing shows the edit."""
    manifest = json.loads((folder / "manifest.json").read_text())
    before = context_key(manifest["run"]["context"])
    manifest["run"]["context"].update(changes)
    manifest["run_sha256"] = digest(manifest["run"])
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for name in ("results.jsonl", "timings.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(before, context_key(manifest["run"]["context"])))
