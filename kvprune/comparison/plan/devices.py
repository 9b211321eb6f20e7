"""Data types and devices that a comparison may run on."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "resolve_device"]


DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def resolve_device(device: str | None) -> str:
    """Return `device`, or the first CUDA device, or the CPU where there is none."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
