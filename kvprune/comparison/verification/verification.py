"""Verifies a results folder: runs a sample of a comparison again and says whether it reproduces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvprune.comparison.data.examples import Example
from kvprune.comparison.data.packages import require
from kvprune.comparison.execution.batches import ask, load_generator
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Progress, Settings
from kvprune.comparison.storage.answers import Answer, to_row
from kvprune.comparison.storage.recorded_grid import Batch
from kvprune.comparison.storage.results_folder import SUMMARY
from kvprune.comparison.storage.stored_run import StoredRun, read_run
from kvprune.comparison.verification.consistency import (
    Difference,
    changes_since,
    check_consistency,
    compare_values,
    judge_transcripts,
)
from kvprune.errors import KVPruneError, ResultsError
from kvprune.text import printable

__all__ = ["DEFAULT_SAMPLE", "Verification", "verify"]

DEFAULT_SAMPLE = 8
"""How many pairs of a batch and a configuration are run again, besides the full cache."""

_JUDGED = ("spec", "id", "task", "correct", "agrees_with_full")
"""Fields that are judged without the model, or say which answer it is; all others are compared."""

_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Whether a comparison reproduces.

    Attributes:
        folder: the results folder.
        lines: finished answers in the folder; each was judged again.
        calls: how many times a batch was run again under a configuration, the full cache included.
        answers: answers that were generated again.
        same_answers: how many of them have the stored text.
        same_receipts: how many of them have the stored receipt.
        differences: everything that differs from what was stored.
        notes: what has changed since the run, or is unfinished; not an error by itself.
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
        return "\n".join(printable(line) for line in lines)  # ids and specs are others' text


def verify(
    folder: str | Path,
    *,
    sample: int | None = DEFAULT_SAMPLE,
    seed: int = 0,
    trust_remote_code: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Verification:
    """Run a sample of a comparison again, and check everything that needs no model.

    Nothing in the folder is changed. A batch is run again with the same examples in the same order.

    Args:
        folder: Results folder of a finished or unfinished comparison.
        sample: How many pairs of a batch and a configuration to run again, spread over all configurations.
            The full cache answers each of these batches, too. None runs everything again.
        seed: Seed for drawing the sample.
        trust_remote_code: Let transformers run Python files that come with the model. The manifest's own
            value is ignored, since a folder may come from somebody else.
        on_progress: Called before the first and after each batch.

    Raises:
        ResultsError: If the folder is not a results folder, is damaged, or holds no answer.
        DataError: If the data of the run are missing or damaged.
        UnsupportedModelError: If the model of the run is missing or cannot be loaded.
        KVPruneError: If a policy of the run is not installed, or `sample` is below 1.
    """
    require("scipy", "PIL")
    if sample is not None and sample < 1:
        raise KVPruneError(f"sample is {sample}; it must be at least 1")
    stored = read_run(Path(folder))
    if not stored.answers:
        raise ResultsError(f"{folder} holds no finished answer yet, so there is nothing to verify")
    stored = replace(stored, settings=_settings_here(stored.settings, trust_remote_code))
    changed = changes_since(stored)
    found, notes = check_consistency(stored)
    plan = _draw(stored, sample, seed)
    calls = sum(len(runners) for _, runners in plan)
    pairs, misjudged = _run_again(stored, plan, calls, on_progress)
    found += misjudged
    for old, new in pairs:
        where = f"{old.spec}, example {old.id}"
        found += compare_values(where, _measured(old), _measured(new), old.spec, old.id)
    found.sort(key=lambda one: one.where == SUMMARY)  # differences of the summary follow from the others
    return Verification(
        folder=str(folder),
        lines=len(stored.answers),
        calls=calls,
        answers=len(pairs),
        same_answers=sum(old.answer == new.answer for old, new in pairs),
        same_receipts=sum(old.receipt == new.receipt for old, new in pairs),
        differences=tuple(found),
        notes=(*(f"changed since: {change}" for change in changed), *stored.notes, *_old(stored), *notes),
    )


def _measured(answer: Answer) -> dict[str, Any]:
    return {name: value for name, value in to_row(answer).items() if name not in _JUDGED}


def _old(stored: StoredRun) -> list[str]:
    """Return a note for each reason why answers in the folder were not verified."""
    return [
        f"{count} answers are not part of the present comparison, and were not verified: {reason}"
        for reason, count in stored.old.items()
    ]


def _settings_here(settings: Settings, trust_remote_code: bool) -> Settings:
    """Return a run's settings with the caller's own trust, and on the CPU where there is no GPU."""
    if str(settings.device).startswith("cuda") and not torch.cuda.is_available():
        settings = replace(settings, device="cpu")
    return replace(settings, trust_remote_code=trust_remote_code)


_Runner = tuple[Configuration, int | None]
"""A configuration, and the seed to run it with; None where it drew nothing."""

_Plan = list[tuple[Sequence[Example], list[_Runner]]]
"""Batches to run again, and for each what to run it under, the full cache first."""


def _draw(stored: StoredRun, sample: int | None, seed: int) -> _Plan:
    """Choose what to run again: batches, and the configurations and seeds to run each of them under."""
    turns = _turns(stored, seed)
    chosen = set(turns if sample is None else turns[:sample])
    by_id = {one.id: one for one in stored.examples}
    reference, *others = stored.configurations
    plan: _Plan = []
    for number, batch in enumerate(stored.batches):
        drawn: list[_Runner] = [
            (one, of)
            for one in others
            for of in (None, *stored.grid.seeds)
            if (one.spec, of, number) in chosen
        ]
        alone = (reference.spec, None, number) in chosen
        if drawn or alone or (sample is None and _is_answered(stored, REFERENCE, None, batch)):
            plan.append(([by_id[name] for name in batch], [(reference, None), *drawn]))
    return plan


def _turns(stored: StoredRun, seed: int) -> list[tuple[str, int | None, int]]:
    """Return all answered triples of a spec, a seed and the number of a batch, in an order drawn at random.

    Configurations take turns, and so do the seeds of one, so that a large enough sample meets each of them.
    The full cache is left out, since it answers each chosen batch anyway, except where there is no other
    configuration.
    """
    generator = random.Random(seed)
    queues = []
    for one in stored.configurations:
        for of in (None, *stored.grid.seeds):
            numbers = enumerate(stored.batches)
            queue = [number for number, batch in numbers if _is_answered(stored, one.spec, of, batch)]
            if queue and (one.spec != REFERENCE or len(stored.configurations) == 1):
                queues.append((one.spec, of, generator.sample(queue, len(queue))))
    generator.shuffle(queues)
    rounds = range(len(stored.batches))
    return [(spec, of, queue[turn]) for turn in rounds for spec, of, queue in queues if turn < len(queue)]


def _is_answered(stored: StoredRun, spec: str, seed: int | None, batch: Batch) -> bool:
    """Whether the folder has an answer of a configuration, with a seed, to any example of a batch."""
    return any((spec, seed, name) in stored.answers for name in batch)


def _run_again(
    stored: StoredRun, plan: _Plan, calls: int, on_progress: Callable[[Progress], None]
) -> tuple[list[tuple[Answer, Answer]], list[Difference]]:
    """Run the batches of a plan, and judge all transcripts again.

    Returns:
        Pairs of the stored and the new answer to the same example, and transcripts that were misjudged.
    """
    pairs: list[tuple[Answer, Answer]] = []
    on_progress(Progress("loading the model", 0, calls))
    generator, done = load_generator(stored.settings, stored.examples[0].kind), 0
    full: dict[str, Answer] = {}
    for batch, runners in plan:
        inputs = generator.encode(batch)
        for one, seed in runners:
            fresh = ask(generator, batch, inputs, one, stored.grid.seeds[0] if seed is None else seed, full)
            if one.spec == REFERENCE:
                full = {answer.id: answer for answer in fresh}
            known = [(stored.answers.get((one.spec, seed, new.id)), new) for new in fresh]
            pairs += [(old, new) for old, new in known if old is not None]
            done += 1
            on_progress(Progress("verifying", done, calls))
    return pairs, list(judge_transcripts(stored, generator))
