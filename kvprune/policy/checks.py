"""Checks a policy's answer against the invariants before it is applied to a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import ScoreError, SelectionError
from kvprune.policy.merge_checks import check_merge
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, View
from kvprune.tokens.decision import Decision
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["check_decision", "check_scores", "check_text"]


def check_decision(decision: object, view: View, policy: str) -> None:
    """Refuse a decision that breaks KV01, KV03, KV04, KV05 or KV15, naming the policy and the layer.

    Args:
        decision: The policy's answer.
        view: The view that the policy saw.
        policy: Its name.

    Raises:
        SelectionError: If an invariant is broken; the message cites it.
    """
    where = f"policy {policy!r} {view.where}"
    if not isinstance(decision, Decision):
        raise SelectionError(
            f"{where}: select returned {type(decision).__name__}, expected a Decision(cache=..., onward=...)"
        )
    if isinstance(view, FeatureView) and decision.cache is not None:
        raise SelectionError(
            f"{where}: choose decided about a cache, but nothing is cached yet; return Decision(onward=...)"
        )
    for what, selection, visible in (
        ("cache", decision.cache, view.visible),
        ("onward", decision.received, view.visible_in_prefill),
    ):
        if selection is not None:
            _check_shape(f"{where}: {what}", selection, view)
            _check_coverage(f"{where}: {what}", selection, view, visible)
            if selection.merge is not None:
                check_merge(what, selection, selection.merge, view, where)
    if isinstance(decision.onward, Replacement):
        _check_replacement(f"{where}: onward", decision.onward, view)


def _check_replacement(where: str, replacement: Replacement, view: View) -> None:
    """Check new tokens whose places are a legal selection; one host transfer."""
    features, places, shown = replacement.features, replacement.places, view.captured.features
    if shown is None:
        raise SelectionError(
            f"KV01: {where} puts new tokens in the place of columns, but the policy has not seen "
            'the features that it replaces; write needs = frozenset({"features"}) in the class'
        )
    if features.shape[-1] != shown.shape[-1] or features.dtype != shown.dtype:
        raise SelectionError(
            f"KV01: {where} has features of {features.shape[-1]} channels in {features.dtype}, expected "
            f"{shown.shape[-1]} channels in {shown.dtype}, as view.features"
        )
    if features.layout != torch.strided or features.device != shown.device:
        raise SelectionError(
            f"KV01: {where} has features in a {features.layout} tensor on {features.device}, expected a "
            f"plain one on {shown.device}, where view.features is"
        )
    device = places.indices.device
    seen = view.visible_in_prefill.to(device)  # [B, S]
    valid = places.valid[:, 0]  # [B, K]
    unseen = ~seen.gather(-1, places.indices[:, 0]) & valid & seen.any(-1, keepdim=True)
    wrong = ~features.detach().isfinite().all(-1).to(device) & valid  # [B, K]
    hidden, broken = torch.stack([unseen.sum(), wrong.sum()]).tolist()
    if hidden:
        raise SelectionError(
            f"KV04: {where} puts {hidden} new tokens in places that no text row can see, so nothing would "
            "attend to them; take places from view.visible_in_prefill"
        )
    if broken:
        raise SelectionError(f"{where}: the features of {broken} new tokens are NaN or infinite")


def _check_shape(where: str, selection: Selection, view: View) -> None:
    shape = list(selection.indices.shape)
    if selection.columns != view.columns or shape[0] != view.batch or shape[1] not in (1, view.heads):
        raise SelectionError(
            f"KV01: {where} selects {shape} out of {selection.columns} columns, expected "
            f"[{view.batch}, {view.heads} or 1, K] out of {view.columns}"
        )


def _check_coverage(where: str, selection: Selection, view: View, visible: Tensor) -> None:
    """Check KV03 and KV04 with one host transfer; ``visible`` is bool ``[B, S]``."""
    kept = selection.mask  # [B, H or 1, S]
    visible = visible.to(kept.device)[:, None]  # [B, 1, S]
    sees = visible.any(-1, keepdim=True)  # [B, 1, 1]
    hidden_kept = (kept & ~visible & sees).any(-1)  # [B, H or 1]
    visible_dropped = (visible & ~kept).any(-1)
    padding, starved = torch.stack(
        [(hidden_kept & visible_dropped).any(), _drops_a_group(view, kept, visible)]
    ).tolist()
    if padding:
        raise SelectionError(
            f"KV04: {where} keeps columns that no row can see while it drops visible ones; "
            "select from view.visible (this layer's cache) or view.visible_in_prefill (onward)"
        )
    if starved:
        raise SelectionError(
            f"KV03: {where} keeps no column of a visibility group (an image that some text row "
            "attends to); keep at least one column of each group in view.groups, as scoring.keep_top does"
        )


def _drops_a_group(view: View, kept: Tensor, visible: Tensor) -> Tensor:
    """Return whether some visibility group with visible columns keeps none of them (a bool scalar)."""
    groups = torch.where(visible[:, 0], view.groups.to(kept.device), -1)  # [B, S]
    width = int(groups.max()) + 2
    slots = (groups + 1)[:, None].expand_as(kept)  # group -1 is counted in slot 0, which is cut off
    zeros = torch.zeros(*kept.shape[:2], width, dtype=torch.int64, device=kept.device)
    present = zeros.scatter_add(-1, slots, torch.ones_like(slots))  # [B, H or 1, groups + 1]
    survivors = zeros.scatter_add(-1, slots, kept.to(torch.int64))
    return ((present > 0) & (survivors == 0))[..., 1:].any()


def check_text(selection: object, view: TextView, policy: str, counts: Tensor | None) -> Tensor:
    """Refuse a selection of text entries that one mask for all heads and layers cannot express.

    Args:
        selection: The policy's answer; None keeps all entries.
        view: The view that the policy saw.
        policy: Its name.
        counts: Number of entries that an earlier layer of this prefill keeps of each sample, int64 ``[B]``;
            None at the first layer.

    Returns:
        Number of entries that this layer keeps of each sample, int64 ``[B]``. For None, this is all entries,
        padding included.

    Raises:
        SelectionError: If an invariant is broken; the message cites it.
    """
    where = f"policy {policy!r} {view.where}: select_text"
    if selection is None:
        now = torch.full((view.batch,), view.entries, device=view.device)
    elif not isinstance(selection, Selection):
        raise SelectionError(f"{where} returned {type(selection).__name__}, expected a Selection or None")
    else:
        _check_text_shape(where, selection, view)
        now = selection.counts[:, 0]  # [B]
        _check_text_entries(where, selection, view, now)
    if counts is not None and not torch.equal(now, counts.to(now.device)):
        raise SelectionError(
            f"KV06: {where} keeps {now.tolist()} entries of each sample, but an earlier layer keeps "
            f"{counts.tolist()}; one mask serves all layers, so keep equally many in each (or None in each)"
        )
    return now


def _check_text_shape(where: str, selection: Selection, view: TextView) -> None:
    shape = list(selection.indices.shape)
    if selection.columns != view.entries or shape[0] != view.batch or shape[1] not in (1, view.heads):
        raise SelectionError(
            f"KV01: {where} selects {shape} out of {selection.columns} entries, expected "
            f"[{view.batch}, {view.heads} or 1, K] out of {view.entries}"
        )
    if selection.merge is not None:
        raise SelectionError(f"KV15: {where} merges, but text entries cannot be merged; leave merge out")
    if selection.bits is not None:
        raise SelectionError(f"KV01: {where} has bits, but text entries cannot be quantized; leave bits out")


def _check_text_entries(where: str, selection: Selection, view: TextView, counts: Tensor) -> None:
    """Check KV03, KV04 and KV06 with one host transfer; ``counts`` are those of the first head, ``[B]``."""
    kept = selection.mask  # [B, H or 1, Tk]
    last = (view.entries - view.rows + view.last_row)[:, None, None].to(kept.device)  # [B, 1, 1]
    real = view.real.to(kept.device)[:, None]  # [B, 1, Tk]
    uneven, padding, forgets = torch.stack(
        [
            (selection.counts != counts[:, None]).any(),
            (kept & ~real & real.any(-1, keepdim=True)).any(),
            (~kept.gather(-1, last.expand(-1, kept.shape[1], -1))).any(),
        ]
    ).tolist()
    if uneven:
        raise SelectionError(
            f"KV06: {where} keeps different numbers of entries in different heads, but one "
            f"mask serves all of them; keep equally many (got {selection.counts.tolist()})"
        )
    if padding:
        raise SelectionError(f"KV04: {where} keeps padding; select from view.real")
    if forgets:
        raise SelectionError(
            f"KV03: {where} drops the last row's own entry, so decoding could not attend to the last token; "
            "keep entry view.entries - view.rows + view.last_row of each sample"
        )


def check_scores(scores: object, view: View, strata: Tensor, policy: str) -> Tensor:
    """Refuse scores that cannot rank tokens, and return them as finite floating-point numbers.

    Args:
        scores: The policy's answer, ``[B, H or 1, S]``.
        view: The view that the policy saw.
        strata: int64 ``[B, S]``. Scores of columns of stratum -1 may be anything; they are set to the lowest
            number of the dtype.
        policy: Its name.

    Returns:
        Finite scores of the same shape, float32 or float64.

    Raises:
        ScoreError: If the answer is not a tensor of this shape on the view's device, or is NaN for a token
            that could be kept.
    """
    batch, heads, columns = view.batch, view.heads, view.columns
    where = f"policy {policy!r} {view.where}"
    expected = f"[{batch}, {heads} or 1, {columns}]" if heads > 1 else f"[{batch}, 1, {columns}]"
    if not isinstance(scores, Tensor):
        raise ScoreError(f"{where}: score returned {type(scores).__name__}, expected a tensor {expected}")
    if scores.shape not in ((batch, heads, columns), (batch, 1, columns)):
        raise ScoreError(
            f"{where}: score returned shape {list(scores.shape)}, expected {expected}"
            f"{_shape_hint(scores, batch, heads, columns)}"
        )
    # Checked after the shape: an expanded view of one number can have any shape without using memory.
    if scores.layout != torch.strided or scores.device != view.device:
        raise ScoreError(
            f"{where}: score returned a {scores.layout} tensor on {scores.device}, "
            f"expected a plain one on {view.device}, where the keys are"
        )
    if scores.is_complex():
        raise ScoreError(f"{where}: score returned {scores.dtype}, which has no order")
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.double() if not scores.is_floating_point() else scores.float()
    # Scores of columns that cannot be kept may be NaN.
    scores = scores.masked_fill((strata < 0)[:, None], -torch.inf)
    if bool(scores.isnan().any()):
        raise ScoreError(
            f"{where}: score returned NaN for {int(scores.isnan().sum())} tokens that could be kept, "
            f"expected numbers of shape {expected}"
        )
    # Finite, so that averages over heads cannot compute inf - inf.
    return scores.clamp(torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max)


def _shape_hint(scores: Tensor, batch: int, heads: int, columns: int) -> str:
    """Return how scores of another common shape become scores of the right one, or ""."""
    if scores.shape == (batch, columns):
        return "; if all heads share them, write scores[:, None]"
    grouped = scores.ndim == 3 and scores.shape[1] > heads and scores.shape[1] % heads == 0
    if grouped and scores.shape[::2] == (batch, columns):
        return (
            "; scores by query head become scores by KV head with "
            "kvprune.scoring.by_kv_head(scores, view.heads)"
        )
    return ""
