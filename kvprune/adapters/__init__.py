"""One file per model family; everything else in kvprune knows no model."""

from __future__ import annotations

from kvprune.adapters.base import ModelAdapter, Probe

__all__ = ["ModelAdapter", "Probe"]
