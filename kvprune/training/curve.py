"""The curve of validations as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvprune.comparison.display.curves import figure, png, style
from kvprune.training.checkpoint import write_whole

__all__ = ["draw_curve"]


def draw_curve(path: Path, title: str, curve: Sequence[Mapping[str, float]], best_step: int) -> None:
    """Draw divergence and right answers by step.

    Args:
        path: The PNG file.
        title: Above the picture.
        curve: Rows of a training's curve.
        best_step: Marked by a line.

    Raises:
        TrainingError: If the file cannot be written.
    """
    made = figure((8.0, 3.2))
    left, right = made.subplots(1, 2)
    steps = [row["step"] for row in curve]
    left.plot(steps, [row["divergence"] for row in curve], **style(0), label="validation")
    learned = [row for row in curve if "learning" in row]
    left.plot(
        [row["step"] for row in learned], [row["learning"] for row in learned], **style(1), label="learning"
    )
    left.set(xlabel="step", ylabel="KL(all tokens || policy)", yscale="log")
    right.plot(steps, [100 * row["right"] for row in curve], **style(0), label="policy")
    right.plot(steps, [100 * row["right_full"] for row in curve], **style(6), label="all tokens")
    right.set(xlabel="step", ylabel="right answers of validation, %", ylim=(0, 100))
    for panel in (left, right):
        panel.axvline(best_step, color="0.7", linewidth=1)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    made.suptitle(title, fontsize=9)
    write_whole(path, png(made))
