"""Measures the exact-match accuracy of the demo with greedy `generate`: `python -m kvprune.demo.evaluate`.

Beside it stands what a guess gets that does not look at the picture.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvprune.demo.examples import Example, examples
from kvprune.demo.prompts import prompt
from kvprune.demo.tasks import TASKS

if TYPE_CHECKING:
    from transformers import MllamaForConditionalGeneration, ProcessorMixin


def encode(processor: ProcessorMixin, batch: Sequence[Example]) -> Any:
    """Return the model's inputs for a batch of examples, padded on the left."""
    texts = [prompt(processor, example.question) for example in batch]
    images = [[example.image] for example in batch]
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


@torch.no_grad()
def answer(
    model: MllamaForConditionalGeneration, processor: ProcessorMixin, batch: Sequence[Example]
) -> list[str]:
    """Return the model's answers, decoded greedily, without special tokens."""
    inputs = encode(processor, batch).to(model.device)
    generator: Any = model  # its `generate` is typed for another base class
    output = generator.generate(**inputs, max_new_tokens=12, do_sample=False)
    tokenizer: Any = processor.tokenizer
    decoded = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [str(text).strip() for text in decoded]


def accuracy(
    model: MllamaForConditionalGeneration,
    processor: ProcessorMixin,
    questions: Sequence[Example],
    batch_size: int = 32,
) -> float:
    """Return the share of examples whose answer equals one of their right answers, 0..1."""
    right = 0
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        given = answer(model, processor, batch)
        right += sum(text in example.answers for text, example in zip(given, batch, strict=True))
    return right / len(questions)


def chance(questions: Sequence[Example]) -> float:
    """Return the share of examples that the best rule without a picture gets right, 0..1.

    A rule is always to give the same answer, or always to repeat the question's word at the same place, which
    matters where the question names the answers to choose from. With few examples the best rule does better
    than it would with many.

    Raises:
        ValueError: If there is no example.
    """
    if not questions:
        raise ValueError("chance needs examples, got none")
    hits: Counter[str | int] = Counter()
    for example in questions:
        words = example.question.replace(",", " ").rstrip("?. ").split()
        places = (place for place, word in enumerate(words) if word in example.answers)
        hits.update({*example.answers, *places})
    return max(hits.values()) / len(questions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the accuracy and the chance of each task."""
    from kvprune.demo import load, model_path

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=model_path(), help="default: the embedded model")
    parser.add_argument("--count", type=int, default=500, help="examples per task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples")
    parser.add_argument("--split", default="held-out", choices=("held-out", "train"), help="which drawings")
    options = parser.parse_args(arguments)
    model, processor = load(path=options.model)
    for task in TASKS:
        chosen = examples(task, options.count, seed=options.seed, split=options.split)
        right = accuracy(model, processor, chosen)
        print(f"{task:8} {right:6.1%} of {len(chosen)}, chance {chance(chosen):5.1%}")


if __name__ == "__main__":
    main()
