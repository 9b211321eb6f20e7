"""Converts the masks of an Mllama's forward call to a `Visibility`, whose units are tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from kvprune.adapters.arguments import cache_of
from kvprune.cache.shared_rows import SharedRows, share_repeated
from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.visibility import Visibility, with_last_row

__all__ = ["arriving_tiles", "last_text", "repeated_rows", "tiles_of_rows", "visibility_of"]

_BRING_AN_IMAGE = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_states"
"""Arguments that only a call with a new image has."""


def arriving_tiles(named: Mapping[str, Any], batch: int, patches: int) -> tuple[Tensor, int]:
    """Return the pixels or encoder states of a call, ``[B, ...]``, and the number of tiles per sample.

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
    """Return which tiles each text row of a call may attend, bool ``[B, T, U]``, U being images x tiles.

    Args:
        mask: ``[B, T, images, tiles]``; its rows may cover the whole conversation.
        length: Text rows T of the call.
        cache: The cache of the call; None if there is none.

    Raises:
        UnsupportedCacheError: If the mask has another shape.
    """
    if mask.ndim != 4:
        raise UnsupportedCacheError(
            f"cross_attention_mask must be [B, T, images, tiles], as the processor makes it, "
            f"got {list(mask.shape)}"
        )
    if mask.shape[1] != length:  # rows of the whole conversation
        seen = 0 if cache is None else cache.get_seq_length()  # a number, or a tensor of a static cache
        rows = torch.arange(length, device=mask.device) + torch.as_tensor(seen, device=mask.device)  # [T]
        # In older releases, draft tokens have no row. Repeat the last one, as generate does. Nothing branches
        # on how many there are, so that decoding compiles into one graph.
        mask = mask.index_select(1, rows.clamp(max=mask.shape[1] - 1))
    return (mask == 1).flatten(2)


def last_text(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without its images, and of its cross-attention mask the last row.

    Args:
        named: Arguments of the forward call by name.
    """
    text = {name: value for name, value in named.items() if name not in _BRING_AN_IMAGE}
    mask, ids = named.get("cross_attention_mask"), named.get("input_ids")
    if mask is not None:
        length = (named["inputs_embeds"] if ids is None else ids).shape[1]
        rows = tiles_of_rows(mask, length, cache_of(named))  # [B, T, images * tiles]
        text["cross_attention_mask"] = rows[:, -1:].unflatten(-1, mask.shape[2:])
    return text


def repeated_rows(repeats: int, named: Mapping[str, Any], source: Tensor) -> SharedRows:
    """Share the rows of a call that `generate` has made from one sample, unless their inputs differ.

    Args:
        repeats: Consecutive rows that come from one sample.
        named: Arguments of the forward call by name.
        source: Its pixels or encoder states, ``[B, ...]``.
    """
    names = "input_ids", "attention_mask", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"
    return share_repeated(repeats, [named.get(name) for name in names], [source, named.get("inputs_embeds")])


def visibility_of(
    rows: Tensor,
    attention_mask: Tensor | None,
    length: int,
    *,
    copies: int,
    patches: int,
    tiles: int,
) -> Visibility:
    """Return which columns the text rows of a call may attend, for R = B / ``copies`` rows of the batch.

    Args:
        rows: bool ``[B, T or 1, U]``, which tiles each text row may attend.
        attention_mask: ``[B, tokens so far]``, zero at padding.
        length: Text rows T of the call.
        copies: Consecutive rows of the batch that are equal.
        patches: Columns of a tile.
        tiles: Tiles stored for each image.
    """
    live = rows.any(-1).expand(-1, length).clone()  # [B, T]
    if attention_mask is not None and attention_mask.ndim == 2:
        live = with_last_row(live & attention_mask[:, -length:].to(live.device).bool(), live)
    units = torch.arange(rows.shape[-1], device=rows.device)
    return Visibility(
        rows=rows[::copies],
        units=units.repeat_interleave(patches)[None],  # [1, S]
        images=units // tiles,
        live=live[::copies],
    )
