"""class: options that a spec does not restore, and classes that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from kvprune import ScoringPolicy
from zoo.helpers import by_norm


@dataclass(frozen=True, kw_only=True)
class HalvesItsOption(ScoringPolicy):
    """Changes an option in `__post_init__`, so that its own spec makes another policy."""

    name = "halves-its-option"
    caught_by = ("class",)

    strength: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "strength", self.strength / 2)

    def score(self, view):
        return by_norm(view) * self.strength


@dataclass(frozen=True, kw_only=True)
class NeedsAList(ScoringPolicy):
    name = "needs-a-list"
    caught_by = ("class",)

    @property
    def needs(self):
        return ["queries"]

    def score(self, view):
        return by_norm(view)


@dataclass(frozen=True)
class NotConstructible(ScoringPolicy):
    """Cannot be constructed: raises for any options."""

    name = "not-constructible"
    caught_by = ("class",)

    def __post_init__(self):
        super().__post_init__()
        raise RuntimeError("no weights found")

    def score(self, view):
        return by_norm(view)
