"""`fastv`: after the first few layers, only the tokens stay that the last text row attended to."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from kvprune import BudgetPolicy, CrossKVPolicy, Decision, LayerView, onward_decision, scoring
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class FastV(BudgetPolicy):
    """Keep K layers whole; later ones receive the tokens with the highest attention in the K-th.

    The score of a token is the attention that it receives in the K-th cross-attention layer, averaged over
    heads. All heads and all later layers share one set. The first K layers keep everything that decoding can
    see, so a cache holds more in total than keep_ratio says.

    Args:
        keep_ratio: Fraction of visible tokens that later layers receive, in (0, 1]; 0.5 if neither this nor
            keep_tokens is given.
        keep_tokens: Number of visible tokens that later layers receive, instead of a fraction.
        rank: K, how many cross-attention layers stay whole, at least 1 and less than there are. The published
            settings count all layers of LLaVA, each of which sees the image: 2 of 32 in the scripts
            (``preset=published``, with half of the tokens), 3 in the demo and for lmms-eval (presets of these
            names). Of Llama-3.2-11B's 40 layers, the first cross-attention layer is the fourth, so 1 (the
            default) is nearest to that depth.
        rows: Which text rows count. "last": the last live row, as in all published code. "mean": all live
            rows, as the paper's text is reported to say.
    """

    rank: int = 1
    rows: Literal["last", "mean"] = "last"

    name = "fastv"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType(
        {
            "published": {"rank": 2, "keep_ratio": 0.5},
            "demo": {"rank": 3, "keep_ratio": 0.25},
            "lmms-eval": {"rank": 3, "keep_ratio": 0.5},
        }
    )
    exact_budget = CrossKVPolicy.exact_budget  # none: the first layers keep more than later ones

    def select(self, view: LayerView) -> Decision:
        """Decide in the K-th cross-attention layer for all later ones.

        Raises:
            PolicyOptionError: If no layer comes after the K-th.
        """
        if self.rank >= view.num_layers:
            raise PolicyOptionError(
                f"policy {self.name!r} with rank={self.rank} prunes what comes after the first {self.rank} "
                f"cross-attention layers, but this model has {view.num_layers}, so nothing would be pruned; "
                f"rank is at least 1 and less than the number of layers"
            )
        if view.rank != self.rank - 1:
            return Decision()
        mass = view.window_mass(1) if self.rows == "last" else view.attention_mass()  # [B, Hq, S]
        limit = scoring.limits(self.budget, view.strata)  # [B, S]
        kept = scoring.keep_top(scoring.pool_heads(mass), view.strata, limit, view.visibility)  # [B, 1, S]
        return onward_decision(view, kept, crop_here=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise PolicyOptionError(
                f"rank of policy {self.name!r} is the number of cross-attention layers that stay whole, "
                f"at least 1, got {self.rank!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2403.06764 (FastV)"
    deviations = """
    K counts cross-attention layers. Softmax runs over image tokens only, because such layers have no others.
    Each sample has a ranking of its own, without its padding; the published code uses the first sample's for
    all. It decides once, in prefill, as the published variant with a cache does. The token count is rounded
    up. An image of an interleaved chat that only earlier rows see is ranked by the last row that sees it. The
    best token of each image always stays.
    """
    differs = "K counts cross-attention layers; softmax over image tokens only; a ranking for each sample"
    checked_against = (
        "same sets as pkunlp-icler/FastV@d165972 (fastv_forward) at preset=published and preset=demo, "
        "with weights on the image only"
    )
    cost = (
        "one layer's product of keys with one query row (rows=last) or all of them (rows=mean), 64 rows at a "
        "time; a few host synchronisations for each sample and image"
    )
    bibtex = """
@article{fastv2024,
  title = {An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
           Vision-Language Models},
  author = {Chen, Liang and Zhao, Haozhe and Liu, Tianyu and Bai, Shuai and Lin, Junyang and Zhou, Chang and
            Chang, Baobao},
  year = {2024},
  eprint = {2403.06764},
  archivePrefix = {arXiv},
}
"""
