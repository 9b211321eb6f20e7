"""`norm`: rank tokens by the length of their values or keys, without looking at queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class Norm(ScoringPolicy):
    """Keep the tokens whose values (or keys) have the highest (or lowest) L2 norm.

    Args:
        of: "values"; "keys" as they are cached; "raw_keys" as they were before ``k_norm``. Mllama caches
            keys after an RMS norm per head, so their lengths differ little.
        keep: Whether the "high" or the "low" norms stay.

    No combination did better than the defaults on the embedded demo (see docs/policies.md).
    """

    of: Literal["values", "keys", "raw_keys"] = "values"
    keep: Literal["high", "low"] = "high"

    name = "norm"
    version = 1

    def score(self, view: LayerView) -> Tensor:
        """Return signed norms ``[B, Hkv, S]``."""
        vectors: Tensor = getattr(view, self.of)  # [B, Hkv, S, D]
        norms: Tensor = torch.linalg.vector_norm(vectors.float(), dim=-1)  # [B, Hkv, S]
        return norms if self.keep == "high" else -norms

    @property
    def needs(self) -> frozenset[Need]:
        """Raw keys, if their norms are asked for."""
        return frozenset({"raw_keys"}) if self.of == "raw_keys" else frozenset()

    fidelity = "inspired-by"
    paper = "arXiv 2406.11430 (lowest key norm, in self-attention)"
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
