"""`prefixkv`: each layer keeps as many of its best tokens as hold one common part of its attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvprune import LayerView, scoring
from kvprune.policy import LayerAllocator, Need


@dataclass(frozen=True, kw_only=True)
class PrefixKV(LayerAllocator):
    """Keep in each layer the shortest prefix of its ranking that holds a part p of its attention.

    Tokens are ranked by the attention that they receive from live text rows, mean over heads, and heads
    share what is kept. The part p is the same in all layers and as large as the budget allows, so layers
    whose attention is spread keep more. A token is kept if the better ones of its layer hold less than p:
    ranking all tokens of all layers by that finds p without a search, and at an exact total.

    Args:
        scorer: Ranks tokens in place of attention; prefixes, and with them how many a layer keeps, are still
            those of attention. See `kvprune.policy.LayerAllocator`, also for keep_ratio and keep_tokens.

    Deviations: the original profiles how much each layer keeps on calibration samples and then keeps it
    fixed; here each sample has its own p. First and last tokens are not protected, and nothing is evicted
    while decoding. Layers of equal attention differ by one token at most, where the total asks for it.
    """

    name: ClassVar[str] = "prefixkv"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2412.03409 (PrefixKV)"
    bibtex: ClassVar[str] = """
@article{prefixkv2024,
  title = {{PrefixKV}: Adaptive Prefix {KV} Cache is What Vision Instruction-Following Models Need for
           Efficient Generation},
  author = {Wang, Ao and Chen, Hui and others},
  year = {2024},
  eprint = {2412.03409},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "one product of queries and keys in each layer, 64 rows at a time; S numbers of each layer until the "
        "last has attended, when L * S numbers are sorted; all layers hold all tokens until then; one host "
        "synchronisation for each sample and layer"
    )

    @property
    def needs(self) -> frozenset[Need]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return super().needs | {"queries"}

    def measure(self, view: LayerView) -> Tensor:
        """Return the attention that each token receives, mean over heads, ``[B, S]``; 0 where unseen."""
        mass = scoring.pool_heads(view.attention_mass())[:, 0]
        return mass.masked_fill(view.strata != 0, 0)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Rank by attention, or ask the scorer if there is one."""
        return measured[:, None] if self.scorer is None else super().rank(view, measured)

    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """A token is the more urgent the less attention the better ones of its layer hold together."""
        held = measured.double().sort(dim=-1, descending=True).values.cumsum(-1)
        better = torch.nn.functional.pad(held[..., :-1], (1, 0))
        tiny = torch.finfo(torch.float64).tiny  # a sample without an image: layers keep the same
        return -better / held[..., -1:].clamp(min=tiny)
