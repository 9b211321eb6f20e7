"""Asks a model one batch of examples under one configuration, both to compare and to verify."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvprune.comparison.data.examples import Example, Kind, Utterance, normalise
from kvprune.comparison.execution.generation import Generator, Measured
from kvprune.comparison.execution.guide_prompts import require_same_prompts
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.execution.receipt_digests import receipts
from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.comparison.execution.transcripts import cap_after
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.answers import Answer, Transcript
from kvprune.errors import ResultsError

__all__ = ["ask", "batches", "load_generator"]

_GENERATORS: Mapping[Kind, type[Generator]] = {"pictures": PictureGenerator, "speech": SpeechGenerator}


def batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Return the examples in batches of at most `size`, in order.

    A batch of recordings has one language, so its batches are those of each language in turn.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.language if isinstance(example, Utterance) else "", []).append(example)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def load_generator(settings: Settings, kind: Kind) -> Generator:
    """Load the model that the settings name, and its guide, to answer examples of this kind.

    Args:
        settings: The settings. Only the guide that they name is loaded; None is none here.
        kind: What the examples are.

    Raises:
        UnsupportedModelError, ModuleNotFoundError: See `Generator.load`.
        GuideError: If the guide reads prompts or pictures otherwise than the model.
    """
    load = functools.partial(
        _GENERATORS[kind].load,
        device=resolve_device(settings.device),
        attn_implementation=settings.attn_implementation,
        max_new_tokens=settings.max_new_tokens,
        reread=settings.reread,
        trust_remote_code=settings.trust_remote_code,
    )
    generator, named = load(settings.model, dtype=settings.dtype), sources.guide_weights(settings.guide)
    if named is None:
        return generator
    # Both read the same inputs, so the guide has the dtype of the model.
    guide = load(named, dtype=str(generator.model.dtype).removeprefix("torch."))
    require_same_prompts(guide, generator)
    return replace(generator, guide=guide)


def ask(
    generator: Generator,
    batch: Sequence[Example],
    inputs: Mapping[str, Any],
    one: Configuration,
    seed: int,
    full: Mapping[str, Answer],
) -> list[Answer]:
    """Answer a batch under one configuration.

    The model's encoder runs once for all configurations of a batch, see `EncoderReuse`. Transcripts of a
    pruned cache are cut where a limit says that follows from the full cache's transcript of the same
    recording, see `cap_after`. Decoding is greedy, so each is what generation with that limit gives. A policy
    that may look at the answer is given that of the full cache.

    Args:
        generator: The model.
        batch: The examples.
        inputs: What `generator.encode` returned for these examples.
        one: The configuration.
        seed: Seed for policies that draw at random.
        full: Answers of the full cache, by example id; not read when `one` is the full cache.

    Returns:
        One answer for each example, in the same order. Their seed is None if the policy drew nothing.

    Raises:
        ResultsError: If the policy's report does not cover every example.
        KVPruneError: If the model or its adapter refuses the policy, see `kvprune.compress`.
    """
    is_reference = one.spec == REFERENCE
    most = generator.max_new_tokens
    caps = [most if is_reference else min(most, _cap(full[example.id], most)) for example in batch]
    who = generator.answering(one)
    with generator.encoding_once(one), generator.compress_for(one, inputs, seed) as run:
        new = who.generate(inputs, limit=max(caps))  # [B, new]
    if is_reference:
        generator.note_full(inputs, new)
    report = run.report
    kept = report.kept_per_sample
    if len(kept) != len(batch) or any(math.isnan(fraction) for fraction in kept):
        raise ResultsError(
            f"{one.spec} reports kept fractions {kept} for {len(batch)} examples; each needs one"
        )
    drawn = seed if report.drew else None
    proofs = receipts(one.spec, drawn, report.layers, run.selections)
    answers = []
    for number, (example, cap) in enumerate(zip(batch, caps, strict=True)):
        of_example = new[number : number + 1, :cap]  # [1, up to cap]
        (tokens,), (text,) = who.lengths(of_example), who.texts(of_example)
        measured = Measured(
            spec=one.spec,
            seed=drawn,
            id=example.id,
            task=example.task,
            answer=text,
            agrees_with_full=is_reference or normalise(text) == normalise(full[example.id].answer),
            finished=tokens < cap,
            kept_fraction=kept[number],
            bytes_held=report.bytes_held // len(batch),
            bytes_full=report.bytes_full // len(batch),
            receipt=proofs[number],
        )
        answers.append(generator.judge(example, measured, tokens=tokens, cap=cap))
    return answers


def _cap(full: Answer, most: int) -> int:
    """Return the limit on an answer, given the full cache's answer to the same example, and its limit."""
    return cap_after(full.tokens) if isinstance(full, Transcript) else most
