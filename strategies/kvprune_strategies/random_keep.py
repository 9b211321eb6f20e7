"""`random`: the control that every method has to beat.

The file is not called random.py, which would shadow the standard library's module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvprune import LayerView, ScoringPolicy


@dataclass(frozen=True, kw_only=True)
class Random(ScoringPolicy):
    """Keep tokens drawn at random, shared by the heads of a layer.

    The draw depends on the seed, the layer and what the encoder read for the sample, so samples and layers
    differ, while a sample draws the same alone, in a batch, as several beams, and on any device.
    """

    name: ClassVar[str] = "random"
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "S random numbers per sample, drawn on the CPU"

    def score(self, view: LayerView) -> Tensor:
        """Return uniform random scores ``[B, 1, S]``."""
        return view.random()
