"""Verifies a results folder: runs a sampled part of a comparison again and says whether it reproduces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvprune.comparison.data.examples import Example
from kvprune.comparison.execution.batches import ask, batches, load_generator
from kvprune.comparison.execution.comparison import require
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Progress
from kvprune.comparison.storage.answers import Answer
from kvprune.comparison.storage.results_folder import SUMMARY
from kvprune.comparison.storage.stored_run import StoredRun, read_run
from kvprune.comparison.verification.consistency import (
    Difference,
    changes_since,
    check_consistency,
    compare_values,
)
from kvprune.errors import KVPruneError, ResultsError

__all__ = ["DEFAULT_SAMPLE", "Verification", "verify"]

DEFAULT_SAMPLE = 8
"""Batches under a configuration that are run again, beside the full cache."""

_COMPARED = ("answer", "finished", "kept_fraction", "bytes_held", "bytes_full", "receipt")
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Whether a comparison reproduces.

    Attributes:
        folder: the results folder.
        lines: finished answers in it, each of which was judged again.
        calls: batches under a configuration that were run again, the full cache included.
        answers: answers that were derived again.
        same_answers: those of them whose text is what was stored.
        same_receipts: those of them whose receipt is what was stored.
        differences: everything that is not what it should be.
        notes: what has changed since the run, or is unfinished; no fault by itself.
    """

    folder: str
    lines: int
    calls: int
    answers: int
    same_answers: int
    same_receipts: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def reproduces(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Return the verification as JSON-ready data."""
        return {"reproduces": self.reproduces, **asdict(self)}

    def __str__(self) -> str:
        verdict = "reproduces" if self.reproduces else "does not reproduce"
        lines = [f"note: {note}" for note in self.notes]
        lines.append(
            f"{verdict}: {self.same_answers} of {self.answers} answers, "
            f"{self.same_receipts} of {self.answers} receipts "
            f"({self.calls} batches run again; all {self.lines} lines and the summary checked)"
        )
        lines += [f"  {one.where}: {one.what}" for one in self.differences[:_SHOWN]]
        if len(self.differences) > _SHOWN:
            lines.append(f"  and {len(self.differences) - _SHOWN} more; --json lists them all")
        return "\n".join(lines)


def verify(
    folder: str | Path,
    *,
    sample: int | None = DEFAULT_SAMPLE,
    seed: int = 0,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Verification:
    """Run a sampled part of a comparison again, and check everything that needs no model.

    Nothing in the folder is changed. Batches are run as they were, with the same examples in the same order.

    Args:
        folder: Results folder of a finished or unfinished comparison.
        sample: Batches under a configuration to run again, spread over all configurations; the full cache
            answers each of these batches, too. None runs everything again.
        seed: Of the draw.
        trust_remote_code: Let transformers run Python files that come with the model. What the manifest
            says about this is not followed: a folder may come from somebody else.
        on_progress: Called before the first and after each batch.

    Raises:
        ResultsError: If the folder is no results folder, is damaged, or holds no answer.
        DataError: If its data are missing or damaged.
        UnsupportedModelError: If its model is missing or cannot be loaded.
        KVPruneError: If a policy of it is not installed, or `sample` is below 1.
    """
    require("scipy", "PIL")
    if sample is not None and sample < 1:
        raise KVPruneError(f"sample is {sample}; it must be at least 1")
    stored = read_run(Path(folder))
    if not stored.answers:
        raise ResultsError(f"{folder} holds no finished answer yet, so there is nothing to verify")
    settings = replace(stored.settings, trust_remote_code=trust_remote_code)
    if str(settings.device).startswith("cuda") and not torch.cuda.is_available():
        settings = replace(settings, device="cpu")
    stored = replace(stored, settings=settings)
    changed = changes_since(stored)
    found, notes = check_consistency(stored)
    pairs = 0
    same = {"answer": 0, "receipt": 0}
    plan = _draw(stored, sample, seed)
    calls = sum(len(configurations) for _, configurations in plan)
    for old, new in _run_again(stored, plan, calls, on_progress):
        before, after = ({name: getattr(one, name) for name in _COMPARED} for one in (old, new))
        found += compare_values(f"{old.spec}, example {old.id}", before, after, old.spec, old.id)
        pairs += 1
        for name in same:
            same[name] += before[name] == after[name]
    found.sort(key=lambda one: one.where == SUMMARY)  # what a summary follows from comes first
    return Verification(
        folder=str(folder),
        lines=len(stored.answers),
        calls=calls,
        answers=pairs,
        same_answers=same["answer"],
        same_receipts=same["receipt"],
        differences=tuple(found),
        notes=(*(f"changed since: {change}" for change in changed), *stored.notes, *notes),
    )


_Plan = list[tuple[Sequence[Example], list[Configuration]]]


def _draw(stored: StoredRun, sample: int | None, seed: int) -> _Plan:
    """Choose batches, and for each the configurations it is run under, the full cache first."""
    every = batches(stored.examples, stored.settings.batch_size)
    generator = random.Random(seed)
    queues = []
    for one in stored.configurations:
        queue = [
            number
            for number, batch in enumerate(every)
            if any((one.spec, example.id) in stored.answers for example in batch)
        ]
        if one.spec != REFERENCE or len(stored.configurations) == 1:
            queues.append((one, generator.sample(queue, len(queue))))
    generator.shuffle(queues)
    # Configurations take turns, so that a large enough sample meets each of them.
    turns = [(one, queue[turn]) for turn in range(len(every)) for one, queue in queues if turn < len(queue)]
    chosen = turns if sample is None else turns[:sample]
    reference = stored.configurations[0]
    plan = []
    for number, batch in enumerate(every):
        others = {one.spec for one, drawn in chosen if drawn == number}
        if others or (sample is None and any((REFERENCE, e.id) in stored.answers for e in batch)):
            rest = [one for one in stored.configurations if one.spec in others and one is not reference]
            plan.append((batch, [reference, *rest]))
    return plan


def _run_again(
    stored: StoredRun, plan: _Plan, calls: int, on_progress: Callable[[Progress], None]
) -> list[tuple[Answer, Answer]]:
    """Return stored and new answers, side by side."""
    pairs: list[tuple[Answer, Answer]] = []
    on_progress(Progress("loading the model", 0, calls))
    generator, done = load_generator(stored.settings), 0
    full: dict[str, str] = {}
    for batch, configurations in plan:
        inputs = generator.encode(batch)
        for one in configurations:
            fresh = ask(generator, batch, inputs, one, stored.settings.seed, full)
            if one.spec == REFERENCE:
                full = {answer.id: answer.answer for answer in fresh}
            pairs += [
                (stored.answers[new.spec, new.id], new)
                for new in fresh
                if (new.spec, new.id) in stored.answers
            ]
            done += 1
            on_progress(Progress("verifying", done, calls))
    return pairs
