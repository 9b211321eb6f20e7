"""docs/demo_examples.png shows one example of each task: `python tests/demo_figure.py` draws it again."""

from __future__ import annotations

import argparse
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from kvprune.demo import TASKS, Example, examples
from kvprune.demo.pictures import CELLS, GRID, PICTURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE = Path(__file__).parents[1] / "docs" / "demo_examples.png"

ACROSS = 4
SEED = 34
WIDTH = 34
"""The most characters of a line below a picture."""


def figure(seed: int = SEED) -> Figure:
    """Return a figure of one example of each task, with question and answer."""
    from matplotlib.figure import Figure

    down = -(-len(TASKS) // ACROSS)
    sheet = Figure(figsize=(3.0 * ACROSS, 3.75 * down), layout="constrained")
    panels = list(sheet.subplots(down, ACROSS).flat)
    for task, panel in zip(TASKS, panels, strict=False):
        (example,) = examples(task, 1, seed=seed)
        show(panel, example)
    for panel in panels[len(TASKS) :]:
        panel.set_axis_off()
    return sheet


def show(panel: Axes, example: Example) -> None:
    """Draw a picture with the names of its columns and rows of cells; its question and answer stand below."""
    panel.imshow(example.image, extent=(0, PICTURE, PICTURE, 0))
    centres = [(number + 0.5) * PICTURE / GRID for number in range(GRID)]
    panel.set_xticks(centres, [cell[0] for cell in CELLS[:GRID]])
    panel.set_yticks(centres, [cell[1] for cell in CELLS[::GRID]])
    panel.tick_params(length=0, labelsize=8, colors="#666666", top=True, labeltop=True, labelbottom=False)
    panel.set_title(example.task, fontsize=11, fontweight="bold")
    question = textwrap.fill(example.question, WIDTH)
    panel.set_xlabel(f"{question}\n→ {example.answers[0]}", fontsize=10)


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=FIGURE, help="default: docs/demo_examples.png")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the examples")
    options = parser.parse_args()
    drawn = io.BytesIO()
    figure(options.seed).savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(256).save(options.output, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()
