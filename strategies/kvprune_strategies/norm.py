"""`norm`: rank tokens by the length of their values or keys, without looking at queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy


@dataclass(frozen=True, kw_only=True)
class Norm(ScoringPolicy):
    """Keep the tokens whose values (or keys) have the highest (or lowest) L2 norm.

    Args:
        of: "values"; "keys" as they are cached; "raw_keys" as they were before ``k_norm``. Mllama caches
            keys after an RMS norm per head, so their lengths differ little.
        keep: Which end of the ranking stays, "high" or "low".

    No combination did better than the defaults on the embedded demo (see docs/policies.md).
    """

    of: Literal["values", "keys", "raw_keys"] = "values"
    keep: Literal["high", "low"] = "high"

    name: ClassVar[str] = "norm"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2406.11430 (lowest key norm, in self-attention)"
    bibtex: ClassVar[str] = """
@article{norm2024,
  title = {A Simple and Effective {$L_2$} Norm-Based Strategy for {KV} Cache Compression},
  author = {Devoto, Alessio and Zhao, Yu and Scardapane, Simone and Minervini, Pasquale},
  year = {2024},
  eprint = {2406.11430},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "inspired-by"
    cost: ClassVar[str] = "one pass over values or keys, no attention weights"

    @property
    def needs(self) -> frozenset[Literal["queries", "raw_keys"]]:
        """Raw keys are captured only if they are asked for."""
        return frozenset({"raw_keys"}) if self.of == "raw_keys" else frozenset()

    def score(self, view: LayerView) -> Tensor:
        """Return signed norms ``[B, Hkv, S]``."""
        # One attribute only: raw_keys exist only where they were asked for.
        tensor: Tensor = getattr(view, self.of)
        norms: Tensor = torch.linalg.vector_norm(tensor.float(), dim=-1)
        return norms if self.keep == "high" else -norms
