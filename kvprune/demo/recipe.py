"""The recipe of the demo model's training: stages, optimizers, learning rates and loss weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration

__all__ = ["Recipe", "fade", "optimizers", "rate"]


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run; `see_steps`, `answer_steps` and `polish_steps` are its stages.

    `first_look` and `polish_look` are the shares of questions for which the first cross-attention layer has
    an output, in the second and in the third stage. For the other questions, later layers have to find the
    answer in the picture themselves. Without this, the first layer alone would answer most questions, and
    pruning behind it would not show.
    """

    seed: int = 0
    see_steps: int = 900
    answer_steps: int = 1800
    pictures: int = 16
    questions: int = 6
    adamw_rate: float = 1.5e-3
    muon_rate: float = 5e-3
    weight_decay: float = 0.02
    warm_up: int = 50
    first_look: float = 0.3
    polish_steps: int = 1500
    polish_look: float = 0.7
    polish_rate: float = 0.5

    @property
    def steps(self) -> int:
        """Return the number of steps of all stages."""
        return self.see_steps + self.answer_steps + self.polish_steps


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

    In the first stage the rate warms up and stays. In the second and third stage it warms up and falls to 0
    along a cosine.
    """

    def fall(step: int, steps: int) -> float:
        done = min(step / max(steps, 1), 1.0)
        return min(1.0, (step + 1) / recipe.warm_up) * (0.5 + 0.5 * float(np.cos(np.pi * done)))

    def factor(step: int) -> float:
        answered = step - recipe.see_steps
        polished = answered - recipe.answer_steps
        if answered < 0:
            return min(1.0, (step + 1) / recipe.warm_up)
        if polished < 0:
            return fall(answered, recipe.answer_steps)
        return recipe.polish_rate * fall(polished, recipe.polish_steps)

    return factor


def fade(recipe: Recipe, step: int) -> float:
    """Return the weight of the patch losses: 1 up to the middle of the second stage, 0 from 85 % of it."""
    answered = (step - recipe.see_steps) / max(recipe.answer_steps, 1)
    return min(1.0, max(0.0, (0.85 - answered) / 0.35))
