"""How a grid grows: what was asked for before and what is asked for now become one grid."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from kvprune.comparison.storage.addresses import context_key, policy_key, split
from kvprune.comparison.storage.differences import differences, in_one_sentence
from kvprune.comparison.storage.recorded_grid import Batch, Earlier, RecordedGrid
from kvprune.text import printable

__all__ = ["Growth", "Reasons", "grow"]

_SHOWN = 5
"""How many ids a note names."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A grid after it has grown.

    Attributes:
        grid: the grid.
        replaced: what is no longer part of it, None where everything is as it was.
        notes: what a user should know before anything is computed.
    """

    grid: RecordedGrid
    replaced: Earlier | None
    notes: tuple[str, ...]


def grow(
    old: RecordedGrid,
    asked: RecordedGrid,
    *,
    available: Mapping[str, str],
    answered: Set[str],
    former: Sequence[Earlier],
    form: Callable[[Sequence[str]], Sequence[Batch]],
) -> Growth:
    """Return the union of two grids, with the ingredients of now.

    Batches stay as they were, so that answers to them stay valid; an example that is gone leaves its batch,
    and one that has changed stays in it under its new digest. New examples form new batches.

    Args:
        old: The grid so far; may have no examples.
        asked: What is asked for now, with all policies of `old` that still run; its batches are not read.
        available: Digests of all examples that the data have, by id, whether they are asked for or not.
        answered: Ids of examples to which the folder has any answer. A batch without any is formed anew.
        former: Replaced ingredients; batches among them are formed again if all their examples are asked.
        form: Puts ids of new examples into batches.
    """
    kept: list[Batch] = []
    lost: list[Batch] = []
    for batch in old.batches:
        if any(name in answered for name in batch):
            present = tuple(name for name in batch if name in available)
            if present:
                kept.append(present)
            if [available.get(name) for name in batch] != [old.digests[name] for name in batch]:
                lost.append(batch)
    placed = {name for batch in kept for name in batch}
    new = {name: digest for name, digest in asked.digests.items() if name not in placed}
    restored = _restored(new, former)
    again = {name for batch in restored for name in batch}
    rest = [name for name in new if name not in again]
    batches = [
        *kept,
        *restored,
        *form(rest),
    ]
    digests = {name: available[name] for name in old.digests if name in placed} | new
    grid = replace(asked, digests=digests, batches=tuple(batches))
    policies = _replaced_policies(old, grid)
    changes = [
        *differences(dict(old.context), dict(grid.context)),
        *_other_data(old, grid),
        *(_explain_policy(one, grid) for one in policies),
        *_changed_examples(old, lost, available),
    ]
    replaced = None
    if changes:
        replaced = Earlier(
            until=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            changes=tuple(changes),
            context=old.context,
            policies=tuple(policies),
            batches=tuple(tuple((name, old.digests[name]) for name in batch) for batch in lost),
        )
    notes = [
        *_other_data(old, grid),
        *_changed_examples(old, lost, available),
        *_more_than_asked(asked, grid),
    ]
    return Growth(grid=grid, replaced=replaced, notes=tuple(notes))


class Reasons:
    """Says why an answer in a results folder is not part of its grid.

    Args:
        grid: The grid.
        earlier: What was replaced, in this order.
    """

    def __init__(self, grid: RecordedGrid, earlier: Sequence[Earlier]) -> None:
        self._grid = grid
        self._contexts = {context_key(one.context): one.context for one in earlier}
        self._contexts[context_key(grid.context)] = grid.context
        self._policies = {policy_key(policy): policy for one in earlier for policy in one.policies}
        self._found: dict[tuple[str, str, bool], str] = {}

    def of(self, address: str, seed: int | None) -> str:
        """Return the reason for an answer with this address and seed."""
        context, policy = split(address)
        drawn = seed is not None and seed not in self._grid.seeds
        key = context, policy, drawn
        if key not in self._found:
            self._found[key] = self._reason(context, policy, seed if drawn else None)
        return self._found[key]

    def _reason(self, context: str, policy: str, seed: int | None) -> str:
        former = self._contexts.get(context)
        if former is None:
            return "they are of a run that manifest.json does not name"
        if former is not self._grid.context:
            return _explain_context(former, self._grid.context)
        if policy in self._policies:
            return _explain_policy(self._policies[policy], self._grid)
        if seed is not None:
            return f"seed {seed} is not among the seeds of this comparison"
        return "a question of their batch has changed, or is gone from the data"


def _explain_context(former: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how shared ingredients differ; where the code of kvprune differs, that comes last, in words."""
    found = list(differences(dict(former), dict(now)))
    edited = [what for what in found if what.startswith("kvprune_source_sha256 ")]
    others = [what for what in found if what not in edited]
    words = [f"{what}: the code of kvprune has changed since" for what in edited]
    return in_one_sentence([*others, *words])


def _restored(new: Mapping[str, str], former: Sequence[Earlier]) -> list[Batch]:
    """Return batches of earlier grids whose examples are all new here and as they were then."""
    found: list[Batch] = []
    taken: set[str] = set()
    for entry in former:
        for batch in entry.batches:
            names = tuple(name for name, _ in batch)
            as_it_was = all(new.get(name) == digest for name, digest in batch)
            if batch and as_it_was and taken.isdisjoint(names):
                found.append(names)
                taken.update(names)
    return found


def _replaced_policies(old: RecordedGrid, grid: RecordedGrid) -> list[Mapping[str, Any]]:
    now = {one["spec"]: one for one in grid.policies}
    return [one for one in old.policies if now.get(one["spec"]) != one]


def _explain_policy(former: Mapping[str, Any], grid: RecordedGrid) -> str:
    """Say how a policy of an earlier grid differs from that of the same spec now."""
    spec = str(former["spec"])
    now = next((one for one in grid.policies if one["spec"] == spec), None)
    if now is None:
        return f"{spec} is no longer part of this folder's comparison"
    found = list(differences(dict(former), dict(now), where=f"policies.{spec}"))
    edited = any(".source_sha256 " in what for what in found)
    return in_one_sentence(found) + (f": the code of {spec} has changed since" if edited else "")


def _other_data(old: RecordedGrid, grid: RecordedGrid) -> Iterator[str]:
    """Say so if the examples come from elsewhere than before; a moved file of the same rows is no change."""
    if old.origin != grid.origin:
        names = {"file": "a file", "pictures": "the demo of pictures", "speech": "the demo of speech"}
        yield f"the data were {names[old.origin]} and are now {names[grid.origin]}"
    elif old.data_seed != grid.data_seed:
        yield f"the demo's questions had seed {old.data_seed} and now have seed {grid.data_seed}"


def _changed_examples(
    old: RecordedGrid, lost: Sequence[Batch], available: Mapping[str, str]
) -> Iterator[str]:
    names = [name for batch in lost for name in batch]
    gone = [name for name in names if name not in available]
    changed = [name for name in names if name in available and available[name] != old.digests[name]]
    for found, what in ((gone, "no longer in the data"), (changed, "changed in the data")):
        if found:
            shown = ", ".join(printable(name, 60) for name in found[:_SHOWN])
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            yield f"{len(found)} of {len(old.digests)} examples {what}: {shown}{more}"


def _more_than_asked(asked: RecordedGrid, grid: RecordedGrid) -> Iterator[str]:
    """Say so if fewer questions are asked than the folder has."""
    fewer = len(grid.digests) - len(asked.digests)
    if fewer > 0:
        yield (
            f"this folder asks {len(grid.digests)} questions, {fewer} more than this command; "
            "all of them are shown"
        )
