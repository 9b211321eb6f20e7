"""Asks a model one batch of questions under one configuration, both to compare and to verify."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvprune.comparison.data.examples import Example, is_correct, normalise
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.receipt_digests import receipts
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage.answers import Answer
from kvprune.errors import ResultsError
from kvprune.session.compression import compress

__all__ = ["ask", "batches", "load_generator"]


def batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Return the examples in batches of `size`, in order; the last batch may be smaller."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def load_generator(settings: Settings) -> Generator:
    """Load the model that the settings name; see `Generator.load`."""
    return Generator.load(
        settings.model,
        device=resolve_device(settings.device),
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        max_new_tokens=settings.max_new_tokens,
        trust_remote_code=settings.trust_remote_code,
    )


def ask(
    generator: Generator,
    batch: Sequence[Example],
    inputs: Mapping[str, Any],
    one: Configuration,
    seed: int,
    full: Mapping[str, Answer],
) -> list[Answer]:
    """Answer a batch under one configuration.

    Args:
        generator: The model.
        batch: The examples.
        inputs: What `generator.encode` returned for these examples.
        one: The configuration.
        seed: Seed for policies that draw at random.
        full: Answers of the full cache by example id; not read when `one` is the full cache.

    Returns:
        One answer for each example, in the same order.

    Raises:
        ResultsError: If the policy's report does not cover every example.
    """
    with compress(generator.model, one.policy, seed=seed) as run:
        new = generator.generate(inputs)
    report = run.report
    kept = report.kept_per_sample
    if len(kept) != len(batch) or any(math.isnan(fraction) for fraction in kept):
        raise ResultsError(
            f"{one.spec} reports kept fractions {kept} for {len(batch)} examples; each needs one"
        )
    proofs = receipts(one.spec, seed, report.layers, run.selections)
    texts, finished = generator.texts(new), generator.finished(new)
    return [
        Answer(
            spec=one.spec,
            id=example.id,
            task=example.task,
            answer=texts[number],
            correct=is_correct(texts[number], example.answers),
            agrees_with_full=one.spec == REFERENCE
            or normalise(texts[number]) == normalise(full[example.id].answer),
            finished=finished[number],
            kept_fraction=kept[number],
            bytes_held=report.bytes_held // len(batch),
            bytes_full=report.bytes_full // len(batch),
            receipt=proofs[number],
        )
        for number, example in enumerate(batch)
    ]
