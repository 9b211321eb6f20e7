"""`norm`: rank tokens by the length of their values or keys, without looking at queries."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import Budget, LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class Norm(ScoringPolicy):
    """Keep the tokens whose values (or keys) have the highest (or lowest) L2 norm.

    By default these are long values, which is our rule. The published method keeps short keys:
    ``preset=published``. Each KV head ranks its own tokens.

    Args:
        of: "values"; "keys" as they are cached; "raw_keys" as they were before ``k_norm``. Mllama caches
            keys after an RMS norm per head, so their lengths differ little.
        keep: Whether the "high" or the "low" norms stay.
        whole_layers: Number of first cross-attention layers that keep everything, with ``reach=layer``. The
            authors' script for language modeling leaves two layers whole: ``preset=script``.
    """

    of: Literal["values", "keys", "raw_keys"] = "values"
    keep: Literal["high", "low"] = "high"
    whole_layers: int = 0

    name = "norm"
    version = 2  # 1 measured float64 vectors in float32
    presets = MappingProxyType(
        {
            "published": {"of": "keys", "keep": "low"},
            "script": {"of": "keys", "keep": "low", "whole_layers": 2},
        }
    )

    def score(self, view: LayerView) -> Tensor:
        """Return signed norms ``[B, Hkv, S]``."""
        vectors: Tensor = getattr(view, self.of)  # [B, Hkv, S, D]
        dtype = scoring.accumulation_dtype(vectors)
        norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype)  # [B, Hkv, S]
        return norms if self.keep == "high" else -norms

    def spares(self, view: LayerView) -> bool:
        """Whether this is one of the layers that stay whole."""
        return view.rank < self.whole_layers

    @property
    def exact_budget(self) -> Budget | None:
        """The budget of each head; None if some layers stay whole."""
        return None if self.whole_layers else super().exact_budget

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole_layers < 0 or (self.whole_layers and self.reach == "onward"):
            raise PolicyOptionError(
                f"whole_layers of policy {self.name!r} is a number of first layers that keep everything, "
                f"with reach=layer, got whole_layers={self.whole_layers}, reach={self.reach}"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """Raw keys, if their norms are asked for."""
        return frozenset({"raw_keys"}) if self.of == "raw_keys" else frozenset()

    fidelity = "inspired-by"
    paper = "arXiv 2406.11430 (lowest key norm, in self-attention)"
    deviations = """
    The paper keeps the tokens whose keys are shortest (preset=published); long values, the default, are our
    rule. The authors' scripts leave the first layer, or the first two, whole (preset=script). They prune
    again while text is generated; here no image tokens are added, so nothing is pruned again. Mllama caches
    keys after an RMS norm, which takes most of what lengths say: of=raw_keys has those before that norm.
    """
    differs = (
        "the default, long values, is our rule; the paper keeps short keys (preset=published), and its "
        "script leaves two layers whole (preset=script)"
    )
    checked_against = (
        "preset=published and script: same sets as alessiodevoto/l2compress@f93d6ca (cache.py:l2_compress) "
        "and NVIDIA/kvpress@8bb29b9 (KnormPress); the default: nothing published"
    )
    cost = "one pass over values or keys, no attention weights"
    bibtex = """
@article{norm2024,
  title = {A Simple and Effective {$L_2$} Norm-Based Strategy for {KV} Cache Compression},
  author = {Devoto, Alessio and Zhao, Yu and Scardapane, Simone and Minervini, Pasquale},
  year = {2024},
  eprint = {2406.11430},
  archivePrefix = {arXiv},
}
"""
