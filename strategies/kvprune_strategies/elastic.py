"""`elastic`: Elastic Cache, which merges what it drops into what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import BudgetPolicy, Decision, LayerView, scoring
from kvprune.policy import merge_mean, nearest


@dataclass(frozen=True, kw_only=True)
class Elastic(BudgetPolicy):
    """Keep the tokens that receive most attention, each as the mean of the tokens nearest to it.

    In each layer, the importance of a token is the attention that it receives from live text rows, added up
    and averaged over heads. The most important ones are anchors. Every other visible token joins the nearest
    anchor by index, of two equally near ones the lower; each head then keeps the mean key and the mean value
    of every bucket. Prefill is untouched.

    Args:
        borders: What no bucket crosses while it has an anchor: a "tile", whose tokens join the nearest anchor
            of the image if their tile has none; or only an "image", which no bucket ever crosses.
        class_tokens: "merge" treats class tokens of the encoder like any other. "apart" lets none into
            the bucket of another token, nor others into its own; one that is no anchor is dropped outright.
            This needs to know the layout.
        renormalize_keys: Whether merged keys get the mean length of their members back. Mllama caches keys
            after an RMS norm; their mean is shorter, so it draws less attention than any of them did.
        size_bias: Whether the logarithm of the bucket's size is added to an entry's logits in decode, so
            that a bucket draws as much attention as its number of tokens.

    Deviations: the paper's decode half, which removes an entry at a fixed place whenever text grows past the
    budget, is a no-op here, because a cross-attention cache does not grow. Nothing is protected for being
    first or most recent: image tokens have no such order. Rows that see no image do not vote. Buckets end at
    images and by default at tiles, which the paper's one sequence does not know; the best token of each image
    is always an anchor. (In a sample whose text sees no image, an image may be left without an anchor, and
    goes.) renormalize_keys and size_bias are not in the paper.
    """

    borders: Literal["tile", "image"] = "tile"
    class_tokens: Literal["merge", "apart"] = "merge"
    renormalize_keys: bool = False
    size_bias: bool = False

    name: ClassVar[str] = "elastic"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2407.18121 (Elastic Cache)"
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "one product of queries and keys in each layer, 64 rows at a time, and one pass over keys and "
        "values, a few heads at a time in float32; with size_bias, decoding adds one number to each logit"
    )
    bibtex: ClassVar[str] = """@misc{elastic2024,
  title = {Efficient Inference of Vision Instruction-Following Models with Elastic Cache},
  author = {Liu, Zuyan and others},
  year = {2024},
  eprint = {2407.18121},
  archivePrefix = {arXiv}
}"""

    @property
    def needs(self) -> frozenset[Literal["queries", "raw_keys", "features"]]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return frozenset({"queries"})

    def select(self, view: LayerView) -> Decision:
        """Merge what decoding can see; each layer decides for itself."""
        strata = view.decode_strata
        importance = scoring.pool_heads(view.attention_mass())  # [B, 1, S]
        limit = scoring.limits(self.budget, strata)
        kept = scoring.keep_top(importance, strata, limit, view.visibility)
        buckets = self._buckets(view, kept, strata)
        return Decision(
            cache=merge_mean(kept, buckets, renormalize_keys=self.renormalize_keys, size_bias=self.size_bias)
        )

    def _buckets(self, view: LayerView, kept: Tensor, strata: Tensor) -> Tensor:
        """Return the anchor of each column, ``[B, 1, S]``; -1 for what decoding cannot see."""
        unseen = strata < 0
        if self.class_tokens == "apart" and view.layout.class_tokens is not None:
            alone = view.layout.class_tokens.to(unseen.device).expand_as(unseen)
        else:
            alone = torch.zeros_like(unseen)
        joins = ~unseen & ~alone
        takes = kept & ~alone[:, None]
        by_image = nearest(takes, view.images.expand_as(unseen).masked_fill(~joins, -1))
        if self.borders == "image":
            buckets = by_image
        else:
            tiles = view.visibility.units.expand_as(unseen).masked_fill(~joins, -1)
            by_tile = nearest(takes, tiles)
            buckets = torch.where(by_tile < 0, by_image, by_tile)
        own = torch.arange(kept.shape[-1], device=kept.device)
        return torch.where(kept, own, buckets)
