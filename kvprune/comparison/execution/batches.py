"""Asks a model one batch of examples under one configuration, both to compare and to verify."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvprune.comparison.data.examples import Example, Kind, Utterance, normalise
from kvprune.comparison.execution.generation import Generator, Measured
from kvprune.comparison.execution.guide_prompts import require_same_prompts
from kvprune.comparison.execution.held import held_for_examples
from kvprune.comparison.execution.questions import PictureGenerator
from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.comparison.execution.transcripts import cap_after
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.answers import Answer, Transcript

__all__ = ["ask", "batches", "load_generator"]

_GENERATORS: Mapping[Kind, type[Generator]] = {"pictures": PictureGenerator, "speech": SpeechGenerator}


def batches(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    """Return the examples in batches of at most `size`, in order.

    A batch of recordings has one language, and all of them are longer than Whisper's window, or none. So the
    batches are those of each language in turn, and within it, of each of both kinds.
    """
    groups: dict[tuple[str, bool], list[Example]] = {}
    for example in examples:
        kind = (example.language, example.is_long) if isinstance(example, Utterance) else ("", False)
        groups.setdefault(kind, []).append(example)
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
    most = [generator.most_tokens(example) for example in batch]
    caps = (
        most
        if is_reference
        else [min(top, _cap(full[example.id], top)) for example, top in zip(batch, most, strict=True)]
    )
    who = generator.answering(one)
    with (
        generator.encoding_once(one),
        generator.compress_for(one, inputs, seed) as run,
        run.recording() as kept,
    ):
        new = who.generate(inputs, limit=max(caps), caps=caps)  # [B, new]
    if is_reference:
        generator.note_full(inputs, new)
    drawn = seed if run.report.drew else None
    held = held_for_examples(run, kept, drawn, len(batch), beside_full=one.contrast is not None)
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
            kept_fraction=held[number].kept_fraction,
            bytes_held=held[number].bytes_held,
            bytes_full=held[number].bytes_full,
            receipt=held[number].receipt,
            read_fraction=held[number].read_fraction,
        )
        answers.append(generator.judge(example, measured, tokens=tokens, cap=cap))
    return answers


def _cap(full: Answer, most: int) -> int:
    """Return the limit on an answer, given the full cache's answer to the same example, and its limit."""
    return cap_after(full.tokens) if isinstance(full, Transcript) else most
