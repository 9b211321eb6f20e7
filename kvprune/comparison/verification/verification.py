"""Verifies a results folder: runs a sample of a comparison again and says whether it reproduces."""

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
from kvprune.comparison.plan.settings import Progress, Settings
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
from kvprune.text import printable

__all__ = ["DEFAULT_SAMPLE", "Verification", "verify"]

DEFAULT_SAMPLE = 8
"""How many pairs of a batch and a configuration are run again, besides the full cache."""

_COMPARED = ("answer", "finished", "kept_fraction", "bytes_held", "bytes_full", "receipt")
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
    calls = sum(len(configurations) for _, configurations in plan)
    pairs = _run_again(stored, plan, calls, on_progress)
    for old, new in pairs:
        before, after = ({name: getattr(one, name) for name in _COMPARED} for one in (old, new))
        found += compare_values(f"{old.spec}, example {old.id}", before, after, old.spec, old.id)
    found.sort(key=lambda one: one.where == SUMMARY)  # differences of the summary follow from the others
    return Verification(
        folder=str(folder),
        lines=len(stored.answers),
        calls=calls,
        answers=len(pairs),
        same_answers=sum(old.answer == new.answer for old, new in pairs),
        same_receipts=sum(old.receipt == new.receipt for old, new in pairs),
        differences=tuple(found),
        notes=(*(f"changed since: {change}" for change in changed), *stored.notes, *notes),
    )


def _settings_here(settings: Settings, trust_remote_code: bool) -> Settings:
    """Return a run's settings with the caller's own trust, and on the CPU where there is no GPU."""
    if str(settings.device).startswith("cuda") and not torch.cuda.is_available():
        settings = replace(settings, device="cpu")
    return replace(settings, trust_remote_code=trust_remote_code)


_Plan = list[tuple[Sequence[Example], list[Configuration]]]
"""Batches to run again, and for each the configurations to run it under, the full cache first."""


def _draw(stored: StoredRun, sample: int | None, seed: int) -> _Plan:
    """Choose what to run again: batches, and the configurations to run each of them under."""
    every = batches(stored.examples, stored.settings.batch_size)
    turns = _turns(stored, every, seed)
    chosen = turns if sample is None else turns[:sample]
    reference, *others = stored.configurations
    plan = []
    for number, batch in enumerate(every):
        drawn = {spec for spec, drawn_number in chosen if drawn_number == number}
        if drawn or (sample is None and _is_answered(stored, REFERENCE, batch)):
            plan.append((batch, [reference, *(one for one in others if one.spec in drawn)]))
    return plan


def _turns(stored: StoredRun, every: Sequence[Sequence[Example]], seed: int) -> list[tuple[str, int]]:
    """Return all pairs of a spec and the number of an answered batch, in an order drawn at random.

    Configurations take turns, so that a large enough sample meets each of them. The full cache is left out,
    since it answers each chosen batch anyway, except where there is no other configuration.
    """
    generator = random.Random(seed)
    queues = []
    for one in stored.configurations:
        queue = [number for number, batch in enumerate(every) if _is_answered(stored, one.spec, batch)]
        if one.spec != REFERENCE or len(stored.configurations) == 1:
            queues.append((one.spec, generator.sample(queue, len(queue))))
    generator.shuffle(queues)
    return [(spec, queue[turn]) for turn in range(len(every)) for spec, queue in queues if turn < len(queue)]


def _is_answered(stored: StoredRun, spec: str, batch: Sequence[Example]) -> bool:
    """Whether the folder has an answer of a configuration to any example of a batch."""
    return any((spec, None, example.id) in stored.answers for example in batch)


def _run_again(
    stored: StoredRun, plan: _Plan, calls: int, on_progress: Callable[[Progress], None]
) -> list[tuple[Answer, Answer]]:
    """Run the batches of a plan; return pairs of the stored and the new answer to the same example."""
    pairs: list[tuple[Answer, Answer]] = []
    on_progress(Progress("loading the model", 0, calls))
    generator, done = load_generator(stored.settings, stored.examples[0].kind), 0
    full: dict[str, Answer] = {}
    for batch, configurations in plan:
        inputs = generator.encode(batch)
        for one in configurations:
            fresh = ask(generator, batch, inputs, one, stored.settings.seed, full)
            if one.spec == REFERENCE:
                full = {answer.id: answer for answer in fresh}
            pairs += [(stored.answers[new.key], new) for new in fresh if new.key in stored.answers]
            done += 1
            on_progress(Progress("verifying", done, calls))
    return pairs
