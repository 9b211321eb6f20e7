"""Checks of a results folder that need no model: right or wrong, completeness, the summary, what changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvprune.comparison.data.examples import is_correct, normalise
from kvprune.comparison.data.safe_json import parse
from kvprune.comparison.execution.generation import Generator, Measured
from kvprune.comparison.plan.grid import REFERENCE
from kvprune.comparison.statistics.summary import summarise
from kvprune.comparison.storage.addresses import digest
from kvprune.comparison.storage.answers import Transcript, to_row
from kvprune.comparison.storage.differences import differences
from kvprune.comparison.storage.identity import policy_identities
from kvprune.comparison.storage.manifest import build_about, build_context, guide_digest
from kvprune.comparison.storage.results_folder import MANIFEST, RESULTS, SUMMARY
from kvprune.comparison.storage.stored_run import StoredRun
from kvprune.errors import ResultsError

__all__ = ["Difference", "changes_since", "check_consistency", "compare_values", "judge_transcripts"]

_ROUNDING = 1e-9
"""Relative difference up to which floats count as equal: versions of libraries round differently."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that differs from what was stored.

    Attributes:
        where: name of the file, or spec and id of the example.
        what: which value was stored, and which one is found now.
        spec: spec of the configuration; None where the value belongs to none.
        example: id of the example; None where the value belongs to none.
    """

    where: str
    what: str
    spec: str | None = None
    example: str | None = None


def compare_values(
    where: str, stored: object, derived: object, spec: str | None = None, example: str | None = None
) -> Iterator[Difference]:
    """Yield every difference between a stored JSON tree and the one that was derived again."""
    for what in differences(stored, derived, tolerance=_ROUNDING):
        yield Difference(where, what, spec, example)


def changes_since(stored: StoredRun) -> list[str]:
    """Return a sentence for each change of model, data, policies, kvprune, versions or machine since the run.

    Raises:
        UnsupportedModelError: If the model or the guide is missing.
    """
    context, policies = (
        stored.grid.context,
        policy_identities(stored.configurations, guide_digest(stored.settings)),
    )
    # Device and trust are choices of whoever verifies, and no change of what was compared.
    chosen = {name: context[name] for name in ("device", "trust_remote_code")}
    now = {
        **build_context(stored.settings, stored.examples[0].kind, policies[0]),
        **chosen,
        "policies": {one["spec"]: one for one in policies},
        "examples": {one.id: one.digest for one in stored.examples},
    }
    before = {
        **context,
        "policies": {one["spec"]: one for one in stored.grid.policies},
        "examples": dict(stored.grid.digests),
    }
    about, machine = stored.manifest["about"], build_about(stored.settings)
    return [
        *differences(before, now),
        *(
            change
            for name in ("platform", "python", "threads")
            for change in differences({name: about.get(name)}, {name: machine[name]})
        ),
    ]


def check_consistency(stored: StoredRun) -> tuple[list[Difference], list[str]]:
    """Check everything that needs no model.

    Returns:
        Differences, which mean that the folder is not what was computed, and notes, which do not.
    """
    run = stored.manifest["run"]
    found = list(
        compare_values(
            f"{MANIFEST} (its 'run' was edited)",
            {"run_sha256": stored.manifest.get("run_sha256")},
            {"run_sha256": digest(run)},
        )
    )
    found += _judgements(stored)
    wrong, notes = _summary(stored)
    return found + wrong, notes


def _judgements(stored: StoredRun) -> Iterator[Difference]:
    """Judge every stored answer again: task, right or wrong, equal to the full cache's answer."""
    examples = {example.id: example for example in stored.examples}
    for (spec, _, name), answer in stored.answers.items():
        full = stored.answers.get((REFERENCE, None, name))
        derived: dict[str, Any] = {"task": examples[name].task}
        if not isinstance(answer, Transcript):  # see `judge_transcripts`
            derived["correct"] = is_correct(answer.answer, examples[name].answers)
        if full is not None:
            derived["agrees_with_full"] = normalise(answer.answer) == normalise(full.answer)
        judged = {field: getattr(answer, field) for field in derived}
        yield from compare_values(f"{spec}, example {name}", judged, derived, spec, name)


def judge_transcripts(stored: StoredRun, generator: Generator) -> Iterator[Difference]:
    """Count the errors of every stored transcript again; needs the model's normalisation of spelling.

    Args:
        stored: The comparison.
        generator: The model, which is not run.
    """
    examples = {example.id: example for example in stored.examples}
    measured = Measured.__annotations__
    for (spec, _, name), answer in stored.answers.items():
        if isinstance(answer, Transcript):
            row = to_row(answer)
            given = Measured(**{field: getattr(answer, field) for field in measured})  # type: ignore[typeddict-item]
            again = generator.judge(examples[name], given, tokens=answer.tokens, cap=answer.cap)
            yield from compare_values(f"{spec}, example {name}", row, to_row(again), spec, name)


def _summary(stored: StoredRun) -> tuple[list[Difference], list[str]]:
    """Check that all answers are there and that summary.json follows from them; see `check_consistency`."""
    missing = stored.missing
    wanted = len(stored.answers) + missing
    if stored.summary is None:
        state = f"{missing} of {wanted} answers are missing" if missing else f"{SUMMARY} is not written yet"
        return [], [f"the comparison is unfinished: {state}"]
    if missing:
        return [
            Difference(RESULTS, f"{missing} of {wanted} answers are missing, but there is a {SUMMARY}")
        ], []
    try:
        written = parse(stored.summary)
    except ValueError as error:
        return [Difference(SUMMARY, f"is damaged ({error})")], []
    timed = written.get("repetitions") if isinstance(written, dict) else None
    if isinstance(timed, bool) or not isinstance(timed, int) or not 0 <= timed <= len(stored.laps):
        what = f"repetitions was {timed!r:.40}, but {len(stored.laps)} were timed"
        return [Difference(SUMMARY, what)], []
    # A run that adds repetitions may be killed before it writes its summary. The summary in the folder is
    # then that of the earlier repetitions.
    try:
        derived = summarise(
            stored.configurations,
            stored.examples,
            stored.answers,
            dict(islice(stored.laps.items(), timed)),
            batch_size=stored.settings.batch_size,
            device=str(stored.grid.context["device"]),
            reread=stored.settings.reread,
            against=str(written.get("against", stored.settings.against)),
        )
    except ResultsError as error:  # transcripts that cannot be of the same recordings
        return [Difference(RESULTS, str(error))], []
    untimed = timed != len(stored.laps)
    notes = [f"{SUMMARY} counts {timed} of {len(stored.laps)} timed repetitions"] if untimed else []
    return list(compare_values(SUMMARY, written, json.loads(json.dumps(derived.to_dict())))), notes
