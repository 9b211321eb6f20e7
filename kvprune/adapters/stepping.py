"""Lets a policy choose in a decode step which entries a cross-attention module reads, and passes only those.

If a call reads one token, the module gets copies of the chosen entries, and a mask over these. If it reads
several tokens, which may choose differently, it gets all entries, and the mask hides what a token skips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvprune.adapters.arguments import with_cache
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.call import Call
from kvprune.adapters.columns.mask import ColumnMask
from kvprune.adapters.one_mask import by_head
from kvprune.adapters.sites import Site, by_query_head
from kvprune.cache.contents import Contents
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.step_counts import Readable
from kvprune.errors import UnsupportedModelError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.decode import takes_steps
from kvprune.policy.step_view import StepView
from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.selection import Selection

__all__ = ["follow_text", "require_steps", "stepped"]


def require_steps(adapter: ModelAdapter, policy: CrossKVPolicy) -> None:
    """Raise if a policy decides in decode steps in which a model's rows cannot read different entries.

    Raises:
        UnsupportedModelError: Names the policy and the module.
    """
    if not takes_steps(policy):
        return
    try:
        sites = adapter.sites
    except UnsupportedModelError:  # an adapter of others need not say where the model attends
        return
    for site in sites:
        _require_mask_by_row(site, policy)


def _require_mask_by_row(site: Site, policy: CrossKVPolicy) -> None:
    """Raise if a module takes one mask for all rows of a call, as one does that attends with several streams.

    Raises:
        UnsupportedModelError: Names the policy and the module.
    """
    if site.mask_by_head:
        raise UnsupportedModelError(
            f"policy {policy.spec} chooses in decode steps what each row reads, but "
            f"{type(site.module).__name__} attends with the rows of several streams in one step and "
            "takes one mask for all of them; use a policy that decides in prefill"
        )


def stepped(
    call: Call,
    site: Site,
    rank: int,
    layer: CrossKVLayer,
    named: Mapping[str, Any],
    one_layer: Callable[[Tensor, Tensor], object],
) -> dict[str, Any]:
    """Return the arguments of a cross-attention module in a decode step in which a policy decides.

    Args:
        call: The current forward call.
        site: The module.
        rank: Index among the cross-attention layers.
        layer: Its cache layer.
        named: Its arguments by name, with a mask over what the layer holds.
        one_layer: Returns a cache that holds keys and values ``[B, Hkv, n, D]`` for this module alone.

    Raises:
        UnsupportedModelError: If the module cannot read different entries for the rows of this call.
        SelectionError, PolicyFailedError, UnsupportedCacheError: See `kvprune.engine.stepping.Stepping`.
    """
    steps, hidden, given = call.manager.steps, named["hidden_states"], named.get(site.mask)
    mask = by_head(given)
    text_rows = hidden.shape[1]
    if text_rows > 1:
        _require_mask_by_row(site, steps.policy)
    readable = _readable(call, layer, mask, site, hidden)
    step = steps.view(
        rank,
        layer,
        lambda: _queries(site, hidden),
        readable,
        batch=len(hidden),
        text_rows=text_rows,
        scaling=site.scaling,
    )
    selection = steps.attend(layer, step, readable, text_rows)
    passed = given
    before: Contents | None = layer.contents  # observing may drop entries, after this step has read them
    if selection is None:
        keys, values = layer.spread()
    elif text_rows == 1:
        keys, values = steps.read(rank, layer, selection)
        passed = _over_chosen(mask, selection, site, hidden)
        before = _chosen(selection, step) if call.returns_weights else None
    else:
        keys, values = layer.spread()
        passed = _by_text_row(mask, selection, site, hidden)
    call.attended = None if before is None else (before, layer.columns)
    if steps.observes:
        with torch.no_grad():
            attention = _attention(step, keys, by_head(passed), site)  # [N, Hq, n]
            steps.observe(layer, step, _at_entries(attention, selection, step.entries))
    steps.foresee(layer, step, text_rows)
    return with_cache({**named, site.mask: passed}, one_layer(keys, values))


def follow_text(layer: CrossKVLayer, text: Cache, text_rows: int) -> None:
    """Take back the steps of drafts that were rejected since the step before, which leave the text alone.

    Args:
        layer: A cross-attention layer.
        text: The cache of the text, which has this call's tokens already.
        text_rows: Text rows of the call.
    """
    if layer.steps is None or torch.compiler.is_compiling():
        return
    length = text.get_seq_length()
    if isinstance(length, int):  # a static cache counts on the device, and takes no drafts
        layer.steps.follow_text(length - text_rows)


def _queries(site: Site, hidden: Tensor) -> Tensor:
    """Return the queries that the module will compute, ``[B, Hq, T, D]``."""
    output = site.query.module(hidden)
    if output.ndim == 3:
        output = site.query.of(output)
        output = output.view(*output.shape[:2], site.heads, -1).transpose(1, 2)
    norm = site.query_norm
    return output if norm is None else norm(output)  # type: ignore[no-any-return]


def _readable(call: Call, layer: CrossKVLayer, mask: Tensor | None, site: Site, hidden: Tensor) -> Readable:
    """Return what the text rows of a call may attend to; layers under the same mask share it."""
    allowed = None if mask is None else lambda: _lets_through(mask, site)
    made = Readable(layer, allowed, *hidden.shape[:2])
    if torch.compiler.is_compiling():
        return made
    for known_mask, known in call.readable:
        if known_mask is mask and known.is_of(layer):
            return known
    call.readable.append((mask, made))
    return made


def _lets_through(mask: Tensor, site: Site) -> Tensor:
    """Return where a mask lets text attend, bool ``[B, Hkv or 1, T or 1, K]``."""
    if mask.shape[1] > 1:  # heads of one group share their entries
        mask = mask[:, :: site.heads // site.kv_heads]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _over_chosen(mask: Tensor | None, selection: Selection, site: Site, hidden: Tensor) -> Tensor | None:
    """Return the mask over the chosen entries, ``[B, 1 or Hq, 1, n]``; None if it would hide nothing."""
    chosen = Contents(selection.indices, selection.valid, None, ragged=not selection.is_known_full)
    return ColumnMask().over(mask, chosen, site, hidden)


def _by_text_row(mask: Tensor | None, selection: Selection, site: Site, hidden: Tensor) -> Tensor:
    """Return a mask that also hides what a text row does not read, ``[B, 1 or Hq, T, K]``."""
    batch, rows, _ = hidden.shape
    reads = selection.mask.unflatten(0, (batch, rows)).transpose(1, 2)  # [B, H or 1, T, K]
    if mask is None:
        mask = torch.zeros(1, dtype=hidden.dtype, device=reads.device)
    reads = by_query_head(reads, site.heads)
    if mask.dtype == torch.bool:
        return site.fit_mask(mask & reads, rows)
    wide = mask.expand(torch.broadcast_shapes(mask.shape, reads.shape))
    return site.fit_mask(wide.masked_fill(~reads, torch.finfo(mask.dtype).min), rows)


def _chosen(selection: Selection, step: StepView) -> Contents:
    """Return what the module attends to: the chosen entries, of each row of the batch."""
    heads = max(selection.indices.shape[1], step.slots.shape[1])
    places, valid = (part.expand(-1, heads, -1) for part in (selection.indices, selection.valid))
    slots = step.of_rows(step.slots).expand(-1, heads, -1).gather(-1, places)  # [B, H or 1, n]
    return Contents(slots, valid, None, ragged=True)


def _attention(step: StepView, keys: Tensor, mask: Tensor | None, site: Site) -> Tensor:
    """Return the attention of the step over the entries that it reads, ``[N, Hq, n]``.

    Args:
        step: The step, of one text row for each row of the batch.
        keys: ``[B, Hkv, n, D]``.
        mask: ``[B, 1 or Hq, 1, n]``.
        site: The module.
    """
    logits = step.grouped_queries() @ keys.to(accumulation_dtype(keys)).transpose(-1, -2)
    logits = logits.flatten(1, 2) * site.scaling  # [N, Hq, n]
    if site.softcap is not None:
        logits = site.softcap * torch.tanh(logits / site.softcap)
    if mask is not None:
        lowest = torch.finfo(logits.dtype).min
        row = mask[:, :, 0]
        logits = logits.masked_fill(~row, lowest) if row.dtype == torch.bool else logits + row.to(logits)
    return logits.softmax(-1)


def _at_entries(attention: Tensor, selection: Selection | None, entries: int) -> Tensor:
    """Put attention ``[N, Hq, n]`` over the chosen entries back to all of them, ``[N, Hq, K]``."""
    if selection is None:
        return attention
    heads = attention.shape[1]
    places = by_query_head(selection.indices, heads).expand_as(attention)
    attention = attention.masked_fill(~by_query_head(selection.valid, heads), 0)
    return attention.new_zeros(*attention.shape[:2], entries).scatter_add(-1, places, attention)
