"""Whether an adapter captures what the model computes: queries, keys, scaling and visibility."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.view import LayerView
from kvprune.testing.conformance.adapters.attachment import asking
from kvprune.testing.conformance.common.results import NotApplicable, Violation
from kvprune.testing.conformance.models.forward_calls import forward
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.conformance.models.sites import Site
from kvprune.testing.hooks import temporary

__all__ = ["check_view"]

_TOLERANCE = 1e-4


def check_view(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Attention recomputed from a view equals the untouched model's attention, row by row.

    This shows that queries belong to their samples, that the scaling of logits is right, and that live rows
    see exactly the columns that the model lets them see.
    """
    weights = _attention_of(scenario)
    views: list[LayerView] = []
    scenario.prefill(asking(views.append, keeps_everything=True))
    sites = {site.layer_idx: site for site in scenario.sites(scenario.model)}
    for view in views:
        where = f"layer {view.layer_idx}"
        if view.captured.queries is None or view.captured.raw_keys is None:
            raise Violation(f"{where} to show queries and raw keys to a policy that needs them", "None")
        got, seen = _recomputed(view)
        _require_attention(where, view, got, seen, weights[view.layer_idx])
        norm = sites[view.layer_idx].key_norm
        raw = view.captured.raw_keys
        with torch.no_grad():
            keys = raw if norm is None else norm(raw)
        if keys.shape != view.keys.shape or not (keys - view.keys).abs().max() <= _TOLERANCE:
            raise Violation(f"raw keys of {where} to be the cached keys before their norm", "other keys")


def _attention_of(scenario: Scenario) -> dict[int, Tensor]:
    """Return the untouched model's attention in prefill, ``[B, Hq, T, S]`` by layer index."""
    model = copy.deepcopy(scenario.pristine)
    weights: dict[int, Tensor | None] = {}

    def watch(site: Site) -> RemovableHandle:
        def note(module: Any, args: Any, output: Any) -> None:
            at = site.weights_at
            weights[site.layer_idx] = output[at] if isinstance(output, tuple) and len(output) > at else None

        handle: RemovableHandle = site.module.register_forward_hook(note)
        return handle

    batch: dict[str, Any] = {**scenario.batch(), "output_attentions": True}  # older modules want to be asked
    with temporary(map(watch, scenario.sites(model))), torch.no_grad():
        forward(model, batch)
    if any(weight is None for weight in weights.values()):
        raise NotApplicable(
            "the model's attention modules return no attention weights, not even in eager mode"
        )
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
    """Raise unless recomputed attention ``[R, Hq, T, S]`` equals that of the model in live rows."""
    copies = len(weights) // len(got)  # a view shows copies of a sample once
    for row, live in enumerate(view.live.tolist()):
        truth = weights[row * copies]
        for text in (number for number, flag in enumerate(live) if flag):
            visible = set((truth[:, text] > 0).any(0).nonzero().flatten().tolist())
            claimed = set(seen[row, text].nonzero().flatten().tolist())
            if not visible <= claimed or (truth[:, text][:, sorted(claimed)] == 0).all(0).any():
                raise Violation(
                    f"text row {text} of sample {row} in {where} to see the columns that the model attends "
                    f"to, {sorted(visible)}",
                    f"{sorted(claimed)}",
                )
            apart = float((got[row, :, text] - truth[:, text]).abs().max())
            if not apart <= _TOLERANCE:
                raise Violation(
                    f"queries, keys and scaling of {where} that give the model's attention "
                    f"(sample {row}, text row {text})",
                    f"attention that differs by {apart:.2e}",
                )
