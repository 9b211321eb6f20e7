"""`random`: the control that every method has to beat.

The file is not called random.py, because that would shadow the standard library's module.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvprune import LayerView, ScoringPolicy


@dataclass(frozen=True, kw_only=True)
class Random(ScoringPolicy):
    """Keep tokens drawn at random, shared by the heads of a layer.

    The draw depends on the seed, the layer and what the encoder read for the sample. So samples and layers
    differ, but a sample draws the same alone, in a batch, as several beams, and on any device.
    """

    name = "random"
    version = 1

    def score(self, view: LayerView) -> Tensor:
        """Return uniform random scores ``[B, 1, S]``."""
        return view.random()

    cost = "S random numbers per sample, drawn on the CPU"
