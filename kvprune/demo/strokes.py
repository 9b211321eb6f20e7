"""What drawings of glyphs have in common: their size, and the two splits."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "held-out"]
Floats = NDArray[np.float32]

FINE = 32
"""Side in pixels of a drawing that glyphs are sampled from."""


def check_split(split: str) -> None:
    """Raise unless there is a split of this name.

    Raises:
        ValueError: If `split` is neither "train" nor "held-out".
    """
    if split not in ("train", "held-out"):
        raise ValueError(f"split must be 'train' or 'held-out', not {split!r}")
