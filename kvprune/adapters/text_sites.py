"""Finds the decoder's self-attention, for policies that need "text", or says why policies cannot see it.

A view of the text shows queries, keys and which entries are padding. Attention follows from these if logits
are products of queries and keys, and each row attends to all text up to itself. Self-attention with absolute
positions is like that, and so is rotary attention, once queries are rotated with the model's own function.
Relative positions added to logits, sliding windows and caps on logits are not.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kvprune.adapters.sites import Projection, Site
from kvprune.errors import UnsupportedModelError

__all__ = ["Rotate", "TextSite", "find_text_sites", "text_site"]

Rotate = Callable[[Tensor, Tensor, Mapping[str, Any]], tuple[Tensor, Tensor]]
"""Rotates queries and keys, ``[B, H, T, D]`` each, with the arguments of the module's forward call."""

_PATHS = "self_attn", "attention.self", "attn"
_ROTATED = "position_embeddings"
_RELATIVE = "position_bias", "relative_position_bias", "rel_pos", "sinusoidal_pos", "rotary_pos_emb", "alibi"
"""Arguments of self-attention that changes logits, or rotates, in ways that are not known here."""
_CHANGED: Mapping[str, str] = {
    "sliding_window": "sees a window of the text only",
    "attn_logit_softcapping": "caps attention logits",
    "relative_attention_bias": "adds relative positions to the logits",
    "distance_embedding": "adds relative positions to the logits",
    "rotary_value": "rotates values",
    "q_norm": "normalizes queries",
    "k_norm": "normalizes keys",
}
"""Attributes of a module whose attention does not follow from projected queries and keys, and what it does
to them."""


@dataclass(frozen=True)
class TextSite:
    """One self-attention module of the decoder.

    Args:
        layer_idx: Index of its layer.
        module: The module.
        query, key, value: Its projections.
        heads: Number of query heads Hq.
        kv_heads: Number of KV heads Hkv.
        scaling: Factor on attention logits.
        rotate: Rotates queries and keys; None without rotary embeddings.
    """

    layer_idx: int
    module: Any
    query: Projection
    key: Projection
    value: Projection
    heads: int
    kv_heads: int
    scaling: float
    rotate: Rotate | None = None


def find_text_sites(
    root: nn.Module,
    cross: Mapping[str, Site],
    family: str,
    declared: str = "",
    *,
    scaled_by_width: bool = False,
) -> Mapping[int, TextSite]:
    """Return the self-attention modules of the layers that attend to encoder states, by layer index.

    Args:
        root: The model.
        cross: Its cross-attention modules by path.
        family: For messages.
        declared: Path of the self-attention within a decoder layer; "" finds it.
        scaled_by_width: See `Site`.

    Raises:
        UnsupportedModelError: If policies cannot see the text of this model; says why.
    """
    found = {}
    for path, site in cross.items():
        steps = path.split(".")
        numbers = [place for place, step in enumerate(steps) if step.isdigit()]
        layer = root.get_submodule(".".join(steps[: numbers[-1] + 1]))
        module = _first(layer, [declared] if declared else _PATHS)
        reason = "has no self-attention that is known" if module is None else _why_not(module)
        if reason:
            kind = type(layer if module is None else module).__name__
            raise UnsupportedModelError(
                f"the policy needs view.text, which cannot be shown of this {family} model: {kind} in layer "
                f"{site.layer_idx} of its decoder {reason}; use another policy, or another model"
            )
        found[site.layer_idx] = text_site(site.layer_idx, module, scaled_by_width=scaled_by_width)
    return found


def text_site(layer_idx: int, module: Any, *, scaled_by_width: bool = False) -> TextSite:
    """Return what a self-attention module looks like.

    Args:
        layer_idx: Index of its layer.
        module: The module.
        scaled_by_width: See `Site`.

    Raises:
        UnsupportedModelError: If it does not look as expected.
    """
    rotate = _rotate(module)
    if hasattr(module, "c_attn"):  # GPT-2 projects queries, keys and values together
        query, key, value = (Projection(module.c_attn, part, 3) for part in range(3))
        heads = module.num_heads
        return TextSite(layer_idx, module, query, key, value, heads, heads, module.scaling, rotate)
    site = Site(layer_idx, module, "hidden_states", "attention_mask", scaled_by_width=scaled_by_width)
    return TextSite(
        layer_idx, module, site.query, site.key, site.value, site.heads, site.kv_heads, site.scaling, rotate
    )


def _first(layer: nn.Module, paths: Sequence[str]) -> nn.Module | None:
    """Return the first of these modules of a layer that exists."""
    for path in paths:
        try:
            return layer.get_submodule(path)
        except AttributeError:
            continue
    return None


def _why_not(module: nn.Module) -> str:
    """Say why the attention of a module does not follow from queries and keys; "" if it does."""
    parameters = set(inspect.signature(module.forward).parameters)
    if relative := parameters & set(_RELATIVE):
        return (
            f"takes {', '.join(sorted(relative))}, so its logits depend on positions in a way not known here"
        )
    for name, what in _CHANGED.items():
        if getattr(module, name, None) not in (None, False):
            return what
    if _ROTATED in parameters and _rotate(module) is None:
        return f"takes {_ROTATED}, and how it rotates is not known here"
    return ""


def _rotate(module: nn.Module) -> Rotate | None:
    """Return the function with which a module rotates queries and keys; None if it does not."""
    if _ROTATED not in inspect.signature(module.forward).parameters:
        return None
    function = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if function is None:
        return None

    def rotate(queries: Tensor, keys: Tensor, named: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        cos, sin = named[_ROTATED]
        rotated: tuple[Tensor, Tensor] = function(queries, keys, cos, sin)
        return rotated

    return rotate
