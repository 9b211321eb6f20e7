"""Notices the moment at which `generate` has its first new token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["criteria"]


def criteria(on_first: Callable[[], None] | None) -> dict[str, Any]:
    """Return the argument of `generate` that calls a function once, after the first new token of a batch.

    Args:
        on_first: The function; None adds no argument.
    """
    if on_first is None:
        return {}
    from transformers import StoppingCriteriaList

    return {"stopping_criteria": StoppingCriteriaList([_FirstToken(on_first)])}


class _FirstToken:
    """A stopping criterion that never stops; `generate` calls it after each token."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self._on_first: Callable[[], None] | None = on_first

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # [B]
