"""Examples of the demo: a picture, a question and its right answers; and a folder of them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from kvprune.demo.handwriting import Split, handwriting
from kvprune.demo.pictures import Digit
from kvprune.demo.tasks import EXAMPLE_ROW_LENGTHS, TASKS, compose


@dataclass(frozen=True)
class Example:
    """A question about a picture.

    Attributes:
        task: one of `TASKS`.
        image: the picture, mode RGB.
        question: what is asked.
        answers: right answers; one here, as many as needed elsewhere.
        digits: everything that was placed on the picture, to check answers by.
    """

    task: str
    image: Image.Image
    question: str
    answers: tuple[str, ...]
    digits: tuple[Digit, ...] = ()


def examples(task: str, count: int, seed: int = 0, split: Split = "held-out") -> list[Example]:
    """The first `count` examples of a task.

    Example i depends on task, split, seed and i only, so a longer list begins with the shorter one.

    Args:
        task: one of `TASKS`.
        count: how many.
        seed: another seed gives other examples.
        split: whose handwriting: "held-out" (never trained on) or "train".

    Raises:
        ValueError: unknown task or split, or a negative count.
        ImportError: scikit-learn is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    hand = handwriting(split)
    key = zlib.crc32(f"{task} {split}".encode())
    made = []
    for number in range(count):
        rng = np.random.default_rng([key, seed, number])
        picture, query = compose(task, rng, hand, row_lengths=EXAMPLE_ROW_LENGTHS)
        made.append(Example(task, picture.image(), query.question, (query.answer,), picture.digits))
    return made


def write_dataset(
    folder: str | Path,
    tasks: Sequence[str] = TASKS,
    per_task: int = 100,
    seed: int = 0,
    split: Split = "held-out",
) -> Path:
    """Write examples as PNG files and a table `data.jsonl`, one JSON object a line.

    Each line has `id`, `task`, `image` (relative to the table), `question` and `answers`.

    Args:
        folder: where to write; made if missing.
        tasks: which tasks.
        per_task: examples of each task.
        seed: see `examples`.
        split: see `examples`.

    Returns:
        Path of `data.jsonl`.

    Raises:
        ValueError: unknown task or split, or a negative count.
        ImportError: scikit-learn is not installed.
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
