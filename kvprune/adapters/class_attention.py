"""Captures the attention from class tokens to patches in one layer of a vision tower.

Fused attention returns no weights, so hooks capture the projected queries and keys. Only the rows of class
tokens are computed, one for each tile, never the full attention matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kvprune.adapters.arguments import named_arguments
from kvprune.adapters.attachment import Attachment
from kvprune.errors import UnsupportedModelError
from kvprune.tokens.precision import accumulation_dtype

__all__ = ["ClassAttention"]

_ELEMENTS_PER_CHUNK = 2**20  # 4 MiB of float32


@dataclass
class ClassAttention:
    """Attention from each tile's class token to the patches of its own tile, in one forward call.

    The layer attends over all tiles of an image at once. Its weights are summed over heads, restricted to the
    patches of the class token's own tile, and normalized to sum to 1 there.

    Args:
        policy_name: For messages.
        module: The self-attention module; it has ``q_proj``, ``k_proj``, ``num_heads`` and ``scaling``.
        patches: Tokens per tile, class token first. The module may see more tokens per tile, as padding.
        exists: bool ``[B, images, tiles]``, false for padding tiles.
        copies: Consecutive rows of the batch that are equal.
    """

    policy_name: str
    module: Any
    patches: int
    exists: Tensor
    copies: int = 1
    _queries: Tensor | None = field(default=None, init=False)
    _keys: Tensor | None = field(default=None, init=False)
    _found: Tensor | None = field(default=None, init=False)

    def hook(self, attachment: Attachment) -> None:
        """Hook the module for one forward call; the attachment removes the hooks when it ends."""
        attachment.after(self.module.q_proj, self._after_q_proj, for_one_call=True)
        attachment.after(self.module.k_proj, self._after_k_proj, for_one_call=True)
        attachment.after(self.module, self._after_module, for_one_call=True)

    def by_column(self) -> Tensor:
        """Return the attention of each column, float32 or float64 ``[R, S]``; 0 for class tokens and padding.

        Raises:
            UnsupportedModelError: If the vision tower has not run.
        """
        if self._found is None:
            raise UnsupportedModelError(
                f"policy {self.policy_name!r} needs view.class_attention, but the vision tower did not run "
                "in this call; call the model that was given to compress()"
            )
        return self._found

    def _after_q_proj(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        by_tile = output.detach().unflatten(1, (self.exists.shape[-1], -1))  # [images, tiles, tokens, H * D]
        self._queries = by_tile[:, :, 0].clone()  # class tokens; a view would keep all tokens in memory

    def _after_k_proj(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self._keys = output.detach()

    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._queries is not None
        assert self._keys is not None
        mask = named_arguments(module, args, kwargs).get("attention_mask")
        images = torch.arange(len(self._keys), device=self._keys.device)  # [B * images]
        by_sample = images.unflatten(0, self.exists.shape[:2])[:: self.copies]  # [R, images]
        with torch.no_grad():
            rows = [self._image(image, mask) for image in by_sample.flatten().tolist()]
        there = self.exists[:: self.copies, ..., None].to(images.device)  # [R, images, tiles, 1]
        found = torch.stack(rows).unflatten(0, by_sample.shape)  # [R, images, tiles, patches]
        self._found = torch.where(there, found, 0).flatten(1)
        self._queries = self._keys = None

    def _image(self, image: int, mask: Tensor | None) -> Tensor:
        """Return the attention of one image, ``[tiles, patches]``, padding tiles included."""
        assert self._queries is not None
        assert self._keys is not None
        heads = self.module.num_heads
        queries = rearrange(self._queries[image], "u (h d) -> h u d", h=heads)
        keys = rearrange(self._keys[image], "l (h d) -> h d l", h=heads)
        dtype = accumulation_dtype(keys)
        some = max(1, _ELEMENTS_PER_CHUNK // keys[0].numel())
        logits = torch.cat(
            [q.to(dtype) @ k.to(dtype) for q, k in zip(queries.split(some), keys.split(some), strict=True)]
        ).mul_(self.module.scaling)  # [heads, tiles, all tokens]
        tiles = logits.shape[1]
        if mask is not None:
            rows = mask[image, 0].unflatten(0, (tiles, -1))[:, 0]  # [tiles, all tokens], of class tokens
            logits += rows.to(dtype)
        # Log weights until the largest is subtracted: a class token may give its own tile almost nothing.
        shares = logits.log_softmax(-1).unflatten(-1, (tiles, -1))  # [heads, tiles, tiles, tokens]
        own = shares.diagonal(dim1=1, dim2=2)[:, 1 : self.patches]  # [heads, patches - 1, tiles]
        weights = (own - own.amax((0, 1))).exp().sum(0)  # [patches - 1, tiles]
        weights = (weights / weights.sum(0)).mT  # [tiles, patches - 1]
        return torch.cat([torch.zeros_like(weights[:, :1]), weights], dim=-1)
