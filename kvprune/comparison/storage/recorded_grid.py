"""The grid that a manifest records: what is compared, on which questions, with which ingredients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvprune.comparison.plan.settings import NO_GUIDE
from kvprune.comparison.storage.addresses import Addresses
from kvprune.errors import ResultsError

__all__ = ["PLACES", "Batch", "Earlier", "Origin", "RecordedGrid", "read_about", "read_earlier", "read_grid"]

PLACES = ("model", "guide", "data", "against")
"""What a manifest must have under "about"."""

Batch = tuple[str, ...]
"""Ids of the examples that are asked in one call, in order."""

Origin = Literal["file", "pictures", "speech"]
"""Where the examples come from: a file of the user, or one of the demos."""

CONTEXT_TYPES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "model_digest": (str,),
    "max_new_tokens": (int, type(None)),
    "reread": (bool,),
    "device": (str,),
    "dtype": (str,),
    "attn_implementation": (str, type(None)),
    "trust_remote_code": (bool,),
    "reference": (str,),
    "versions": (dict,),
    "kvprune_source_sha256": (str,),
}
"""The ingredients that all units of a run share, and their types in JSON."""


@dataclass(frozen=True, kw_only=True)
class RecordedGrid:
    """What stands under "run" in a manifest.

    Attributes:
        context: ingredients that all units share; see `CONTEXT_TYPES`.
        policies: identities of the policies, the full cache first; see `policy_identities`.
        seeds: seeds of policies that draw, in ascending order.
        origin: where the examples come from.
        data_seed: seed of the demo's questions; None where they do not depend on one.
        digests: digest of each example, by id, in the order in which they were first asked.
        batches: the examples in batches; each example is in exactly one.
    """

    context: Mapping[str, Any]
    policies: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...]
    origin: Origin
    data_seed: int | None
    digests: Mapping[str, str]
    batches: tuple[Batch, ...]

    @property
    def specs(self) -> list[str]:
        """Specs of the configurations, the full cache first."""
        return [str(one["spec"]) for one in self.policies]

    def addresses(self) -> Addresses:
        """Return the addresses of all units of the grid."""
        return Addresses(self.context, self.policies, self.seeds, self.batches, self.digests)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `read_grid` reads."""
        return {
            "context": dict(self.context),
            "policies": [dict(one) for one in self.policies],
            "seeds": list(self.seeds),
            "data": {"origin": self.origin, "seed": self.data_seed},
            "examples": [[name, digest] for name, digest in self.digests.items()],
            "batches": [list(batch) for batch in self.batches],
        }


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Ingredients of a grid that were replaced; answers that were computed with them may still be there.

    Attributes:
        until: when they were replaced.
        changes: what changed, in sentences.
        context: the shared ingredients until then.
        policies: identities of policies that changed or left.
        batches: batches that changed or left, as pairs of id and digest.
    """

    until: str
    changes: tuple[str, ...]
    context: Mapping[str, Any]
    policies: tuple[Mapping[str, Any], ...]
    batches: tuple[tuple[tuple[str, str], ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that `read_earlier` reads."""
        return {
            "until": self.until,
            "changes": list(self.changes),
            "context": dict(self.context),
            "policies": [dict(one) for one in self.policies],
            "batches": [[list(pair) for pair in batch] for batch in self.batches],
        }


def read_grid(path: Path, run: Mapping[str, Any]) -> RecordedGrid:
    """Read what `RecordedGrid.to_json` wrote.

    Args:
        path: The manifest, for messages.
        run: What stands under "run".

    Raises:
        ResultsError: If something is missing or of another type, or does not fit together.
    """
    problem = next(_problems(run), None)
    if problem is not None:
        raise ResultsError(f"{path} is damaged: {problem}")
    return RecordedGrid(
        context=run["context"],
        policies=tuple(run["policies"]),
        seeds=tuple(run["seeds"]),
        origin=run["data"]["origin"],
        data_seed=run["data"]["seed"],
        digests=dict(run["examples"]),
        batches=tuple(tuple(batch) for batch in run["batches"]),
    )


def read_earlier(path: Path, manifest: Mapping[str, Any]) -> list[Earlier]:
    """Read the list that a manifest has under "earlier".

    Raises:
        ResultsError: If something is missing or of another type.
    """
    found = manifest.get("earlier")
    if not isinstance(found, list):
        raise ResultsError(f"{path} is damaged: earlier is {found!r:.60}")
    entries = []
    for number, one in enumerate(found):
        if not isinstance(one, dict) or set(one) != {"until", "changes", "context", "policies", "batches"}:
            raise ResultsError(f"{path} is damaged: earlier[{number}] is {one!r:.60}")
        good = {
            "until": isinstance(one["until"], str),
            "changes": _is_list_of(str, one["changes"]),
            "context": isinstance(one["context"], dict),
            "policies": _is_list_of(dict, one["policies"])
            and all(isinstance(policy.get("spec"), str) for policy in one["policies"]),
            "batches": _is_list_of(list, one["batches"])
            and all(_is_pair(pair) for batch in one["batches"] for pair in batch),
        }
        for name, is_good in good.items():
            if not is_good:
                raise ResultsError(f"{path} is damaged: earlier[{number}].{name} is {one[name]!r:.60}")
        entries.append(
            Earlier(
                until=one["until"],
                changes=tuple(one["changes"]),
                context=one["context"],
                policies=tuple(one["policies"]),
                batches=tuple(tuple((pair[0], pair[1]) for pair in batch) for batch in one["batches"]),
            )
        )
    return entries


def read_about(path: Path, manifest: Mapping[str, Any]) -> Mapping[str, str]:
    """Return where model, guide and data are, and the partner, as they stand under "about".

    A manifest of an earlier kvprune names no guide, and used none.

    Raises:
        ResultsError: If something is missing or of another type.
    """
    about, created = manifest.get("about"), manifest.get("created")
    if not isinstance(about, dict):
        raise ResultsError(f"{path} is damaged: about is {about!r:.60}")
    about = {"guide": NO_GUIDE, **about}
    for name in PLACES:
        if not isinstance(about.get(name), str):
            raise ResultsError(f"{path} is damaged: about.{name} is {about.get(name)!r:.60}")
    if not isinstance(created, str):
        raise ResultsError(f"{path} is damaged: created is {created!r:.60}")
    return {name: about[name] for name in PLACES}


def _problems(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each thing under "run" that is missing, of another type, or does not fit."""
    context, policies, seeds = run.get("context"), run.get("policies"), run.get("seeds")
    if not isinstance(context, dict):
        yield f"run.context is {context!r:.60}"
        return
    yield from _wrong_context(context)
    if not _is_list_of(dict, policies) or not policies or not _all_different(policies):
        yield f"run.policies is {policies!r:.60}"
    if not _is_list_of(int, seeds) or not seeds or sorted(set(seeds)) != seeds:
        yield f"run.seeds is {seeds!r:.60}"
    data = run.get("data")
    if not isinstance(data, dict) or data.get("origin") not in ("file", "pictures", "speech"):
        yield f"run.data is {data!r:.60}"
    elif not (data.get("seed") is None or _is_list_of(int, [data["seed"]])):
        yield f"run.data.seed is {data['seed']!r:.60}"
    yield from _wrong_examples(run.get("examples"), run.get("batches"))


def _wrong_context(context: Mapping[str, Any]) -> Iterator[str]:
    for name, types in CONTEXT_TYPES.items():
        value = context.get(name)
        known = name in context and isinstance(value, types)
        if not known or (isinstance(value, bool) and bool not in types):  # True is an int for Python
            yield f"run.context.{name} is {value!r:.60}"


def _all_different(policies: list[dict[str, Any]]) -> bool:
    specs = [one.get("spec") for one in policies]
    return _is_list_of(str, specs) and len(set(specs)) == len(specs)


def _wrong_examples(examples: object, batches: object) -> Iterator[str]:
    if not isinstance(examples, list) or not all(_is_pair(one) for one in examples):
        yield f"run.examples is {examples!r:.60}"
        return
    names = [name for name, _ in examples]
    if not isinstance(batches, list) or not all(_is_list_of(str, one) and one for one in batches):
        yield f"run.batches is {batches!r:.60}"
        return
    if len(set(names)) < len(names) or sorted(names) != sorted(name for one in batches for name in one):
        yield "run.batches does not hold each of run.examples once"


def _is_pair(value: object) -> bool:
    return _is_list_of(str, value) and isinstance(value, list) and len(value) == 2


def _is_list_of(kind: type, value: object) -> bool:
    """Whether a value is a list of a type; True and False are no numbers here."""
    return isinstance(value, list) and all(
        isinstance(one, kind) and (kind is bool or not isinstance(one, bool)) for one in value
    )
