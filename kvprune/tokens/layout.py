"""What the columns of the encoder are and where they lie (`Layout`), for policies that use positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["AUDIO_FRAME", "ENCODER_TOKEN", "IMAGE_PATCH", "IMAGE_TOKEN", "TEXT_TOKEN", "Layout", "Unit"]


@dataclass(frozen=True)
class Unit:
    """What one column of the encoder is, as words for messages.

    Args:
        one: Singular, such as "audio frame".
        many: Plural; by default, the singular and an s.
    """

    one: str
    many: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "many", self.many or f"{self.one}s")


ENCODER_TOKEN = Unit("encoder token")
"""Nothing is known, or a cache holds several kinds of columns."""

IMAGE_TOKEN = Unit("image token")
"""A patch of a picture, or the class token of one of its tiles."""

IMAGE_PATCH = Unit("image patch", "image patches")
AUDIO_FRAME = Unit("audio frame")
TEXT_TOKEN = Unit("text token")


@dataclass(frozen=True, eq=False)
class Layout:
    """What each column is, and its position.

    Args:
        places: int64 ``[B or 1, S, 2]``, row and column of the patch, counted over the whole image (the
            offset of its tile is included); -1, -1 for columns without a position (class tokens, padding,
            text beside an image). Columns of a line (audio, text) lie in row 0.
        class_tokens: bool ``[B or 1, S]``, which columns are class tokens of the encoder; None if the encoder
            has none.
        geometry: "grid": places are rows and columns. "line": columns follow each other in time or in a text.
            "unknown": nobody knows where columns lie, all places are -1, and ``reason`` says why.
        units: What columns are, in the plural sense: one `Unit`, or several if the cache holds several kinds.
        kinds: int64 ``[B or 1, S]``, which of the units each column is; None if there is only one.
        seconds: Seconds of sound that one column adds; None where columns are no sound, or it is unknown.
        reason: Why there is no grid, or why positions are unknown, as the end of a sentence; may be empty.
    """

    places: Tensor
    class_tokens: Tensor | None = None
    geometry: Literal["grid", "line", "unknown"] = "grid"
    units: tuple[Unit, ...] = (ENCODER_TOKEN,)
    kinds: Tensor | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def unit(self) -> Unit:
        """What one column is; `ENCODER_TOKEN` if the cache holds several kinds."""
        return self.units[0] if len(self.units) == 1 else ENCODER_TOKEN

    @property
    def runs(self) -> Tensor | None:
        """Runs of columns of one kind, numbered in order, int64 ``[B or 1, S]``; None if all are of one kind.

        Policies that pool or merge along columns stay within a run, so that no text enters a picture.
        """
        if self.kinds is None:
            return None
        begins = torch.zeros_like(self.kinds)
        begins[:, 1:] = self.kinds[:, 1:] != self.kinds[:, :-1]
        return begins.cumsum(-1)

    @classmethod
    def line(
        cls,
        columns: int,
        device: torch.device | str = "cpu",
        *,
        unit: Unit = ENCODER_TOKEN,
        seconds: float | None = None,
    ) -> Layout:
        """Return the layout of a sequence: column s of the cache is at (0, s)."""
        index = torch.arange(columns, device=device)
        places = torch.stack([torch.zeros_like(index), index], dim=-1)[None]
        return cls(places, geometry="line", units=(unit,), seconds=seconds)

    @classmethod
    def unknown(
        cls, columns: int, reason: str, device: torch.device | str = "cpu", *, units: tuple[Unit, ...]
    ) -> Layout:
        """Return the layout of columns whose positions are unknown."""
        places = torch.full((1, columns, 2), -1, device=device)
        return cls(places, geometry="unknown", units=units, reason=reason)

    @classmethod
    def grid(
        cls,
        rows: int,
        across: int,
        device: torch.device | str = "cpu",
        *,
        class_tokens: int = 0,
        others: int = 0,
        unit: Unit = IMAGE_PATCH,
    ) -> Layout:
        """Return the layout of one picture in reading order.

        Args:
            rows: Rows of patches.
            across: Patches in a row.
            device: Device of the tensors.
            class_tokens: Class tokens before the patches.
            others: Further columns without a position, between class tokens and patches.
            unit: What one column is.
        """
        patch = torch.arange(rows * across, device=device)
        places = torch.stack([patch // across, patch % across], dim=-1)  # [rows * across, 2]
        places = torch.cat([places.new_full((class_tokens + others, 2), -1), places])[None]
        marked = torch.arange(places.shape[1], device=device)[None] < class_tokens
        return cls(places, marked if class_tokens else None, units=(unit,))

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
        marked = is_class.reshape(batch, -1) if class_token else None
        return cls(places.reshape(batch, -1, 2), marked, units=(IMAGE_TOKEN,))

    def at(self, indices: Tensor, valid: Tensor) -> Layout:
        """Return the layout of chosen columns.

        Args:
            indices: int64 ``[B, K]``.
            valid: bool ``[B, K]``; padding has no position.
        """
        batch, device = indices.shape[0], self.places.device
        indices, valid = indices.to(device), valid.to(device)
        places = self.places.expand(batch, -1, -1).gather(1, indices[..., None].expand(-1, -1, 2))
        classes, kinds = self.class_tokens, self.kinds
        return replace(
            self,
            places=places.masked_fill(~valid[..., None], -1),
            class_tokens=None if classes is None else classes.expand(batch, -1).gather(1, indices) & valid,
            kinds=None if kinds is None else kinds.expand(batch, -1).gather(1, indices),
        )
