"""How the results of two results folders differ, configuration by configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvprune.comparison.statistics.columns import Columns, columns, drawn_seeds
from kvprune.comparison.statistics.contrasts import Contrast, accuracy_contrast, error_contrast
from kvprune.comparison.statistics.error_rates import ErrorRates
from kvprune.comparison.statistics.rates import Rate, mean_rate
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.differences import differences
from kvprune.comparison.storage.stored_run import StoredRun
from kvprune.errors import ResultsError

__all__ = ["RunDifference", "RunDifferences", "compare_runs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifference:
    """How one configuration differs between two folders, on the examples that both answered.

    Attributes:
        spec: canonical spec of the policy.
        first: rate of the first folder; accuracy, or for speech the word error rate.
        second: rate of the second folder.
        difference: the second rate minus the first, paired.
        examples: number of these examples.
        answers: answers that were compared: examples times draws that both have.
        same_answers: answers whose text is the same.
        same_receipts: answers for which the same tokens were kept.
    """

    spec: str
    first: Rate
    second: Rate
    difference: Contrast
    examples: int
    answers: int
    same_answers: int
    same_receipts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDifferences:
    """How two results folders differ.

    Attributes:
        kind: what both asked: "pictures" or "speech".
        rows: configurations that are in both, in the order of the first folder.
        only_first: specs that only the first folder has.
        only_second: specs that only the second folder has.
        unpaired: specs in both without an example that both answered.
        changed: what differs in the ingredients, in sentences; "was" is the first folder.
    """

    kind: str
    rows: tuple[RunDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    unpaired: tuple[str, ...]
    changed: tuple[str, ...]


def compare_runs(first: StoredRun, second: StoredRun) -> RunDifferences:
    """Compare two results folders; both may be unfinished.

    Examples are the same if their ids and digests (question, answers, file) are. Only those are compared
    that both folders answered with every draw.

    Raises:
        ResultsError: If one folder is about pictures and the other about speech.
    """
    kinds = [str(one.grid.context["kind"]) for one in (first, second)]
    if kinds[0] != kinds[1]:
        raise ResultsError(
            f"{first.folder} is about {kinds[0]} and {second.folder} about {kinds[1]}; they have no metric "
            "in common"
        )
    digests = {one.id: one.digest for one in second.examples}
    common = [one.id for one in first.examples if digests.get(one.id) == one.digest]
    specs = [[one.spec for one in run.configurations] for run in (first, second)]
    seeds = [drawn_seeds(run.answers) for run in (first, second)]
    rows, unpaired = [], []
    for spec in specs[0]:
        if spec not in specs[1]:
            continue
        both = [
            name
            for name in common
            if all(
                _answered(run.answers, spec, drawn.get(spec, ()), name)
                for run, drawn in zip((first, second), seeds, strict=True)
            )
        ]
        if not both:
            unpaired.append(spec)
            continue
        drawn = [found.get(spec, ()) for found in seeds]
        rows.append(_difference(spec, both, first.answers, second.answers, drawn, kinds[0]))
    return RunDifferences(
        kind=kinds[0],
        rows=tuple(rows),
        only_first=tuple(spec for spec in specs[0] if spec not in specs[1]),
        only_second=tuple(spec for spec in specs[1] if spec not in specs[0]),
        unpaired=tuple(unpaired),
        changed=tuple(differences(*_ingredients(first, second))),
    )


def _answered(answers: Mapping[Key, Answer], spec: str, seeds: Sequence[int], name: str) -> bool:
    """Whether a configuration answered an example, with every seed where it drew."""
    if (spec, None, name) in answers:
        return True
    return bool(seeds) and all((spec, seed, name) in answers for seed in seeds)


def _difference(
    spec: str,
    ids: Sequence[str],
    first: Mapping[Key, Answer],
    second: Mapping[Key, Answer],
    seeds: Sequence[Sequence[int]],
    kind: str,
) -> RunDifference:
    old, new = columns(first, spec, seeds[0], ids), columns(second, spec, seeds[1], ids)
    if kind == "speech":
        rates, contrast = _errors(old, new, ids)
    else:
        rates, contrast = (mean_rate(old.correct), mean_rate(new.correct)), accuracy_contrast(new, old)
    pairs = [
        (first[key], second[key])
        for name in ids
        for key in ((spec, seed, name) for seed in (None, *seeds[0]))
        if key in first and key in second
    ]
    return RunDifference(
        spec=spec,
        first=rates[0],
        second=rates[1],
        difference=contrast,
        examples=len(ids),
        answers=len(pairs),
        same_answers=sum(one.answer == other.answer for one, other in pairs),
        same_receipts=sum(one.receipt == other.receipt for one, other in pairs),
    )


def _errors(old: Columns, new: Columns, ids: Sequence[str]) -> tuple[tuple[Rate, Rate], Contrast]:
    order = sorted(range(len(ids)), key=ids.__getitem__)
    errors = ErrorRates({"old": old, "new": new}, {}, order)
    before, after = errors.words("old"), errors.words("new")
    return (before.rate(), after.rate()), error_contrast(new, old, after, before)


def _ingredients(first: StoredRun, second: StoredRun) -> list[dict[str, object]]:
    """Return all that the results of each folder depend on, as JSON values.

    Policies and examples that only one of them has are left out.
    """
    runs = (first, second)
    policies = [{str(one["spec"]): dict(one) for one in run.grid.policies} for run in runs]
    digests = [{one.id: one.digest for one in run.examples} for run in runs]
    found: list[dict[str, object]] = []
    for number, run in enumerate(runs):
        about = run.manifest.get("about")
        found.append(
            {
                **dict(run.grid.context),
                "seeds": list(run.grid.seeds),
                "policies": {
                    spec: one for spec, one in policies[number].items() if spec in policies[1 - number]
                },
                "examples": {
                    name: one for name, one in digests[number].items() if name in digests[1 - number]
                },
                "about": dict(about) if isinstance(about, dict) else {},
            }
        )
    return found
