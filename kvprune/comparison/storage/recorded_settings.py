"""The settings of a run, read back from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.storage.manifest import DEMO
from kvprune.comparison.storage.recorded_grid import RecordedGrid, read_about

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
    about = read_about(folder / "manifest.json", manifest)
    return Settings(
        model=None if about["model"] == DEMO else about["model"],
        guide=about["guide"],
        data=Path(about["data"]) if grid.origin == "file" else None,
        demo="speech" if grid.origin == "speech" else "pictures",
        seed=grid.seeds[0],
        output=folder,
        batch_size=max((len(batch) for batch in grid.batches), default=1),
        draws=len(grid.seeds),
        against=about["against"],
        **{name: grid.context[name] for name in _SHARED},
    )
