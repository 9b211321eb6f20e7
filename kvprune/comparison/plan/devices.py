"""The data types and devices that a comparison can run on."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "resolve_device"]


DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
"""Names of the data types of weights; "auto" is that of the checkpoint."""


def resolve_device(device: str | None) -> str:
    """Return `device`; for None, "cuda" where there is a CUDA device, else "cpu"."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
