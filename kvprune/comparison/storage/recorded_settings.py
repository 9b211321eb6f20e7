"""The settings of a run, read back from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage.manifest import DEMO
from kvprune.comparison.storage.recorded_grid import RecordedGrid
from kvprune.errors import ResultsError

__all__ = ["recorded_settings"]

_SHARED = ("max_new_tokens", "reread", "device", "dtype", "attn_implementation")
"""Settings that a manifest records among the ingredients that all units share."""


def recorded_settings(folder: Path, manifest: Mapping[str, Any], grid: RecordedGrid) -> Settings:
    """Return the settings that a manifest records, except that code that comes with a model is never trusted.

    Tasks and limit are None: the grid names its examples.

    Args:
        folder: The results folder.
        manifest: The manifest of that folder.
        grid: The grid in it.

    Raises:
        ResultsError: If something is missing or of another type.
        KVPruneError: If a value is out of range.
    """
    about = manifest.get("about")
    places = [about.get(name) for name in ("model", "data", "against")] if isinstance(about, dict) else [None]
    if not all(isinstance(one, str) for one in places):
        raise ResultsError(
            f"{folder / 'manifest.json'} is damaged: about.model, about.data or about.against is not a string"
        )
    model, data, against = places
    return Settings(
        model=None if model == DEMO else model,
        data=Path(str(data)) if grid.origin == "file" else None,
        demo="speech" if grid.origin == "speech" else "pictures",
        seed=grid.seeds[0],
        output=folder,
        batch_size=max((len(batch) for batch in grid.batches), default=1),
        draws=len(grid.seeds),
        against=str(against),
        **{name: grid.context[name] for name in _SHARED},
    )
