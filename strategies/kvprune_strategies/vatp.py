"""`vatp`: attention times the length of the value (value-aware token pruning)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune_strategies.first_tokens import keep_first


@dataclass(frozen=True, kw_only=True)
class VATP(ScoringPolicy):
    """Keep the tokens with the largest product of the attention that they receive and their value's L1 norm.

    Attention is that of `h2o`: from all live rows of the prompt, averaged over the query heads of a KV head.
    The norm is that of the KV head's value, so a token that is looked at but adds little goes first.

    Tokens that serve as attention sinks have much attention and small values. The authors keep the first 20
    tokens of the prompt whatever their scores (preset=published), because a language model's sinks are there.

    Args:
        normalize: Whether a token's attention is divided by the number of live rows that may attend to it. If
            not, earlier images of a prompt score higher, because more rows see them.
        sinks: Number of first tokens that stay whatever their scores. They count toward the budget, and where
            it is smaller, the first of them stay.
    """

    normalize: bool = True
    sinks: int = 0

    name = "vatp"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType({"published": {"normalize": False, "sinks": 20}})

    def score(self, view: LayerView) -> Tensor:
        """Return attention times the norm of values, by KV head ``[B, Hkv, S]``."""
        mass = scoring.by_kv_head(view.attention_mass(), view.heads)  # [B, Hkv, S]
        if self.normalize:
            mass = mass / scoring.row_counts(view.visibility).clamp(min=1)[:, None]
        dtype = scoring.accumulation_dtype(view.values)
        norms: Tensor = torch.linalg.vector_norm(view.values, ord=1, dim=-1, dtype=dtype)  # [B, Hkv, S]
        # Columns that no row sees may hold anything, and 0 times infinity is NaN.
        return keep_first(torch.where(mass > 0, mass * norms, 0), view, self.sinks)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise PolicyOptionError(
                f"sinks of policy {self.name!r} is a number of first tokens, 0 or more, got {self.sinks}"
            )

    fidelity = "adapted"
    paper = "arXiv 2406.12335 (VATP)"
    deviations = """
    Scores are those of the prompt. The original adds up products and evicts at each decode step, too; a
    policy here cannot do that yet. No part of the budget goes to recent tokens, because decoding adds no
    image tokens. The first tokens are kept only with sinks=20 (preset=published): the first tokens of an
    image or a recording are not known to be attention sinks. The original does not divide; dividing changes
    the order only where one row sees more images than another. The original's models have a value for each
    query head; here attention is averaged over the query heads that share a value. The authors' second
    variant, which averages the attention of the last 400 rows as Scissorhands does, is left out: a prompt
    beside an image rarely has that many.
    """
    differs = (
        "scores of the prompt only, where the original also evicts at each decode step; sums are divided and "
        "no first tokens are protected (preset=published: not divided, 20 protected)"
    )
    checked_against = "same sets after the prefill as guozhiyu/vatp@39ea686 at preset=published"
    cost = (
        "one product of queries and keys in each layer that decides, 64 rows at a time, and one pass over "
        "values; one host synchronisation for each sample"
    )
    bibtex = """
@article{vatp2024,
  title = {Attention Score is not All You Need for Token Importance Indicator in {KV} Cache Reduction: Value
           Also Matters},
  author = {Guo, Zhiyu and Kamigaito, Hidetaka and Watanabe, Taro},
  year = {2024},
  eprint = {2406.12335},
  archivePrefix = {arXiv},
}
"""
