"""Whether an adapter shows policies what the model computes: queries, keys, scaling and visibility."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import LayerView
from kvprune.testing.conformance.adapters.declaration import recorder
from kvprune.testing.conformance.common.findings import NotApplicable, Violation
from kvprune.testing.conformance.models.calls import forward
from kvprune.testing.conformance.models.setting import Setting

__all__ = ["check_view"]

_TOLERANCE = 1e-4


def check_view(policy: CrossKVPolicy, setting: Setting) -> None:
    """Attention recomputed from a view is the attention of the untouched model, row by row.

    So queries belong to their samples, logits have the right factor, and live rows see exactly the columns
    that the model lets them see: no padding.
    """
    weights = _attention_of(setting)
    views: list[LayerView] = []
    setting.prefill(recorder(views))
    sites = {site.layer_idx: site.module for site in setting.sites(setting.model)}
    for view in views:
        where = f"layer {view.layer_idx}"
        if view.captured.queries is None or view.captured.raw_keys is None:
            raise Violation(f"{where} to show queries and raw keys to a policy that needs them", "None")
        got, seen = _recomputed(view)
        _require_attention(where, view, got, seen, weights[view.layer_idx])
        norm = getattr(sites[view.layer_idx], "k_norm", None)
        raw = view.captured.raw_keys
        with torch.no_grad():
            keys = raw if norm is None else norm(raw)
        if keys.shape != view.keys.shape or not (keys - view.keys).abs().max() <= _TOLERANCE:
            raise Violation(f"raw keys of {where} to be the cached keys, before they were normed", "others")


def _attention_of(setting: Setting) -> dict[int, Tensor]:
    """Return the untouched model's attention in prefill, ``[B, Hq, T, S]`` by layer index."""
    model, weights = copy.deepcopy(setting.pristine), {}
    sites = setting.sites(model)
    handles = []
    for site in sites:

        def note(module: Any, args: Any, output: Any, layer_idx: int = site.layer_idx) -> None:
            weights[layer_idx] = output[1] if isinstance(output, tuple) and len(output) > 1 else None

        handles.append(site.module.register_forward_hook(note))
    try:
        with torch.no_grad():
            forward(model, setting.batch())
    finally:
        for handle in handles:
            handle.remove()
    if any(weight is None for weight in weights.values()):
        raise NotApplicable("the model's attention modules do not return attention weights, eager or not")
    return {layer_idx: weight for layer_idx, weight in weights.items() if weight is not None}


def _recomputed(view: LayerView) -> tuple[Tensor, Tensor]:
    """Return attention ``[R, Hq, T, S]``, and which columns each row may see, bool ``[R, T, S]``."""
    assert view.captured.queries is not None
    queries, see = view.captured.queries, view.visibility
    rows = see.rows.expand(-1, queries.shape[2], -1)
    units = see.units.expand(see.batch, -1)[:, None].expand(-1, rows.shape[1], -1)
    seen = rows.gather(-1, units)
    if see.exists is not None:
        seen = seen & see.exists[:, None]
    keys = view.keys.repeat_interleave(queries.shape[1] // view.keys.shape[1], dim=1)
    logits = (queries @ keys.transpose(-1, -2)) * view.scaling
    return logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1), seen


def _require_attention(where: str, view: LayerView, got: Tensor, seen: Tensor, weights: Tensor) -> None:
    samples = len(weights) // len(got)  # copies of a sample are shown once
    for row, live in enumerate(view.live.tolist()):
        truth = weights[row * samples]
        for text in (number for number, flag in enumerate(live) if flag):
            visible = set((truth[:, text] > 0).any(0).nonzero().flatten().tolist())
            claimed = set(seen[row, text].nonzero().flatten().tolist())
            if not visible <= claimed or (truth[:, text][:, sorted(claimed)] == 0).all(0).any():
                raise Violation(
                    f"text row {text} of sample {row} to see, in {where}, the columns that the model "
                    f"attends to, {sorted(visible)}",
                    f"{sorted(claimed)}",
                )
            apart = float((got[row, :, text] - truth[:, text]).abs().max())
            if not apart <= _TOLERANCE:
                raise Violation(
                    f"queries, keys and scaling of {where} that give the model's own attention "
                    f"(sample {row}, text row {text})",
                    f"attention that differs by {apart:.2e}",
                )
