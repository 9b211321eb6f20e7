"""Reads results folders and reduces them to the numbers of the page; refuses what does not fit together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.numbers import Contest, Estimate, EvidenceSet, Row
from evidence.plan import PlannedSet, check_command
from kvprune.comparison.data.utterances import Utterance
from kvprune.comparison.display.records import provenance
from kvprune.comparison.execution.support import adapter_for
from kvprune.comparison.plan.all_policies import every_policy
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.statistics.paired import PairedDifference
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.stored_summary import summary_of
from kvprune.comparison.statistics.summary import Row as SummaryRow
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.storage.differences import differences, in_one_sentence
from kvprune.comparison.storage.stored_run import StoredRun, read_run
from kvprune.errors import ResultsError
from kvprune.policy.decode import takes_steps
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry

PROMPT = frozenset({"queries", "text", "guidance", "question"})
"""What a policy can declare in `needs` that depends on the prompt.

"queries", "text" and "question" come from the rows of the prompt, "guidance" from a guide that reads it
(or the answer).
"raw_keys", "features" and "class_attention" come from the encoder, which has not seen the prompt;
"text_cache" and "grid" capture nothing, and "reconstruction" reads a text that no question changes.
"""

BASELINE = "random"


def gather(planned: PlannedSet, root: Path) -> EvidenceSet:
    """Return the numbers of one set.

    Args:
        planned: What the page shows.
        root: The folder that holds the results folders.

    Raises:
        ResultsError: If a folder is missing or unfinished, was made by another command, or several folders of
            the set differ in model, data or settings.
    """
    runs = [read_run(root / folder) for folder in planned.folders]
    for command, run in zip(planned.commands, runs, strict=True):
        check_command(command, run)
    stored = merged(runs)
    against = _label(stored, BASELINE)
    summary = summary_of(stored, against)
    configurations = {one.spec: one for one in stored.configurations}
    return EvidenceSet(
        **{field.name: getattr(planned, field.name) for field in dataclasses.fields(planned)},
        kind=summary.kind,
        examples=summary.examples,
        tasks=dict(summary.task_sizes),
        chance=dict(summary.constant_answer),
        languages=tuple(sorted({one.language for one in stored.examples if isinstance(one, Utterance)})),
        draws=len(stored.grid.seeds),
        reread=summary.reread,
        left_out=_left_out(stored),
        questions_digest=_digest([[one.id, one.digest] for one in stored.examples]),
        made=_made(stored),
        contests=tuple(_contests(stored, summary)),
        rows=tuple(
            _row(row, configurations[row.spec], against is not None)
            for row in summary.rows
            if row.guide is None
        ),
    )


def merged(runs: Sequence[StoredRun]) -> StoredRun:
    """Return several runs of the same questions under different policies as one.

    Raises:
        ResultsError: If one is unfinished, or they differ in anything but their policies.
    """
    first, *others = runs
    for run in runs:
        _check_finished(run)
    for other in others:
        found = list(differences(_ingredients(first), _ingredients(other)))
        if found:
            raise ResultsError(
                f"{first.folder} and {other.folder} do not belong into one table: {in_one_sentence(found)}"
            )
    configurations = {one.spec: one for run in runs for one in run.configurations}
    return dataclasses.replace(
        first,
        configurations=tuple(sorted(configurations.values(), key=lambda one: one.policy.reads_answer)),
        answers={key: answer for run in reversed(runs) for key, answer in run.answers.items()},
    )


def _check_finished(run: StoredRun) -> None:
    """Raise unless a run is finished."""
    if run.missing:
        raise ResultsError(
            f"{run.folder} is unfinished: {run.missing} answers are missing; run its command again"
        )


def check_together(sets: Mapping[str, EvidenceSet]) -> None:
    """Raise where sets that must share their questions do not, or sets that must differ in model do not.

    Raises:
        ResultsError: If a set names another one that is not there, asks other questions, or has its model.
    """
    for key, one in sets.items():
        if not one.same_questions_as:
            continue
        other = sets.get(one.same_questions_as)
        if other is None:
            raise ResultsError(f"[{key}] belongs beside [{one.same_questions_as}], which was not read")
        if one.questions_digest != other.questions_digest:
            raise ResultsError(f"[{key}] and [{other.key}] did not answer the same questions")
        if one.made["model digest"] == other.made["model digest"]:
            raise ResultsError(
                f"[{key}] and [{other.key}] were answered by the same model ({one.made['model digest']})"
            )


def reads_prompt(configuration: Configuration) -> bool:
    """Whether a policy declares that it needs something that depends on the prompt."""
    return bool(PROMPT & configuration.policy.needs)


def chooses_in_steps(configuration: Configuration) -> bool:
    """Whether a policy chooses in each decode step what is read, and so sees the answer as it grows."""
    return takes_steps(configuration.policy)


def _ingredients(run: StoredRun) -> dict[str, Any]:
    grid = run.grid
    return {
        **dict(grid.context),
        "seeds": list(grid.seeds),
        "examples": {one.id: one.digest for one in run.examples},
    }


def _label(stored: StoredRun, name: str) -> str | None:
    return next((one.label for one in stored.configurations if one.policy.name == name), None)


def _row(row: SummaryRow, of: Configuration, against: bool) -> Row:
    return Row(
        label=row.label,
        name=of.policy.name,
        keep_ratio=row.keep_ratio,
        kept=row.read,
        rate=_estimate(row.main),
        tasks={task: rate.value for task, rate in row.tasks.items()},
        reference=row.is_reference,
        reads_prompt=reads_prompt(of),
        published=bool(of.policy.paper),
        misses_budget=row.misses_budget,
        loops=row.speech.loops if row.speech else 0,
        versus_full=_contrast(row.versus_full),
        versus_answer=_contrast(row.versus_answer_attention),
        versus_random=_contrast(row.versus_baseline) if against else None,
        steps=chooses_in_steps(of),
        contrast=row.is_contrast,
    )


def _estimate(found: Rate | PairedDifference, holds: bool = False) -> Estimate:
    return Estimate(value=found.value, low=found.low, high=found.high, holds=holds)


def _contrast(found: Contrast | None) -> Estimate | None:
    if found is None:
        return None
    return _estimate(found, found.p_adjusted is not None and found.p_adjusted <= 0.05)


def _contests(stored: StoredRun, summary: Summary) -> list[Contest]:
    """Compare, at each budget, the best policy that reads the prompt with the best one that does not."""
    by_spec = {one.spec: one for one in stored.configurations}
    found = []
    for ratio in sorted({row.keep_ratio for row in summary.rows if row.keep_ratio is not None}, reverse=True):
        rows = [row for row in summary.rows if row.keep_ratio == ratio and row.guide is None]
        rows = [row for row in rows if row.competes and not row.misses_budget]
        rows = [row for row in rows if not chooses_in_steps(by_spec[row.spec])]
        best = [
            min((row for row in rows if reads_prompt(by_spec[row.spec]) is reads), key=_order, default=None)
            for reads in (True, False)
        ]
        if best[0] is None or best[1] is None:
            continue
        pair = [by_spec[one.spec] for one in best if one is not None]
        few = dataclasses.replace(stored, configurations=(by_spec[REFERENCE], *pair), laps={})
        (row,) = (row for row in summary_of(few, best[1].label).rows if row.spec == best[0].spec)
        assert row.versus_baseline is not None
        found.append(
            Contest(
                keep_ratio=ratio,
                reading=best[0].label,
                blind=best[1].label,
                difference=_estimate(row.versus_baseline),
            )
        )
    return found


def _order(row: SummaryRow) -> tuple[float, str]:
    return row.badness, row.label


def _left_out(stored: StoredRun) -> dict[str, str]:
    """Return the built-in methods that are not in the table, and why if the model's adapter says so."""
    every = every_policy(registry.load(), adapter_for(stored.settings))
    names = {one.policy.name for one in stored.configurations}
    found = {name: why for name, why in every.left_out.items() if name not in names}
    found |= {name: "" for spec in every.specs if (name := PolicySpec.parse(spec).name) not in names}
    return dict(sorted(found.items()))


def _made(stored: StoredRun) -> dict[str, str]:
    """Return where the results come from, without any path of the machine."""
    made, about = provenance(stored), stored.manifest["about"]
    return {
        "model": _last(made.model),
        "model digest": made.model_digest,
        "data": _last(made.data),
        "device": made.device,
        "dtype": made.dtype,
        "machine": f"{made.machine}, threads: {about.get('threads')}",
        "versions": made.versions,
        "date": made.created[:10],
        "kvprune source": str(stored.grid.context["kvprune_source_sha256"]),
    }


def _last(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
