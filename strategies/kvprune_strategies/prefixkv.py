"""`prefixkv`: each layer keeps its best tokens up to the same part of its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune import LayerView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import LayerAllocator


@dataclass(frozen=True, kw_only=True)
class PrefixKV(LayerAllocator):
    """Keep in each layer the shortest prefix of its ranking that holds a part p of its attention.

    Tokens are ranked by the attention that they receive from live text rows, mean over heads; heads share
    what is kept. The part p is the same in all layers and as large as the budget allows, so layers whose
    attention is spread keep more. A token is kept if the better tokens of its layer hold less than p.
    Ranking the tokens of all layers by what the better ones hold finds p without a search, at an exact total.

    Args:
        shares: How much each cross-attention layer keeps relative to the others, from the first layer to the
            last, such as ``0.6/0.3/0.1``. Empty: each sample has its own p. The published method measures
            shares once, as the mean over calibration samples, and then keeps them.
        scorer: Ranks tokens in place of attention; attention still decides how many each layer keeps. See
            `kvprune.policy.LayerAllocator`, also for keep_ratio and keep_tokens.
    """

    shares: str = ""

    name = "prefixkv"
    version = 2  # 1 lost small differences between layers where attention is peaked
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

        With ``shares``, it is in proportion to these instead. Adding from the least token up keeps the digits
        of small remainders: where attention is peaked, most tokens differ only there.
        """
        if self.shares:
            return scoring.proportional(self._shares(measured), columns)
        least_first = measured.double().sort(dim=-1).values.cumsum(-1)  # [B, L, S]
        remaining = least_first.flip(-1)  # [B, L, S], held by the i-th best token and all worse ones
        tiny = torch.finfo(torch.float64).tiny  # a sample without an image: layers keep equally many
        return remaining / remaining[..., :1].clamp(min=tiny)

    def _shares(self, measured: Tensor) -> Tensor:
        """Return the shares as weights of the layers, ``[B, L]``."""
        shares, layers = _numbers(self.shares), measured.shape[1]
        if len(shares) != layers:
            raise PolicyOptionError(
                f"shares of policy {self.name!r} are one number for each cross-attention layer; this model "
                f"has {layers}, got {len(shares)}: {self.shares!r}"
            )
        return torch.tensor(shares, dtype=torch.float64, device=measured.device).expand(len(measured), -1)

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = _numbers(self.shares)
        if self.shares and not (shares and all(0 <= share < math.inf for share in shares) and any(shares)):
            raise PolicyOptionError(
                f"shares of policy {self.name!r} are numbers that are not negative, and not all 0, such as "
                f"0.6/0.3/0.1, got {self.shares!r}"
            )

    fidelity = "adapted"
    paper = "arXiv 2412.03409 (PrefixKV)"
    deviations = """
    The original measures on calibration samples how much each layer keeps, and then keeps these shares of
    every sample; here each sample has its own p, unless shares are given. (The authors' numbers are for the
    32 or 40 layers of LLaVA-1.5.) The original searches p until the total is met within four tokens, scales
    what each layer drops to the total and truncates it, so it keeps up to one token more in a layer; here the
    total is exact. (In 15 trials of 8 to 32 layers no layer differed by more than two tokens.) The original
    keeps the first and the last token of the prompt; neither is of an image. Nothing is evicted while
    decoding. Layers of equal attention differ by at most one token, if the total cannot be shared evenly.
    """
    differs = (
        "by default each sample has its own shares of layers, where the original takes those of "
        "calibration samples (shares=); the total is exact, where the original rounds"
    )
    checked_against = (
        "same sets as THU-MIG/PrefixKV@39b7265 (prefixkv.py:PrefixKV) where its rounded counts add up to "
        "a budget; with shares=, too"
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


def _numbers(text: str) -> list[float]:
    """Read numbers that are separated by slashes; none if some part is no number."""
    try:
        return [float(part) for part in text.split("/")]
    except ValueError:
        return []
