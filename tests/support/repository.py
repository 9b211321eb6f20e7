"""Where the files lie that documents name."""

from __future__ import annotations

from pathlib import Path

import kvprune_strategies

import kvprune

ROOT = Path(__file__).parents[2]
CODE = {
    "kvprune": Path(kvprune.__file__).parent,
    "strategies/kvprune_strategies": Path(kvprune_strategies.__file__).parent,
}
"""Code is looked up where it was imported from: it may be installed, and not in the checkout."""


def place_of(file: str) -> Path:
    """Return the place of a file or folder, named from the top of the repository."""
    for folder, place in CODE.items():
        if file.rstrip("/") == folder or file.startswith(f"{folder}/"):
            return place / file.rstrip("/")[len(folder) + 1 :]
    return ROOT / file
