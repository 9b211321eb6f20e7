"""Where a model attends to encoder states, and what the modules there look like.

Modules of transformers name the same things differently: a module projects its queries with ``q_proj``,
``q``, ``query`` or ``query_proj``, and has ``num_heads``, ``n_heads`` or only a head width. `Site` reads one
module and says it in one way. `kvprune.adapters.inspection` finds the modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kvprune.adapters.one_mask import OneMask
from kvprune.errors import UnsupportedCacheError, UnsupportedModelError

__all__ = ["Projection", "Site", "by_query_head", "geometry_of", "has_projections"]

_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_attn", "c_attn", "c_attn"),  # GPT-2 projects keys and values together
)
_HEAD_WIDTHS = "head_dim", "attention_head_size", "key_value_proj_dim"
_HEADS = "num_heads", "num_attention_heads", "n_heads", "num_attn_heads"
_RIGID = "ask should be of size"
"""Part of what older modules say of a mask that is not ``[B, 1, T, K]``."""
_BY_HEAD = "ask should have size"
"""Part of what ProphetNet says of a mask that is not ``[B, Hq, 1, K]``."""


@dataclass(frozen=True)
class Projection:
    """A linear layer that makes queries, keys or values, ``[B, N, H * D]``.

    Args:
        module: The layer.
        part: Which part of its output it is, if the layer makes several of equal width.
        parts: How many it makes.
    """

    module: Any
    part: int = 0
    parts: int = 1

    @property
    def width(self) -> int:
        """H * D, the number of output features."""
        features = getattr(self.module, "out_features", None) or getattr(self.module, "nf", None)
        return int(features or self.module.weight.shape[0]) // self.parts

    @property
    def inputs(self) -> int | None:
        """The number of input features; None if the layer does not tell."""
        features = getattr(self.module, "in_features", None) or getattr(self.module, "nx", None)
        return features if isinstance(features, int) else None

    def of(self, output: Tensor) -> Tensor:
        """Return the queries, keys or values in what the layer has returned."""
        return output if self.parts == 1 else output.chunk(self.parts, dim=-1)[self.part]


@dataclass(frozen=True)
class Site:
    """One cross-attention module of a model.

    Args:
        layer_idx: Index of the decoder layer.
        module: The cross-attention module.
        states: Name of its argument for encoder states.
        mask: Name of its argument for the attention mask.
        names: Attributes that project queries, keys and values; "" where inspection should find it.
        scaled_by_width: Whether a module that names no ``scaling`` multiplies logits by D ** -0.5.

    Attributes:
        query, key, value: The projections.
        heads: Number of query heads Hq.
        kv_heads: Number of heads Hkv that keys and values have.
        head_width: D.
        scaling: Factor on attention logits.
        query_norm, key_norm: Norms of queries and keys, ``[B, H, N, D]``; None if there are none.
        softcap: What the module caps attention logits at; None if it does not. Policies see attention
            without the cap.
        weights_at: Where attention weights stand in what the module returns.
        takes_position_bias: Whether the module adds a bias that layers pass on to each other.
        one_mask: Whether the module refuses masks that do not look like ``[B, 1, T, K]``.
        mask_by_head: Whether it refuses masks that are not ``[B, Hq, 1, K]``.

    Raises:
        UnsupportedModelError: If the module does not look as expected; names what was found.
    """

    layer_idx: int
    module: Any
    states: str
    mask: str
    names: tuple[str, str, str] = ("", "", "")
    scaled_by_width: bool = False
    query: Projection = field(init=False)
    key: Projection = field(init=False)
    value: Projection = field(init=False)
    heads: int = field(init=False)
    kv_heads: int = field(init=False)
    head_width: int = field(init=False)
    scaling: float = field(init=False)
    query_norm: Any = field(init=False)
    key_norm: Any = field(init=False)
    softcap: float | None = field(init=False)
    weights_at: int = field(init=False)
    takes_position_bias: bool = field(init=False)
    one_mask: bool = field(init=False)
    mask_by_head: bool = field(init=False)

    def __post_init__(self) -> None:
        kind, parameters = type(self.module).__name__, inspect.signature(self.module.forward).parameters
        for name in (self.states, self.mask):
            if name not in parameters:
                raise UnsupportedModelError(f"{kind}: forward lacks {name}; it takes {', '.join(parameters)}")
        query, key, value = _projections(self.module, self.names)
        width = _head_width(self.module, query.width)
        for name, projection in (("queries", query), ("keys", key), ("values", value)):
            if projection.width % width:
                raise UnsupportedModelError(
                    f"{kind} projects {name} to {projection.width} features, which is no multiple of the "
                    f"head width {width}"
                )
        heads, kv_heads = query.width // width, key.width // width
        if heads % kv_heads or value.width != key.width:
            raise UnsupportedModelError(
                f"{kind} has {heads} query heads, {kv_heads} key heads and values of {value.width} features; "
                "the query heads must be a multiple of the key heads, which have as many values"
            )
        for name in _HEADS:
            told = getattr(self.module, name, heads)
            if told != heads:
                raise UnsupportedModelError(
                    f"{kind}.{name} is {told}, but its queries have {query.width} features in heads of width "
                    f"{width}"
                )
        passes_bias = "position_bias" in parameters and hasattr(self.module, "has_relative_attention_bias")
        found = {
            "query": query,
            "key": key,
            "value": value,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_width": width,
            "scaling": _scaling(self.module, width, self.scaled_by_width),
            "query_norm": getattr(self.module, "q_norm", None),
            "key_norm": getattr(self.module, "k_norm", None),
            "softcap": getattr(self.module, "attn_logit_softcapping", None),
            "weights_at": 2 if passes_bias else 1,
            "takes_position_bias": "position_bias" in parameters,
            "one_mask": _says(self.module, _RIGID),
            "mask_by_head": _says(self.module, _BY_HEAD),
        }
        for name, attribute in found.items():
            object.__setattr__(self, name, attribute)

    def fit_mask(self, mask: Tensor, rows: int) -> Tensor:
        """Return a mask in the form that the module takes, ``[B, 1 or Hq, T or 1, K]``.

        Args:
            mask: ``[B, 1 or Hkv, T or 1, K]``.
            rows: Number of text rows T.

        Raises:
            UnsupportedCacheError: If the module would apply one mask to all heads, or accepts only one and
                these have gradients.
        """
        settings = getattr(self.module, "config", None)
        if mask.shape[1] > 1 and getattr(settings, "_attn_implementation", None) == "flex_attention":
            raise UnsupportedCacheError(
                "heads keep different tokens, but flex attention in transformers applies the mask of the "
                "first head to all of them; use attn_implementation='sdpa', or a policy whose heads share "
                "tokens"
            )
        mask = by_query_head(mask, self.heads)
        if self.mask_by_head:
            return mask.expand(-1, self.heads, -1, -1)
        if not self.one_mask:
            return mask
        mask = mask.expand(-1, -1, rows, -1)
        return mask if mask.shape[1] == 1 else OneMask(mask)


def geometry_of(sites: Sequence[Site]) -> dict[str, int]:
    """Return what modules say about a model, by the names of `View.geometry`; without what they do not tell.

    What weights are trained for is known before anything runs.
    """
    found: dict[str, set[int | None]] = {
        "kv_heads": {site.kv_heads for site in sites},
        "head_width": {site.head_width for site in sites},
        "heads": {site.heads for site in sites},
        "feature_width": {site.key.inputs for site in sites},
        "question_width": {site.query.inputs for site in sites},
    }
    alike = {name: next(iter(numbers)) for name, numbers in found.items() if len(numbers) == 1}
    known = {name: number for name, number in alike.items() if number is not None}
    return {"cross_layers": len(sites), **known}


def by_query_head(by_head: Tensor, heads: int) -> Tensor:
    """Expand what each KV head has to query heads: ``[B, 1 or Hkv, ...]`` to ``[B, 1 or Hq, ...]``."""
    if by_head.shape[1] in (1, heads):
        return by_head
    return by_head.repeat_interleave(heads // by_head.shape[1], dim=1)


def has_projections(module: nn.Module) -> bool:
    """Whether a module projects queries, keys and values itself, as far as names tell."""
    return any(all(hasattr(module, name) for name in names) for names in _PROJECTIONS)


def _projections(module: nn.Module, names: tuple[str, str, str]) -> tuple[Projection, Projection, Projection]:
    """Return the projections of queries, keys and values."""
    defaults = next((known for known in _PROJECTIONS if all(hasattr(module, one) for one in known)), None)
    if defaults is None and not all(names):
        layers = ", ".join(name for name, _ in module.named_children()) or "none"
        raise UnsupportedModelError(
            f"{type(module).__name__} must project queries, keys and values with layers of its own, such as "
            f"q_proj, k_proj and v_proj; it has {layers}; set query, key and value in the adapter"
        )
    chosen = [given or known for given, known in zip(names, defaults or names, strict=True)]
    missing = [name for name in chosen if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        layers = ", ".join(name for name, _ in module.named_children()) or "none"
        raise UnsupportedModelError(
            f"{type(module).__name__} has no layer {', '.join(map(repr, missing))} to project with; it has "
            f"{layers}"
        )
    query, key, value = (getattr(module, name) for name in chosen)
    if key is value:
        return Projection(query), Projection(key, 0, 2), Projection(value, 1, 2)
    return Projection(query), Projection(key), Projection(value)


def _head_width(module: Any, width: int) -> int:
    """Return the width D of a head, given the features of all queries."""
    for name in _HEAD_WIDTHS:
        if isinstance(told := getattr(module, name, None), int):
            return told
    for owner in (module, getattr(module, "config", None)):
        for name in _HEADS:
            if isinstance(told := getattr(owner, name, None), int) and told:
                return width // told
    raise UnsupportedModelError(
        f"{type(module).__name__} says neither how many heads it has ({', '.join(_HEADS)}) nor how wide they "
        f"are ({', '.join(_HEAD_WIDTHS)})"
    )


def _scaling(module: Any, width: int, scaled_by_width: bool) -> float:
    told = getattr(module, "scaling", None)
    if told is not None:
        return float(told)
    if scaled_by_width:
        return float(width**-0.5)
    raise UnsupportedModelError(
        f"{type(module).__name__} has no attribute `scaling`, the factor on its attention logits; if it "
        f"divides them by the square root of the head width {width}, set scaled_by_width = True in the "
        "adapter"
    )


def _says(module: nn.Module, what: str) -> bool:
    """Whether a module is particular about its mask: those that are have an error message for it."""
    code = inspect.unwrap(type(module).forward).__code__
    return any(isinstance(text, str) and what in text for text in code.co_consts)
