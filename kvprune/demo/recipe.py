"""The recipes of the demo models' training: stages, questions, optimizers, learning rates, loss weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration

__all__ = ["RECIPES", "Recipe", "fade", "optimizers", "rate"]

_MIX = {
    "read": 0.8,
    "place": 0.6,
    "beside": 1.5,
    "count": 2.2,
    "row": 0.8,
    "compare": 1.2,
    "presence": 1.8,
    "where": 1.0,
}


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run; `see_steps` and `answer_steps` are its two stages.

    `mix` says how often each task is asked, and `hold` for which share of the second stage the learning rate
    stays before it falls.
    """

    size: str = "model"
    seed: int = 0
    see_steps: int = 500
    answer_steps: int = 5000
    pictures: int = 24
    questions: int = 10
    mix: dict[str, float] = field(default_factory=lambda: dict(_MIX))
    adamw_rate: float = 1e-3
    muon_rate: float = 3e-3
    weight_decay: float = 0.02
    warm_up: int = 100
    hold: float = 0.3

    @property
    def steps(self) -> int:
        """Return the number of steps of both stages."""
        return self.see_steps + self.answer_steps

    @property
    def shares(self) -> list[float]:
        """Return the share of each task of `mix` among all questions."""
        total = sum(self.mix.values())
        return [weight / total for weight in self.mix.values()]


RECIPES = {
    "model": Recipe(),
    "guide": Recipe(
        size="guide",
        answer_steps=4300,
        pictures=36,
        mix={**_MIX, "where": 0.0},
        adamw_rate=1.5e-3,
        muon_rate=5e-3,
        hold=0.5,
    ),
}
"""The recipe of each size. The narrower guide learns with higher rates and without the lesson `where`."""


def optimizers(
    model: MllamaForConditionalGeneration, heads: nn.Module, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside layers, and AdamW for all other parameters."""
    inside = {
        id(parameter): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and ".layers." in name
    }
    outside = [p for p in [*model.parameters(), *heads.parameters()] if id(p) not in inside]
    return [
        torch.optim.Muon(
            list(inside.values()),
            lr=recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(outside, lr=recipe.adamw_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)),
    ]


def rate(recipe: Recipe) -> Callable[[int], float]:
    """Return the schedule of the learning rate, as a factor by step.

    In both stages the rate warms up and stays. In the second it then falls to 0 along a straight line.
    """

    def factor(step: int) -> float:
        answered = step - recipe.see_steps
        if answered < 0:
            return min(1.0, (step + 1) / recipe.warm_up)
        done = min(answered / max(recipe.answer_steps, 1), 1.0)
        return min(1.0, (answered + 1) / recipe.warm_up, (1.0 - done) / (1.0 - recipe.hold))

    return factor


def fade(recipe: Recipe, step: int) -> float:
    """Return the weight of the patch losses.

    It is 1 up to the middle of the second stage, then falls along a straight line, and stays at 0.1.
    """
    answered = (step - recipe.see_steps) / max(recipe.answer_steps, 1)
    return min(1.0, max(0.1, (0.85 - answered) / 0.35))
