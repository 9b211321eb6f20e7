"""Examples of the demo: pictures with questions and right answers, in memory or written to a folder."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kvprune.demo.pictures import Glyph, draw
from kvprune.demo.strokes import Split, check_split
from kvprune.demo.tasks import TASKS, ask, check_task


@dataclass(frozen=True)
class Example:
    """A question about a picture.

    Attributes:
        task: one of `TASKS`.
        image: the picture, mode RGB.
        question: the question.
        answers: right answers; examples of the demo have exactly one.
        glyphs: all glyphs of the picture, to check answers against.
    """

    task: str
    image: Image.Image
    question: str
    answers: tuple[str, ...]
    glyphs: tuple[Glyph, ...] = ()


def examples(task: str, count: int, seed: int = 0, split: Split = "held-out") -> list[Example]:
    """Return the first `count` examples of a task.

    Example i depends only on task, split, seed and i, so a longer list begins with the shorter one.

    Args:
        task: One of `TASKS`.
        count: Number of examples.
        seed: Another seed gives other examples.
        split: Which drawings and photographs: "held-out", on which the model was not trained, or "train".

    Raises:
        ValueError: If task or split is unknown, or the count is negative.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    check_task(task)
    check_split(split)
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    key = zlib.crc32(f"{task} {split}".encode())
    made = []
    for number in range(count):
        rng = np.random.default_rng([key, seed, number])
        query = None
        while query is None:
            picture = draw(rng, split)
            query = ask(task, rng, picture.glyphs)
        made.append(Example(task, picture.image(), query.question, (query.answer,), picture.glyphs))
    return made


def write_dataset(
    folder: str | Path,
    tasks: Sequence[str] = TASKS,
    per_task: int = 100,
    seed: int = 0,
    split: Split = "held-out",
) -> Path:
    """Write examples to a folder: PNG files, and `data.jsonl` with one JSON object per line.

    Each line has `id`, `task`, `image` (relative to `data.jsonl`), `question` and `answers`.

    Args:
        folder: Folder to write to; created if missing.
        tasks: Tasks to write.
        per_task: Examples of each task.
        seed: See `examples`.
        split: See `examples`.

    Returns:
        Path of `data.jsonl`.

    Raises:
        ValueError: If a task or the split is unknown, or `per_task` is negative.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    table = folder / "data.jsonl"
    with table.open("w", encoding="utf-8", newline="\n") as lines:
        for task in tasks:
            for number, example in enumerate(examples(task, per_task, seed=seed, split=split)):
                name = f"{task}-{number:04d}"
                image = f"images/{name}.png"
                example.image.save(folder / image)
                line = {
                    "id": name,
                    "task": task,
                    "image": image,
                    "question": example.question,
                    "answers": list(example.answers),
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    return table
