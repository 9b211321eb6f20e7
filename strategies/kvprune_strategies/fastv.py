"""`fastv`: after the first few layers, only the tokens go on that the last word looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from kvprune import Budget, CrossKVPolicy, Decision, LayerView, onward_decision, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class FastV(CrossKVPolicy):
    """Keep K layers whole; later ones receive the tokens with the highest attention in the K-th.

    The score of a token is the attention that it receives in the K-th cross-attention layer, averaged over
    heads. All heads and all later layers share one set; the first K layers keep everything that decoding
    can see, so what a cache holds in total is more than keep_ratio says.

    Args:
        keep_ratio: Fraction of visible tokens that later layers receive, in (0, 1]; 0.5 if neither this nor
            keep_tokens is given.
        keep_tokens: Number of visible tokens that later layers receive, instead of a fraction.
        rank: K, how many cross-attention layers stay whole, at least 1 and less than there are. The paper
            counts all layers of LLaVA and prunes after 2 or 3 of 32. Of Llama-3.2-11B's 40 layers, the
            first cross-attention layer is the fourth, so 1 (the default) is nearest to that depth.
        rows: Whose attention counts. "last": the last live row, as in the published code. "mean": all live
            rows, as the paper describes it.

    Deviations: K counts cross-attention layers. Softmax runs over image tokens only, because such layers have
    no others. Each sample is ranked by itself, padding aside; the published code ranks the first for all. It
    decides once, in prefill, as the published variant with a cache does. The token count is rounded up. An
    image of an interleaved chat that only earlier rows see is ranked by the last row that sees it, and the
    best token of each image always stays.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    rank: int = 1
    rows: Literal["last", "mean"] = "last"

    name: ClassVar[str] = "fastv"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2403.06764 (FastV)"
    bibtex: ClassVar[str] = """
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
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "one layer's product of keys with one query row (rows=last) or all of them (rows=mean), 64 rows at a "
        "time; a few host synchronisations for each sample and image"
    )
    ranks_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.keep_ratio is None and self.keep_tokens is None:
            object.__setattr__(self, "keep_ratio", 0.5)
        super().__post_init__()
        self.budget  # noqa: B018  raises on an impossible budget
        if self.rank < 1:
            raise PolicyOptionError(
                f"rank of policy {self.name!r} is the number of cross-attention layers that stay whole, "
                f"at least 1, got {self.rank!r}"
            )

    @property
    def budget(self) -> Budget:
        """What later layers receive. Not `exact_budget`: the first layers keep more."""
        return Budget(keep_ratio=self.keep_ratio, keep_tokens=self.keep_tokens)

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What the options ask for."""
        if self.keep_tokens is not None:
            return {"keep_tokens": self.keep_tokens}
        assert self.keep_ratio is not None
        return {"keep_ratio": self.keep_ratio}

    @property
    def needs(self) -> frozenset[Need]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return frozenset({"queries"})

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
        mass = view.window_mass(1) if self.rows == "last" else view.attention_mass()
        limit = scoring.limits(self.budget, view.strata)
        kept = scoring.keep_top(scoring.pool_heads(mass), view.strata, limit, view.visibility)
        return onward_decision(view, kept, crop_here=False)
