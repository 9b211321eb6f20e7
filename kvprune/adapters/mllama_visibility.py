"""What the text rows of an Mllama's forward call may attend: from its masks to a `Visibility` by tile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.visibility import Visibility

__all__ = ["arriving_tiles", "tiles_of_rows", "visibility_of"]


def arriving_tiles(named: Mapping[str, Any], batch: int, patches: int) -> tuple[Tensor, int]:
    """Return what the encoder reads or has read, ``[B, ...]``, and how many tiles that is for each sample.

    Args:
        named: Arguments of the forward call by name.
        batch: Rows B of the call.
        patches: Columns of a tile.
    """
    pixels, states = named.get("pixel_values"), named.get("cross_attention_states")
    if pixels is not None:
        return pixels, pixels.shape[1] * pixels.shape[2]
    source = cast(Tensor, states)
    new_units = source[..., 0].numel() // (batch * patches)
    if source.shape[0] != batch:
        source = rearrange(source, "(b i) p c -> b i p c", b=batch)
    return source, new_units


def tiles_of_rows(mask: Tensor, length: int, cache: Any) -> Tensor:
    """Return which tile of which image each text row of a call may attend, bool ``[B, T, U]``.

    Args:
        mask: ``[B, T, images, tiles]``; T may count the rows of the whole conversation.
        length: Text rows of the call.
        cache: What the call reads, if anything.

    Raises:
        UnsupportedCacheError: If the mask has another shape.
    """
    if mask.ndim != 4:
        raise UnsupportedCacheError(
            f"cross_attention_mask is [B, T, images, tiles] as the processor makes it, got {list(mask.shape)}"
        )
    if mask.shape[1] != length:  # a plain forward call may pass the rows of the whole conversation
        seen = int(cache.get_seq_length()) if cache is not None else 0
        missing = seen + length - mask.shape[1]
        if missing > 0:  # draft tokens in older releases; new rows repeat the last one, as in generate
            mask = torch.cat([mask, mask[:, -1:].expand(-1, missing, -1, -1)], dim=1)
        mask = mask[:, seen : seen + length]
    return (mask == 1).flatten(2)


def visibility_of(
    rows: Tensor,
    attention_mask: Tensor | None,
    length: int,
    *,
    drafts: int,
    copies: int,
    patches: int,
    tiles: int,
) -> Visibility:
    """Return what the text rows of a call may attend, for one of each ``copies`` rows of the batch.

    Args:
        rows: bool ``[B, T or 1, U]``, which tiles each text row may attend.
        attention_mask: ``[B, tokens so far]``, zero at padding.
        length: Text rows T of the call.
        drafts: How many of them, at the end, are drafts.
        copies: Consecutive rows of the batch that are equal.
        patches: Columns of a tile.
        tiles: Tiles stored for each image.
    """
    live = rows.any(-1).expand(-1, length).clone()  # [B, T]
    if attention_mask is not None and attention_mask.ndim == 2:
        live &= attention_mask[:, -length:].to(live.device).bool()
    if drafts:
        rows = rows[:, : length - drafts] if rows.shape[1] > 1 else rows
        live = live[:, : length - drafts]
    units = torch.arange(rows.shape[-1], device=rows.device)
    return Visibility(
        rows=rows[::copies],
        units=units.repeat_interleave(patches)[None],
        images=units // tiles,
        live=live[::copies],
    )
