"""Where encoder tokens lie in their image (`Layout`), for policies that use positions or neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Position of each column in its image.

    Args:
        places: int64 ``[B or 1, S, 2]``, row and column of the patch, counted over the whole image (the
            offset of its tile is included); -1, -1 for columns without a position (class tokens, padding).
            A sequence (audio, text) lies in row 0.
        class_tokens: bool ``[B or 1, S]``, which columns are class tokens of the encoder; None if the encoder
            has none.
    """

    places: Tensor
    class_tokens: Tensor | None = None

    @classmethod
    def line(cls, columns: int, device: torch.device | str = "cpu") -> Layout:
        """Return the layout of a sequence: column s of the cache is at (0, s)."""
        index = torch.arange(columns, device=device)
        return cls(torch.stack([torch.zeros_like(index), index], dim=-1)[None])

    @classmethod
    def tiles(
        cls,
        grid: int,
        arrangement: Tensor,
        tiles: int,
        *,
        class_token: bool,
        exists: Tensor | None = None,
    ) -> Layout:
        """Return the layout of images that are cut into square tiles, stored in reading order.

        Args:
            grid: Patches along each side of a tile.
            arrangement: int64 ``[B, images]``, number of tiles in a row of the image; 0 if there is no image.
            tiles: Tiles stored for each image, padding tiles included.
            class_token: Whether each tile begins with a class token.
            exists: bool ``[B, images, tiles]``, which tiles are not padding; by default, none is.
        """
        device = arrangement.device
        tile = torch.arange(tiles, device=device)
        across = arrangement.clamp(min=1)[..., None]  # [B, images, 1]
        corner = torch.stack([tile // across, tile % across], dim=-1) * grid  # [B, images, tiles, 2]
        patch = torch.arange(grid * grid, device=device)
        inside = torch.stack([patch // grid, patch % grid], dim=-1)  # [grid * grid, 2]
        places = corner[..., None, :] + inside  # [B, images, tiles, grid * grid, 2]
        there = (arrangement > 0)[..., None].expand(-1, -1, tiles)  # [B, images, tiles]
        if exists is not None:
            there = there & exists
        places = places.masked_fill(~there[..., None, None], -1)
        if class_token:
            places = torch.cat([torch.full_like(places[..., :1, :], -1), places], dim=-2)
        is_class = torch.zeros(places.shape[:-1], dtype=torch.bool, device=device)  # [B, images, tiles, ...]
        if class_token:
            is_class[..., 0] = there
        batch = arrangement.shape[0]
        return cls(places.reshape(batch, -1, 2), is_class.reshape(batch, -1) if class_token else None)

    def at(self, indices: Tensor, valid: Tensor) -> Layout:
        """Return the layout of chosen columns.

        Args:
            indices: int64 ``[B, K]``.
            valid: bool ``[B, K]``; padding has no position.
        """
        batch = indices.shape[0]
        index = indices[..., None].expand(-1, -1, 2).to(self.places.device)  # [B, K, 2]
        valid = valid.to(self.places.device)
        places = self.places.expand(batch, -1, -1).gather(1, index).masked_fill(~valid[..., None], -1)
        if self.class_tokens is None:
            return Layout(places)
        return Layout(places, self.class_tokens.expand(batch, -1).gather(1, index[..., 0]) & valid)
