"""Addresses of units of work: digests of all that determines the answers of one of them.

A unit is one configuration, one seed where its policy draws, and one batch of examples. The same ingredients
give the same address, in any folder and at any time. So what is finished is found again, and nothing that
was computed under other ingredients is ever taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["UNIT_DIGITS", "Addresses", "Unit", "batch_key", "context_key", "digest", "policy_key", "split"]

_DIGITS = 16
"""Hexadecimal digits of each of the three parts of an address."""

UNIT_DIGITS = 3 * _DIGITS


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def context_key(context: Mapping[str, Any]) -> str:
    """Return the part of an address that stands for what all units of a run share: model, settings, code."""
    return digest(context)[:_DIGITS]


def policy_key(identity: Mapping[str, Any]) -> str:
    """Return the part of an address that stands for a policy with its options, versions and source."""
    return digest(identity)[:_DIGITS]


def batch_key(digests: Sequence[str], seed: int | None) -> str:
    """Return the part of an address that stands for a batch of examples, in order, and the seed."""
    return digest([list(digests), seed])[:_DIGITS]


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of work.

    Attributes:
        spec: spec of its configuration.
        seed: the seed that its policy drew with; None where it drew nothing.
        ids: ids of the examples of its batch, in order.
    """

    spec: str
    seed: int | None
    ids: Sequence[str]


class Addresses:
    """The addresses of all units that a grid has or may have.

    Whether a policy draws is known only when it has run. So each configuration and batch has one address for
    "drew nothing" and one for each seed.

    Args:
        context: What all units share.
        policies: Identities of the policies; each has its `spec`.
        seeds: Seeds of policies that draw.
        batches: Batches of ids.
        digests: Digest of each example, by id.
    """

    def __init__(
        self,
        context: Mapping[str, Any],
        policies: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        batches: Sequence[Sequence[str]],
        digests: Mapping[str, str],
    ) -> None:
        self.context = context_key(context)
        self.policies: dict[str, str] = {one["spec"]: policy_key(one) for one in policies}
        self._specs = {key: spec for spec, key in self.policies.items()}
        self._parts: dict[tuple[str, int | None], str] = {}
        self._batches: dict[str, tuple[int | None, Sequence[str]]] = {}
        for batch in batches:
            of_batch = [digests[name] for name in batch]
            for seed in (None, *seeds):
                key = batch_key(of_batch, seed)
                self._batches[key] = seed, batch
                self._parts[batch[0], seed] = key

    def of(self, spec: str, batch: Sequence[str], seed: int | None) -> str:
        """Return the address of a unit of the grid, `UNIT_DIGITS` hexadecimal digits.

        Args:
            spec: Spec of a configuration.
            batch: Ids of a batch; no two batches of a grid begin with the same example.
            seed: A seed of the grid, or None where nothing is drawn.
        """
        return self.context + self.policies[spec] + self._parts[batch[0], seed]

    def find(self, address: str) -> Unit | None:
        """Return the unit of the grid that has an address, or None."""
        spec = self._specs.get(address[_DIGITS : 2 * _DIGITS])
        of_batch = self._batches.get(address[2 * _DIGITS :])
        if spec is None or of_batch is None or not address.startswith(self.context):
            return None
        return Unit(spec, *of_batch)


def split(address: str) -> tuple[str, str]:
    """Return the parts of an address that stand for the context and the policy."""
    return address[:_DIGITS], address[_DIGITS : 2 * _DIGITS]
