"""Tensors that an adapter captured for one view: one field for each value of `CrossKVPolicy.needs`.

A new need takes a field here, a property of the view, and the capture in an adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.policy.text_view import TextView
from kvprune.tokens.selection import Selection

__all__ = ["Captured"]


def _with_columns(axis: int) -> Any:
    """Declare a tensor whose ``axis`` counts encoder tokens."""
    return field(default=None, metadata={"columns": axis})


@dataclass(frozen=True, kw_only=True, eq=False)
class Captured:
    """Tensors that a policy declared in ``needs``, besides keys, values and visibility; others are None.

    Axes: B samples, T text rows, S encoder tokens, Hq and Hkv query and KV heads, D head width, C width of
    encoder features.

    Args:
        queries: ``[B, Hq, T, D]`` as they enter the attention product.
        raw_keys: ``[B, Hkv, S, D]`` before any key norm.
        features: ``[B, S, C]`` as they enter the projections to keys and values.
        guidance: ``[B, S]``, the importance of each token according to a guide.
        reconstruction: ``[B, Hkv, S]``, the largest attention of a reconstruction pass in the view's layer.
        class_attention: ``[B, S]``, attention from each tile's class token to its patches.
        question: ``[B, W]``, the last hidden state of a pass over the prompt's text alone.
        text: The self-attention layer before this layer.
    """

    queries: Tensor | None = None
    raw_keys: Tensor | None = _with_columns(2)
    features: Tensor | None = _with_columns(1)
    guidance: Tensor | None = _with_columns(1)
    reconstruction: Tensor | None = _with_columns(2)
    class_attention: Tensor | None = _with_columns(1)
    question: Tensor | None = None
    text: TextView | None = None

    def at(self, selection: Selection | None) -> Captured:
        """Return the captured tensors at the selected columns; 0 at padding of a ragged batch.

        Args:
            selection: Shared by heads, ``[B, 1, K]``; None for all columns.
        """
        if selection is None:
            return self
        taken: dict[str, Any] = {}
        for one in fields(self):
            tensor, axis = getattr(self, one.name), one.metadata.get("columns")
            if tensor is not None and axis is not None:
                shape = [1] * tensor.ndim
                shape[0], shape[axis] = selection.indices.shape[0], -1
                index = selection.indices.to(tensor.device).reshape(shape)  # [B, ..., K, ...]
                padding = ~selection.valid.to(tensor.device).reshape(shape)  # [B, ..., K, ...]
                taken[one.name] = torch.take_along_dim(tensor, index, axis).masked_fill(padding, 0)
        return replace(self, **taken)

    def rows(self, which: slice) -> Captured:
        """Return some rows of the batch; ``text`` is unchanged, it already has one row per sample."""
        if which == slice(None, None, 1):
            return self
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        taken: dict[str, Any] = {
            name: tensor[which] for name, tensor in tensors.items() if isinstance(tensor, Tensor)
        }
        return replace(self, **taken)

    def only(self, needs: Collection[str]) -> Captured:
        """Return only the named fields; all others are None."""
        return self.without(*(one.name for one in fields(self) if one.name not in needs))

    def without(self, *names: str) -> Captured:
        """Return it with the named fields set to None."""
        gone: dict[str, Any] = dict.fromkeys(names)
        return replace(self, **gone)

    def joined(self, other: Captured, device: torch.device | None = None) -> Captured:
        """Return the fields of both; if both have one, this object's value is used.

        Args:
            other: Captured tensors of the same columns and rows.
            device: Device to which the other's tensors are moved.
        """
        added: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(other, one.name)
            if value is not None and getattr(self, one.name) is None:
                added[one.name] = value.to(device) if isinstance(value, Tensor) else value
        return replace(self, **added) if added else self
