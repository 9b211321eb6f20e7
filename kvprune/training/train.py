"""Trains the weights of a policy: the loop, its validations, and the files that it writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.base import ModelAdapter
from kvprune.errors import TrainingError
from kvprune.policy.trained import TrainedPolicy
from kvprune.policy.weights import SUFFIX, WeightsFile, save_weights
from kvprune.text import shown
from kvprune.training.checkpoint import Checkpoint, different, load, save, write_whole
from kvprune.training.distillation import Distillation
from kvprune.training.lessons import Lesson, Lessons
from kvprune.training.recipe import Recipe

__all__ = ["Files", "Trained", "train"]


@dataclass(frozen=True)
class Files:
    """The files of a training: the weights, and beside them its curve and its checkpoint.

    Attributes:
        weights: Where the weights are written when the training ends.
    """

    weights: Path

    def __post_init__(self) -> None:
        if self.weights.suffix != SUFFIX:
            raise TrainingError(
                f"the weights are written to a file whose name ends in {SUFFIX}, got "
                f"{shown(str(self.weights))}"
            )
        if not self.weights.parent.is_dir():
            raise TrainingError(f"there is no folder {shown(str(self.weights.parent))} to write weights to")

    @property
    def checkpoint(self) -> Path:
        """From which an interrupted training continues."""
        return self.weights.with_suffix(f".checkpoint{SUFFIX}")

    @property
    def curve(self) -> Path:
        """The curve of validations, as a table."""
        return self.weights.with_suffix(".csv")

    @property
    def picture(self) -> Path:
        """The curve of validations, as a picture."""
        return self.weights.with_suffix(".png")

    def require_new(self) -> None:
        """Raise if there is a file of weights already.

        Raises:
            TrainingError: Names it.
        """
        if self.weights.exists():
            raise TrainingError(
                f"there is a file {shown(str(self.weights))} already; name another one with --out"
            )

    def require_free(self, settings: Mapping[str, Any]) -> bool:
        """Return whether there is a checkpoint to continue from.

        Raises:
            TrainingError: If a file would be overwritten that is not of this training.
        """
        self.require_new()
        if not self.checkpoint.exists():
            for path in (self.curve, self.picture):
                if path.exists():
                    raise TrainingError(
                        f"there is a file {shown(str(path))} already, which is of no training to continue; "
                        "move "
                        "it away, or name another file with --out"
                    )
            return False
        found = load(self.checkpoint, torch.device("cpu")).settings
        if names := different(settings, found):
            told = ", ".join(
                f"{name} {shown(found.get(name), 80)} there, {shown(settings.get(name), 80)} here"
                for name in names
            )
            raise TrainingError(
                f"{shown(str(self.checkpoint))} is of a training with other settings ({told}); continue it "
                "with "
                "the same ones, or name another file with --out"
            )
        return True


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        file: The file of weights.
        curve: One row for each validation.
        best_step: After which step the validation was best; those weights were written.
        stopped_early: Whether the training ended because validation got no better.
    """

    file: WeightsFile
    curve: Sequence[Mapping[str, float]]
    best_step: int
    stopped_early: bool


def train(
    adapter: ModelAdapter,
    policy: TrainedPolicy,
    lessons: Lessons,
    recipe: Recipe,
    files: Files,
    about: Mapping[str, Any],
    *,
    half: bool = True,
    on_progress: Callable[[int, Mapping[str, float] | None], None] = lambda step, row: None,
) -> Trained:
    """Train the weights of a policy on a frozen model, or continue where an earlier call stopped.

    The same settings give the same weights, bit by bit on the CPU, however often training is interrupted.

    Args:
        adapter: Of the model, not attached.
        policy: The policy; the weights that it names are not read.
        lessons: What it learns from.
        recipe: The numbers.
        files: Where the result is written.
        about: What else the training depends on, as JSON values: model and versions.
        half: Whether the weights are written in half precision. They are then rounded before the last
            validation, which is that of the file.
        on_progress: Called after each step with the number of steps done, and after each validation with its
            row of the curve.

    Raises:
        TrainingError: If a file would be overwritten, validation is empty, or the loss is not finite.
        KVPruneError: Whatever the policy or the adapter raises.
    """
    settings = {
        "policy": policy.name,
        "options": {name: getattr(policy, name) for name in policy.trained_options},
        "recipe": recipe.to_dict(),
        "lessons": lessons.source,
        "half": half,
        **about,
    }
    resumes = files.require_free(settings)
    validation = lessons.validation()
    if not validation:
        raise TrainingError("there is nothing to validate with, so nobody would see what is learned")
    device = validation[0].answer.device
    geometry = _geometry(adapter, policy, validation[0])
    initial = {name: tensor.to(device) for name, tensor in policy.initial(geometry).items()}
    if resumes:
        state = load(files.checkpoint, device)
    else:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in initial.items()}
        state = Checkpoint(settings, dict(initial), zeros, {name: one.clone() for name, one in zeros.items()})
    weights = {name: state.weights[name].requires_grad_() for name in initial}
    teacher = Distillation(adapter, policy, weights, attention=recipe.attention)
    optimizer = _optimizer(weights, state, recipe)
    if not state.curve:
        _validate(teacher, validation, state)
        on_progress(0, state.curve[-1])
    while state.step < recipe.steps and not _is_over(state, recipe):
        state.pending.append(_step(teacher, lessons.lesson(state.step), optimizer, recipe, state.step))
        state.step += 1
        row = None
        if state.step % recipe.every == 0 or state.step == recipe.steps:
            _validate(teacher, validation, state)
            _keep_moments(optimizer, state)
            save(files.checkpoint, state)
            _write_curve(files, state.curve)
            row = state.curve[-1]
        on_progress(state.step, row)
    dtype = torch.float16 if half else torch.float32
    final = {name: tensor.to(dtype) for name, tensor in state.best.items()}
    for name, tensor in final.items():
        with torch.no_grad():
            weights[name].copy_(tensor)
    measured = _measured(teacher, validation)
    summary = {"settings": settings, "step": state.best_step, "validation": measured}
    file = save_weights(files.weights, policy, final, geometry, summary)
    _write_curve(files, state.curve)
    files.checkpoint.unlink(missing_ok=True)
    return Trained(file, state.curve, state.best_step, state.step < recipe.steps)


def _geometry(adapter: ModelAdapter, policy: TrainedPolicy, lesson: Lesson) -> dict[str, int]:
    """Return what a view before the first layer says about the model."""
    assert lesson.prompt.states is not None
    geometry = {"cross_layers": len(adapter.layer_indices), "feature_width": lesson.prompt.states.shape[-1]}
    if "question" in policy.needs:
        geometry["question_width"] = adapter.question(lesson.prompt.arguments).shape[-1]
    return geometry


def _optimizer(weights: Mapping[str, Tensor], state: Checkpoint, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with the moments of a checkpoint."""
    matrices = [one for one in weights.values() if one.ndim >= 2]
    vectors = [one for one in weights.values() if one.ndim < 2 and one.numel() > 1]
    # A single number, such as a gate, moves by the rate in each step, however steep its slope is.
    numbers = [one for one in weights.values() if one.numel() == 1 and one.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay, "faster": 1.0},
        {"params": vectors, "weight_decay": 0.0, "faster": 1.0},
        {"params": numbers, "weight_decay": 0.0, "faster": recipe.faster_numbers},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    if state.step:
        for name, tensor in weights.items():
            optimizer.state[tensor] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.first[name],
                "exp_avg_sq": state.second[name],
            }
    return optimizer


def _keep_moments(optimizer: torch.optim.AdamW, state: Checkpoint) -> None:
    for name, tensor in state.weights.items():
        moments = optimizer.state[tensor]
        state.first[name], state.second[name] = moments["exp_avg"], moments["exp_avg_sq"]


def _step(
    teacher: Distillation, lesson: Lesson, optimizer: torch.optim.AdamW, recipe: Recipe, step: int
) -> float:
    """Learn from one lesson; return the divergence."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_at(step) * group["faster"]
    optimizer.zero_grad(set_to_none=False)
    measures = teacher.measure(lesson)
    measures.loss.backward()
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
    divergence, length = torch.stack([measures.divergence, norm]).tolist()
    if not (abs(divergence) < float("inf") and length < float("inf")):
        raise TrainingError(
            f"step {step + 1}: the divergence is {divergence}, the gradient {length}; take a lower --rate "
            f"than {recipe.rate}"
        )
    optimizer.step()
    return float(divergence)


def _measured(teacher: Distillation, validation: Sequence[Lesson]) -> dict[str, float]:
    """Return the means over all lessons of validation: divergence, right answers, those of all tokens."""
    with torch.no_grad():
        found = [teacher.measure(lesson) for lesson in validation]
    rows = sum(len(one.right) for one in found)
    tokens = [int(lesson.written.sum()) for lesson in validation]
    divergence = sum(float(one.divergence) * count for one, count in zip(found, tokens, strict=True))
    return {
        "divergence": divergence / sum(tokens),
        "right": sum(int(one.right.sum()) for one in found) / rows,
        "right_full": sum(int(one.right_full.sum()) for one in found) / rows,
    }


def _validate(teacher: Distillation, validation: Sequence[Lesson], state: Checkpoint) -> None:
    """Add a row to the curve, and note the weights if they are the best so far."""
    row = {"step": float(state.step), **_measured(teacher, validation)}
    if state.pending:
        row["learning"] = sum(state.pending) / len(state.pending)
    state.pending.clear()
    if not state.best or row["divergence"] < min(one["divergence"] for one in state.curve):
        state.best = {name: tensor.detach().clone() for name, tensor in state.weights.items()}
        state.best_step = state.step
    state.curve.append(row)


def _is_over(state: Checkpoint, recipe: Recipe) -> bool:
    return bool(recipe.patience) and state.is_stale >= recipe.patience


def _write_curve(files: Files, curve: Sequence[Mapping[str, float]]) -> None:
    """Write the curve as a table."""
    text = io.StringIO()
    table = csv.DictWriter(
        text, ("step", "learning", "divergence", "right", "right_full"), lineterminator="\n"
    )
    table.writeheader()
    for row in curve:
        table.writerow({name: f"{value:.6g}" for name, value in row.items()})
    write_whole(files.curve, text.getvalue().encode())
