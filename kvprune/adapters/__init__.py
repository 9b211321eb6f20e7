"""One file per model family; everything else in kvprune knows no model."""

from __future__ import annotations

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.probes import Probe

__all__ = ["ModelAdapter", "Probe"]
