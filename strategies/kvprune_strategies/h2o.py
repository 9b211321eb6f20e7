"""`h2o`: heavy hitters, the tokens that text looked at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class H2O(ScoringPolicy):
    """Keep the tokens that receive most attention from the text rows of the prompt.

    The score of a token is the attention that it receives from all live rows, averaged over the query heads
    of a KV head. Also known as observed attention.

    Args:
        normalize: Whether a token's sum is divided by the number of live rows that may attend it. Without,
            images that came earlier in a prompt win, because more rows saw them.

    Deviations: scores are those of the prompt. The original goes on adding up and evicting at each decode
    step, for which there is no moment here yet. No part of the budget goes to recent tokens, because decoding
    brings no image tokens. The original does not divide; dividing changes the order only where one row sees
    more images than another.
    """

    normalize: bool = True

    name: ClassVar[str] = "h2o"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2306.14048 (H2O)"
    bibtex: ClassVar[str] = """
@article{h2o2023,
  title = {{H2O}: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models},
  author = {Zhang, Zhenyu and Sheng, Ying and Zhou, Tianyi and Chen, Tianlong and Zheng, Lianmin and Cai,
            Ruisi and Song, Zhao and Tian, Yuandong and R{\\'e}, Christopher and Barrett, Clark and Wang,
            Zhangyang and Chen, Beidi},
  year = {2023},
  eprint = {2306.14048},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "one product of queries and keys in each layer that decides, 64 rows at a time; one host "
        "synchronisation for each sample"
    )

    @property
    def needs(self) -> frozenset[Need]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return frozenset({"queries"})

    def score(self, view: LayerView) -> Tensor:
        """Return the attention of live rows by KV head ``[B, Hkv, S]``."""
        mass = scoring.by_kv_head(view.attention_mass(), view.heads)
        if not self.normalize:
            return mass
        return mass / scoring.row_counts(view.visibility).clamp(min=1)[:, None]
