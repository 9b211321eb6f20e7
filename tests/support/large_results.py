"""Writes a large results folder without a model, to measure how quickly it opens."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from PIL import Image

from kvprune.comparison import Settings
from kvprune.comparison.data.examples import read_examples
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.storage.answer_lines import answer_rows
from kvprune.comparison.storage.answers import Answer
from kvprune.comparison.storage.identity import policy_identities
from kvprune.comparison.storage.manifest import build_about, build_context
from kvprune.comparison.storage.recorded_grid import RecordedGrid
from kvprune.comparison.storage.results_folder import ResultsFolder

__all__ = ["write_large_folder"]


def write_large_folder(folder: Path, configurations: int, questions: int, batch_size: int = 16) -> Path:
    """Write a finished comparison of `random` at many budgets; no answer repeats the receipt of another."""
    draw = random.Random(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder.parent / "picture.png")
    rows = [
        {"id": f"question-{number:04d}", "task": f"task-{number % 3}", "image": "picture.png"}
        | {"question": "How many?", "answers": [str(number % 10)]}
        for number in range(questions)
    ]
    data = folder.parent / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = read_examples(data)
    specs = [f"uniform:keep_ratio={0.001 * (1 + number):.3f}" for number in range(configurations - 1)]
    compared = expand(specs, [])
    policies = policy_identities(compared)
    settings = Settings(device="cpu", data=data, max_new_tokens=16)
    names = [one.id for one in examples]
    grid = RecordedGrid(
        context=build_context(settings, "pictures", policies[0]),
        policies=tuple(policies),
        seeds=(0,),
        origin="file",
        data_seed=None,
        digests={one.id: one.digest for one in examples},
        batches=tuple(tuple(names[at : at + batch_size]) for at in range(0, len(names), batch_size)),
    )
    by_id, addresses = {one.id: one for one in examples}, grid.addresses()
    with ResultsFolder(folder) as opened:
        opened.record(grid, (), build_about(settings))
        for one in compared:
            kept, lines = one.keep_ratio or 1.0, []
            for batch in grid.batches:
                answers = []
                for name in batch:
                    right = one.keep_ratio is None or draw.random() < 0.5 + kept / 2
                    (said,) = by_id[name].answers if right else ("none",)
                    answers.append(
                        Answer(
                            spec=one.spec,
                            id=name,
                            task=by_id[name].task,
                            answer=said,
                            correct=right,
                            agrees_with_full=right,
                            finished=True,
                            kept_fraction=kept + draw.randrange(100) / 1e6 if kept < 1 else 1.0,
                            bytes_held=round(399360 * kept),
                            bytes_full=399360,
                            receipt=hashlib.sha256(f"{one.spec} {name}".encode()).hexdigest(),
                        )
                    )
                lines += answer_rows(addresses.of(one.spec, batch, None), answers)
            opened.results.append(lines)
    return folder
