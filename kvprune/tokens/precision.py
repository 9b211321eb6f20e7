"""The dtype in which sums and scores are computed: float32, or float64 for float64 models."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype"]


def accumulation_dtype(of: Tensor | torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for everything else.

    Logits and sums in bfloat16 or float16 change which tokens rank highest.
    """
    dtype = of if isinstance(of, torch.dtype) else of.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32
