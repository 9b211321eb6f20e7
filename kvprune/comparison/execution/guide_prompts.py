"""Checks that a guide reads prompts and pictures exactly as the model that it guides."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvprune.comparison.execution.generation import Generator
from kvprune.errors import GuideError
from kvprune.session.guide import BoundGuide, Guide
from kvprune.session.registry import find_adapter
from kvprune.text import shown

__all__ = ["require_same_prompts"]

_NAMES = ("image_processor_type", "processor_class", "_processor_class", "_name_or_path")
"""Settings of a picture processor that change no pixel."""


def require_same_prompts(guide: Generator, target: Generator) -> None:
    """Raise unless a guide reads the prompts of a model as the model does: geometry, tokens and pictures.

    The size of its layers, and how many it has, are its own.

    Args:
        guide: The guide, with its processor.
        target: The model, with its processor.

    Raises:
        GuideError: Names the first difference.
    """
    BoundGuide(Guide(guide.model), find_adapter(target.model)(target.model))  # the geometry
    difference = next(_differences(guide.processor, target.processor), None)
    if difference is not None:
        raise GuideError(
            f"the guide reads prompts otherwise than the model: {difference}. Its ranking would be about "
            "another prompt; take a guide that was trained with the same processor"
        )


def _differences(guide: Any, target: Any) -> Iterator[str]:
    """Yield in which ways two processors make other inputs of the same conversation."""
    if guide.chat_template != target.chat_template:
        yield "it has another chat template"
    ours, theirs = guide.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    yield from _unequal(ours, theirs, "the id of token")
    yield from _unequal(_settings(guide), _settings(target), "the setting of its picture processor")


def _unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> Iterator[str]:
    for name in sorted(ours.keys() | theirs.keys()):
        own, wanted = ours.get(name), theirs.get(name)
        if own != wanted:
            yield f"{what} {shown(name)} is {shown(own)} instead of {shown(wanted)}"


def _settings(processor: Any) -> Mapping[str, Any]:
    """Return the settings of the part of a processor that reads pictures."""
    found = json.loads(processor.image_processor.to_json_string())
    return {name: value for name, value in found.items() if name not in _NAMES}
