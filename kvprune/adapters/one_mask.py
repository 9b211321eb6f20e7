"""A mask by head for attention modules that accept only one mask for all heads.

Older modules (LED, MVP, TrOCR) raise unless the mask is ``[B, 1, T, K]``, and then do nothing with it but add
it to logits ``[B, Hq, T, K]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import UnsupportedCacheError

__all__ = ["OneMask", "by_head"]

_ADDING = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}
_COPYING = {
    torch.ops.aten._to_copy.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.detach.default,
}


class OneMask(Tensor):
    """A tensor ``[B, 1, T, K]`` that stands for an additive mask of each head, ``[B, Hq, T, K]``.

    Two things can be done with it: it can be added to logits ``[B, Hq, T, K]``, which adds each head's own
    mask, and it can be copied, also to another dtype or device. Anything else raises.

    Args:
        by_head: The masks, ``[B, Hq, T, K]``.

    Raises:
        UnsupportedCacheError: If something else is done with it, or if the masks have gradients, which would
            be lost.
    """

    by_head: Tensor

    @staticmethod
    def __new__(cls, by_head: Tensor) -> OneMask:
        """Return the mask that looks as if it were for all heads."""
        if by_head.requires_grad:
            raise UnsupportedCacheError(
                "a mask with gradients, which merged tokens give it, cannot be given to attention that takes "
                "one mask for all heads; use torch.no_grad(), or a policy whose heads share tokens"
            )
        batch, _, rows, entries = by_head.shape
        made: OneMask = Tensor._make_wrapper_subclass(
            cls, (batch, 1, rows, entries), dtype=by_head.dtype, device=by_head.device
        )
        made.by_head = by_head
        return made

    def __repr__(self, **options: object) -> str:  # type: ignore[override]
        """Say which masks it stands for."""
        return f"OneMask({self.by_head!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Return the names of the tensors that it is made of, for torch.compile."""
        return ["by_head"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, size: Sequence[int], stride: Sequence[int]
    ) -> OneMask:
        """Return the mask that these tensors make, for torch.compile."""
        return OneMask(inner["by_head"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add the masks to logits, or copy them."""
        whole = [one.by_head if isinstance(one, OneMask) else one for one in args]
        if func in _COPYING:
            return OneMask(func(*whole, **(kwargs or {})))
        if func in _ADDING and _fit(args):
            return func(*whole, **(kwargs or {}))
        shapes = [tuple(one.shape) for one in whole if isinstance(one, Tensor)]
        raise UnsupportedCacheError(
            f"{func} was called with a mask of each head (shapes {shapes}); attention that accepts one mask "
            "for all heads can only add it to logits of the same shape; use a policy whose heads share tokens"
        )


def by_head(mask: Tensor | None) -> Tensor | None:
    """Return a mask as it is, or the masks ``[B, Hq, T, K]`` that a `OneMask` stands for."""
    return mask.by_head if isinstance(mask, OneMask) else mask


def _fit(args: Sequence[Any]) -> bool:
    """Whether masks are added to something that has all heads."""
    masks = [one for one in args if isinstance(one, OneMask)]
    logits = [one for one in args if isinstance(one, Tensor) and not isinstance(one, OneMask)]
    return len(masks) == len(logits) == 1 and logits[0].shape[1:2] == masks[0].by_head.shape[1:2]
