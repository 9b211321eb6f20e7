"""The numbers of a training: steps, learning rate, validation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from kvprune.errors import TrainingError

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The numbers of a training.

    Attributes:
        steps: Number of lessons, and of steps of AdamW.
        rate: Highest learning rate; it rises over `warm_up` steps and falls along a cosine to 0.
        warm_up: See `rate`.
        faster_numbers: Factor on the rate of weights that are a single number, such as a gate.
        weight_decay: Of matrices; norms, biases and gamma have none.
        clip: Largest norm of the gradient.
        attention: Weight of the distance of cross-attention outputs.
        every: Steps between two validations, and checkpoints.
        patience: Validations without a better one after which training ends; 0 never ends it.
    """

    steps: int = 1000
    rate: float = 2e-3
    warm_up: int = 50
    faster_numbers: float = 20.0
    weight_decay: float = 0.01
    clip: float = 1.0
    attention: float = 0.0
    every: int = 50
    patience: int = 10

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("every", 1), ("warm_up", 0), ("patience", 0)):
            if getattr(self, name) < least:
                raise TrainingError(
                    f"{name} is a whole number, at least {least}, got {getattr(self, name)!r}"
                )
        for name in ("rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TrainingError(f"{name} is a positive number, got {value!r}")
        for name in ("weight_decay", "attention"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise TrainingError(f"{name} is a number, at least 0, got {value!r}")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, from 0 on."""
        done = min(step / self.steps, 1.0)
        return self.rate * min(1.0, (step + 1) / (self.warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * done))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)
