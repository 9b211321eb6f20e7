"""Blocks of entries, and the attention that each block receives, for `attnpred`.

A block is a run of neighbouring columns. It stays within one tile, one row of a picture, and one kind of
columns. Class tokens belong to no block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvprune import HeldView, LayerView, Selection, scoring

ENTRY, MEMBERS, COLUMNS = "block", "members", "columns"
"""Names of the tensors that say which entries and columns form a block."""


def column_blocks(view: LayerView, size: int) -> Tensor:
    """Number the blocks of the columns that arrived, int64 ``[B or 1, S]``; -1 - number at class tokens.

    Args:
        view: The layer; where its layout is unknown, blocks are counted from the first column of each tile.
        size: Columns of a block, at most. Rows whose length is no multiple of it end with a smaller block.
    """
    segments = view.segments  # [B or 1, S]
    layout = view.layout if view.layout_of is not None else None
    rows = torch.zeros_like(segments) if layout is None else layout.places[..., 0].to(segments.device)
    batch = max(len(segments), len(rows))
    # A column without a position, such as a class token, lies in row -1 and so begins a run of its own.
    runs = torch.stack([segments.expand(batch, -1), rows.expand(batch, -1)])  # [2, B or 1, S]
    place = torch.arange(runs.shape[-1], device=runs.device)
    begins = torch.ones_like(runs[0], dtype=torch.bool)
    begins[:, 1:] = (runs[:, :, 1:] != runs[:, :, :-1]).any(0)
    start = torch.where(begins, place, 0).cummax(-1).values  # where the run of each column begins
    number = (begins | ((place - start) % size == 0)).cumsum(-1) - 1
    classes = None if layout is None else layout.class_tokens
    return number if classes is None else torch.where(classes.to(number.device), -1 - number, number)


def of_all_columns(numbers: Tensor, received: Selection | None) -> Tensor:
    """Return the numbers of all columns, of which a layer has received some; 0 at the others.

    Args:
        numbers: int64 ``[R, n]``, from `column_blocks`.
        received: ``[R, 1, n]`` out of all columns; None for all.
    """
    if received is None:
        return numbers
    # Padding repeats a column, so it is written to an extra one, which is cut off.
    at = torch.where(received.valid, received.indices, received.columns)[:, 0].to(numbers.device)
    return numbers.new_zeros(len(numbers), received.columns + 1).scatter(-1, at, numbers)[:, :-1]


def entry_blocks(numbers: Tensor, valid: Tensor, size: int) -> dict[str, Tensor]:
    """Return which entries form a block; nothing if each block is the next ``size`` entries.

    Args:
        numbers: int64 ``[R, H or 1, K]``, from `column_blocks`, of each entry.
        valid: bool, same shape.
        size: Entries of a block, at most.

    Returns:
        ``block``: int64, same shape, the block of each entry, from 0 on; -1 for class tokens and padding.
        ``members``: int64 ``[R, H or 1, P, size]``, the entries of each of P blocks; K where one has fewer.
    """
    entries = numbers.shape[-1]
    place = torch.arange(entries, device=numbers.device)
    inside = valid & (numbers >= 0)
    begins = inside.clone()
    begins[..., 1:] &= (numbers[..., 1:] != numbers[..., :-1]) | ~inside[..., :-1]
    block = torch.where(inside, begins.cumsum(-1) - 1, -1)
    if bool((block == place // size).all()):
        return {}
    start = torch.where(begins, place, 0).cummax(-1).values
    blocks = max(1, int(block.amax()) + 1)
    # Where no block is meant, one extra cell beyond the last takes the entry.
    cell = torch.where(inside, block * size + place - start, blocks * size)
    members = torch.full((*numbers.shape[:2], blocks * size + 1), entries, device=numbers.device)
    members.scatter_(-1, cell, place.expand_as(cell).contiguous())
    return {ENTRY: block, MEMBERS: members[..., :-1].unflatten(-1, (blocks, size))}


def pooled(attention: Tensor, state: Mapping[str, Tensor], size: int) -> Tensor:
    """Return the largest attention in each block, ``[N, Hq, M, K]`` to ``[N, Hq, M, P]``.

    Args:
        attention: Of M rows to K entries.
        state: What `entry_blocks` returned, ``[N, ...]``.
        size: Entries of a block, at most.
    """
    entries = attention.shape[-1]
    if MEMBERS not in state:
        padded = torch.nn.functional.pad(attention, (0, -entries % size))
        by_block: Tensor = padded.unflatten(-1, (-1, size))  # [N, Hq, M, P, size]
        return by_block.amax(-1)
    members = state[MEMBERS]  # [N, H or 1, P, size]
    members = members.repeat_interleave(attention.shape[1] // members.shape[1], dim=1)
    padded = torch.nn.functional.pad(attention, (0, 1))  # a block's missing members receive nothing
    index = members.flatten(2)[:, :, None].expand(-1, -1, attention.shape[2], -1)  # [N, Hq, M, P * size]
    largest: Tensor = padded.gather(-1, index).unflatten(-1, members.shape[-2:]).amax(-1)
    return largest


def spread(scores: Tensor, state: Mapping[str, Tensor], size: int, entries: int) -> Tensor:
    """Give each entry the score of its block, ``[N, Hkv, P]`` to ``[N, Hkv, K]``; infinity without a block.

    Args:
        scores: Of each block.
        state: What `entry_blocks` returned, ``[N, ...]``.
        size: Entries of a block, at most.
        entries: Number of entries K.
    """
    if ENTRY not in state:
        return scores.repeat_interleave(size, dim=-1)[..., :entries]
    block = state[ENTRY].expand(-1, scores.shape[1], -1)  # [N, Hkv, K]
    return scores.gather(-1, block.clamp(min=0)).masked_fill(block < 0, torch.inf)


def real_blocks(state: Mapping[str, Tensor]) -> Tensor | None:
    """Return which blocks have members, bool ``[N, H or 1, P]``; None if all have."""
    return state[MEMBERS][..., 0] < state[ENTRY].shape[-1] if MEMBERS in state else None


def prompt_history(view: HeldView, state: Mapping[str, Tensor], size: int, count: int) -> Tensor:
    """Return the pooled attention of the last rows of the prompt, ``[R, Hq, count, P]``, the oldest first.

    Counted are live rows that see what decoding sees. If there are fewer, the first of them is repeated.

    Args:
        view: What the layer holds.
        state: What `entry_blocks` returned.
        size: Entries of a block, at most.
        count: Rows.
    """
    layer, kv_heads = view.layer, view.keys.shape[1]
    rows = _last_rows(layer, count)  # [R, count]
    grouped = layer.queries.unflatten(1, (kv_heads, -1))  # [R, Hkv, g, T, D]
    made = []
    for sample, chosen in enumerate(rows):  # each on its own, so that the rest of a batch does not matter
        logits = scoring.attention_logits(grouped[sample][:, :, chosen], view.keys[sample], layer.scaling)
        sees = _seen_entries(view, sample, chosen)[:, None]  # [H or 1, 1, count, K]
        attention = scoring.softmax_(logits.masked_fill_(~sees, -torch.inf)).flatten(0, 1)  # [Hq, count, K]
        own = {name: tensor[sample : sample + 1] for name, tensor in state.items()}
        made.append(pooled(attention[None], own, size))
    return torch.cat(made)


def _last_rows(layer: LayerView, count: int) -> Tensor:
    """Return the text rows whose attention seeds the history, int64 ``[R, count]``."""
    marked = scoring.last_rows(layer.visibility, count, layer.visible)  # [R, T]
    rows = marked.shape[1]
    place = torch.arange(rows, device=marked.device)
    first = torch.where(marked, place, rows - 1).amin(-1, keepdim=True)  # the last row if none is marked
    last = torch.where(marked, place, -1).sort(-1).values[:, -count:]
    last = torch.nn.functional.pad(last, (count - last.shape[1], 0), value=-1)
    return torch.where(last < 0, first, last)


def _seen_entries(view: HeldView, sample: int, rows: Tensor) -> Tensor:
    """Return which entries some text rows may attend to, bool ``[H or 1, rows, K]``.

    Entries of an earlier image are those that decoding sees, and so does the whole last turn.
    """
    visibility = view.layer.visibility
    columns = view.arrived[sample]  # [H or 1, K], -1 at entries of an earlier image
    units = visibility.units.expand(visibility.batch, -1)[sample]  # [S]
    text_rows = view.layer.queries.shape[2]
    by_unit = visibility.rows[sample].expand(text_rows, -1)[rows]  # [rows, U]
    seen = by_unit[:, units[columns.clamp(min=0)]].transpose(0, 1) | (columns < 0)[:, None]
    valid = view.valid[sample][:, None]  # [H or 1, 1, K]
    seen = seen & valid
    # A row that sees none of what is held attends to everything, as in stock transformers.
    return torch.where(seen.any(-1, keepdim=True), seen, valid)
