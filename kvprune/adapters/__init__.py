"""Adapters hook model families, one file per family; no other code in kvprune knows a model."""

from __future__ import annotations

from kvprune.adapters.base import ModelAdapter, Site
from kvprune.adapters.probes import Probe

__all__ = ["ModelAdapter", "Probe", "Site"]
