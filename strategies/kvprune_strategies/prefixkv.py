"""`prefixkv`: each layer keeps its best tokens up to the same part of its attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import LayerView, scoring
from kvprune.policy import LayerAllocator


@dataclass(frozen=True, kw_only=True)
class PrefixKV(LayerAllocator):
    """Keep in each layer the shortest prefix of its ranking that holds a part p of its attention.

    Tokens are ranked by the attention that they receive from live text rows, mean over heads; heads share
    what is kept. The part p is the same in all layers and as large as the budget allows, so layers whose
    attention is spread keep more. A token is kept if the better tokens of its layer hold less than p.
    Ranking the tokens of all layers by what the better ones hold finds p without a search, at an exact total.

    Args:
        scorer: Ranks tokens in place of attention; attention still decides how many each layer keeps. See
            `kvprune.policy.LayerAllocator`, also for keep_ratio and keep_tokens.
    """

    name = "prefixkv"
    version = 2  # 2: budgets by the attention that remains; 1 lost its digits where attention is peaked
    measure_needs = frozenset({"queries"})

    def measure(self, view: LayerView) -> Tensor:
        """Return the attention that each token receives, mean over heads, ``[B, S]``; 0 where unseen."""
        mass = scoring.pool_heads(view.attention_mass())[:, 0]  # [B, S]
        return mass.masked_fill(view.strata != 0, 0)

    def rank(self, view: LayerView, measured: Tensor) -> Tensor:
        """Rank by the scorer if there is one, else by attention."""
        return measured[:, None] if self.scorer is None else super().rank(view, measured)

    def urgency(self, measured: Tensor, visible: Tensor, columns: int) -> Tensor:
        """Return the part of its layer's attention that a token and all worse ones hold, ``[B, L, S]``.

        It falls along S as 1 minus what better tokens hold. Adding from the least token up keeps the digits
        of small remainders: where attention is peaked, most tokens differ only there.
        """
        least_first = measured.double().sort(dim=-1).values.cumsum(-1)  # [B, L, S]
        remaining = least_first.flip(-1)  # [B, L, S], held by the i-th best token and all worse ones
        tiny = torch.finfo(torch.float64).tiny  # a sample without an image: layers keep equally many
        return remaining / remaining[..., :1].clamp(min=tiny)

    fidelity = "adapted"
    paper = "arXiv 2412.03409 (PrefixKV)"
    deviations = """
    The original measures on calibration samples how much each layer keeps, and then keeps these shares of
    every sample; here each sample has its own p. The original searches p until the total is met within four
    tokens, scales what each layer drops to the total and truncates it, so it keeps up to one token more in a
    layer; here the total is exact. (In 15 trials of 8 to 32 layers no layer differed by more than two
    tokens.) The original keeps the first and the last token of the prompt; neither is of an image. Nothing is
    evicted while decoding. Layers of equal attention differ by at most one token, if the total cannot be
    shared evenly.
    """
    differs = (
        "each sample's layers share by its own attention, where the original uses shares of calibration "
        "samples; the total is exact, where the original scales and truncates what its search found"
    )
    checked_against = (
        "same sets as THU-MIG/PrefixKV@39b7265 (prefixkv.py:PrefixKV), profiled on the sample itself, "
        "where its search meets the budget"
    )
    cost = (
        "one product of queries and keys in each layer, 64 rows at a time; S numbers of each layer until the "
        "last has attended, when L * S numbers are sorted; all layers hold all tokens until then; one host "
        "synchronisation for each sample and layer"
    )
    bibtex = """
@article{prefixkv2024,
  title = {{PrefixKV}: Adaptive Prefix {KV} Cache is What Vision Instruction-Following Models Need for
           Efficient Generation},
  author = {Wang, Ao and Chen, Hui and others},
  year = {2024},
  eprint = {2412.03409},
  archivePrefix = {arXiv},
}
"""
