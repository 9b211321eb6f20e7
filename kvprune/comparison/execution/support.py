"""Finds the adapter of a model by its configuration, before its weights are loaded."""

from __future__ import annotations

from pathlib import Path

from transformers.utils.hub import cached_file

from kvprune.adapters.base import ModelAdapter
from kvprune.comparison.data.examples import kind_of
from kvprune.comparison.data.safe_json import parse
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage import sources
from kvprune.errors import DataError
from kvprune.session.registry import load

__all__ = ["adapter_for"]


def adapter_for(settings: Settings) -> type[ModelAdapter] | None:
    """Return the adapter of the model that the settings name; None if that is not known yet.

    Only ``config.json`` is read, and no code of the model runs. A model or data that cannot be found or are
    damaged are no error here: reading them says what is wrong.
    """
    try:
        kind = settings.demo if settings.data is None else kind_of(settings.data)
        model = sources.weights(sources.model_of(settings, kind))
        path = cached_file(model, "config.json")
        content = parse(Path(path).read_bytes()) if path else {}
    except (OSError, ValueError, DataError):
        return None
    named = content.get("architectures") if isinstance(content, dict) else None
    classes = set(named) if isinstance(named, list) and all(isinstance(one, str) for one in named) else set()
    found = (entry.cls for entry in load().adapters)
    return next((cls for cls in found if classes & set(cls.model_classes)), None)
