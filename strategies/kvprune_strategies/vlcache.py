"""`vlcache`: layers whose attention is spread over more tokens keep more of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import ProportionalAllocator
from kvprune_strategies.h2o import H2O


@dataclass(frozen=True, kw_only=True)
class VLCache(ProportionalAllocator):
    """Share the budget among layers in proportion to how dense their attention is.

    A layer's density is a fraction of the pairs of a live text row and a token that it sees: those whose
    attention weight is at least ``threshold`` times the row's largest one, mean over heads. Each layer keeps
    at least a hundredth of its visible tokens (or its even share, if that is less) and at most all of them.
    What these bounds add or take is shared among the other layers, and the report says so.

    Args:
        threshold: In (0, 1].
        class_tokens: Whether the class tokens of the encoder "count" like others, or density is computed
            without them ("ignore"). They often have the largest weight of a row, next to which all others are
            small. They may be kept in either case.
        heads: "separate": each KV head keeps the tokens that score highest in it. "shared": all heads of a
            layer keep the tokens of the highest mean score.
        scorer: See `kvprune.policy.LayerAllocator`, also for keep_ratio and keep_tokens.
    """

    scorer: ScoringPolicy = field(default_factory=lambda: H2O(normalize=False))
    threshold: float = 0.01
    class_tokens: Literal["count", "ignore"] = "count"
    heads: Literal["separate", "shared"] = "separate"

    name = "vlcache"
    version = 1
    measure_needs = frozenset({"queries"})
    presets = MappingProxyType({"effivlm": {"heads": "shared"}})

    def measure(self, view: LayerView) -> Tensor:
        """Return the density of attention to what decoding sees, float64 ``[B, 1]``."""
        columns = view.visible  # [B, S]
        ignored = view.class_tokens if self.class_tokens == "ignore" else None
        if ignored is not None:
            columns = columns & ~ignored
        return view.attention_density(self.threshold, columns).mean(-1, keepdim=True)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Return the scorer's scores ``[B, Hkv or 1, S]``; ``[B, 1, S]`` where heads share tokens."""
        scores = super().rank(view, measured)
        return scores if self.heads == "separate" else scoring.pool_heads(scores)

    def weights(self, measured: Tensor) -> Tensor:
        """Return the densities, ``[B, L]``."""
        return measured[..., 0]

    def least(self, even: Tensor, visible: Tensor) -> Tensor:
        """Return a hundredth of the visible tokens, rounded up, or the even share if that is less."""
        return torch.minimum((visible + 99) // 100, even)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise PolicyOptionError(
                f"threshold of policy {self.name!r} is a part of a row's largest weight in (0, 1], "
                f"got {self.threshold!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2410.23317 (VL-Cache)"
    deviations = """
    Only the opening of the paper could be read, and no code of the authors was found; the rule is that of the
    port in EffiVLM-Bench. The port treats image and text tokens alike and measures rows after the image. Here
    all cached tokens are of the image, and the rows that count are those that see it. The port truncates each
    layer's share, cuts it to between a hundredth and all of the tokens, and loses what this takes; here the
    total is exact, and other layers get what one cannot use. The port keeps a tenth of the budget for the
    most recent tokens, which are text; here there is no such part. Its example script asks for a ranking by
    KV head with an option that its code does not read, so heads share tokens there (preset=effivlm).
    """
    differs = (
        "what bounds and rounding take from a layer goes to other layers, where EffiVLM-Bench's port "
        "loses it; no part of the budget is for recent tokens, which are text"
    )
    checked_against = (
        "same sets as EffiVLM-Bench/EffiVLM-Bench@ab3ee18 (VlCacheKVCluster), a port, where its rounded "
        "shares add up to a budget; with heads=shared, too"
    )
    cost = (
        "one product of queries and keys in each layer beside that of the scorer, 64 rows at a time; scores "
        "of all layers until the last has attended, when L * S numbers are sorted; all layers hold all "
        "tokens until then; one host synchronisation for each sample and layer"
    )
    bibtex = """
@article{vlcache2024,
  title = {{VL-Cache}: Sparsity and Modality-Aware {KV} Cache Compression for Vision-Language Model Inference
           Acceleration},
  author = {Tu, Dezhan and Vashchilenko, Danylo and Lu, Yuzhe and Xu, Panpan},
  year = {2024},
  eprint = {2410.23317},
  archivePrefix = {arXiv},
}
"""
