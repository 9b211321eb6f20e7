"""`h2o`: heavy hitters, the tokens that receive most attention from the text."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring


@dataclass(frozen=True, kw_only=True)
class H2O(ScoringPolicy):
    """Keep the tokens that receive most attention from the text rows of the prompt.

    The score of a token is the attention that it receives from all live rows, averaged over the query heads
    of a KV head. Also known as observed attention.

    The authors' code does not divide (preset=published). Its scripts keep a tenth of the prompt by score, and
    the last tenth whatever its scores.

    Args:
        normalize: Whether a token's sum is divided by the number of live rows that may attend to it. If not,
            earlier images of a prompt score higher, because more rows see them.
    """

    normalize: bool = True

    name = "h2o"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType({"published": {"normalize": False}})

    def score(self, view: LayerView) -> Tensor:
        """Return the attention of live rows by KV head ``[B, Hkv, S]``."""
        mass = scoring.by_kv_head(view.attention_mass(), view.heads)  # [B, Hkv, S]
        if not self.normalize:
            return mass
        rows = scoring.row_counts(view.visibility)  # [B, S]
        return mass / rows.clamp(min=1)[:, None]

    fidelity = "adapted"
    paper = "arXiv 2306.14048 (H2O)"
    deviations = """
    Scores are those of the prompt. The original also adds up attention and evicts at each decode step; a
    policy here cannot do that yet. No part of the budget goes to recent tokens, because decoding adds no
    image tokens. The original does not divide; dividing changes the order only where one row sees more images
    than another. The original keeps tokens by query head; here, as in KVCache-Factory (kv_head), a KV head's
    query heads are averaged.
    """
    differs = (
        "scores of the prompt only, where the original also evicts at each decode step; sums are divided"
    )
    checked_against = (
        "same sets after the prefill as FMInference/H2O@ac75c2a and Zefan-Cai/KVCache-Factory@c97f9d7 at "
        "preset=published"
    )
    cost = (
        "one product of queries and keys in each layer that decides, 64 rows at a time; one host "
        "synchronisation for each sample"
    )
    bibtex = """
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
