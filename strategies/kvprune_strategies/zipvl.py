"""`zipvl`: the tokens that receive most of the attention stay; the others are dropped or held in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvprune import BudgetPolicy, Decision, LayerView, Selection, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import uniform


@dataclass(frozen=True, kw_only=True)
class ZipVL(BudgetPolicy):
    """Keep the fewest tokens that together receive most of the attention, in each layer and sample.

    Let a(s) be the attention that token s receives from text rows, averaged over query heads and summed over
    rows. A layer finds the smallest p such that its p largest a(s) add up to ``tau`` of all. The p tokens
    with the highest a(s) / (number of rows that see s) are important. So flat attention keeps many tokens,
    peaked attention few. Unimportant tokens are dropped, or held in few bits.

    Args:
        tau: Share of attention that the important tokens receive, in (0, 1]. At 1, all tokens that receive
            any attention are important.
        keep_ratio: Equal-budget mode: exactly this fraction of visible tokens is kept, whatever tau. Only
            where unimportant tokens are dropped (low_bits=0).
        keep_tokens: Likewise, a number of visible tokens.
        high_ratio: Exactly this fraction of visible tokens is important, whatever tau. Only where unimportant
            tokens are held in few bits.
        high_bits: Bits of important tokens; 16 is the cache's own dtype.
        low_bits: Bits of the others; 0 drops them, as the later version of the paper does. The first version
            has 4 and 2 bits. Unless 0, all visible tokens are kept, so the kept fraction is 1, and the bytes
            in the receipt show what was saved.
        recent: Number of last text rows that are read for a(s).
        probe: Number of other rows that are read, drawn at random. If there are no more, all rows are read.
        heads: "shared": a(s) is the mean over all query heads, and all heads keep the same tokens.
            "separate": it is the mean over the query heads of one KV head, and each KV head finds its own p
            tokens, as in the authors' earlier ZipCache.
    """

    tau: float = 0.975
    high_ratio: float | None = None
    high_bits: Literal[16, 8, 4] = 16
    low_bits: Literal[0, 8, 4, 2] = 0
    recent: int = 64
    probe: int = 64
    heads: Literal["shared", "separate"] = "shared"

    name = "zipvl"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType(
        {"zipcache": {"heads": "separate", "high_bits": 4, "low_bits": 2, "high_ratio": 0.6}}
    )
    default_ratio = None  # tau says how many
    budget_alternatives = ("high_ratio",)

    def select(self, view: LayerView) -> Decision:
        """Decide about one layer's cache."""
        rows = self._rows(view)  # [B, T]
        mass = self._mass(view, rows)  # [B, H, S], a(s)
        strata = view.decode_strata  # [B, S], only what decoding can see
        if self.stated_budget:
            limit = scoring.limits(self.budget, strata)  # [B, S]
        else:
            limit = self._count(mass, strata, view.keys.dtype)[..., None].expand_as(mass)  # [B, H, S]
        scores = mass / scoring.row_counts(view.visibility, rows).clamp(min=1)[:, None]  # [B, H, S]
        important = scoring.keep_top(scores, strata, limit, view.visibility)  # [B, H, S]
        if not self.low_bits:
            bits = (
                None
                if self.high_bits == 16
                else torch.full_like(important, self.high_bits, dtype=torch.uint8)
            )
            kept = important
        else:
            kept = important | (strata == 0)[:, None]  # [B, H, S]
            bits = torch.where(important, self.high_bits, self.low_bits).to(torch.uint8)  # [B, H, S]
        return Decision(cache=Selection.from_mask(kept, bits))

    def _mass(self, view: LayerView, rows: Tensor) -> Tensor:
        """Return a(s), float64 ``[B, H, S]``: of all query heads, or of those that share a KV head."""
        mass = view.attention_mass(rows)  # [B, Hq, S]
        if self.heads == "shared":
            return mass.mean(1, keepdim=True).double()
        return scoring.by_kv_head(mass, view.heads).double()

    def _count(self, mass: Tensor, strata: Tensor, dtype: torch.dtype) -> Tensor:
        """Return p, how many of the largest masses add up to tau of their total, int64 ``[B, H]``."""
        mass = mass.masked_fill(strata[:, None] < 0, 0.0)  # [B, H, S]
        total, size = mass.sum(-1), (strata >= 0).sum(-1, keepdim=True)  # [B, H], [B, 1]
        if self.tau == 1:
            count = (mass > 0).sum(-1)
        else:
            reached = mass.sort(dim=-1, descending=True).values.cumsum(-1)  # [B, H, S]
            # Rounding in the dtype of attention may have lost as much.
            slack = 16 * torch.finfo(scoring.accumulation_dtype(dtype)).eps
            count = (reached < (self.tau - slack) * total[..., None]).sum(-1) + 1
        return torch.where(total > 0, torch.minimum(count, size), size)

    def _rows(self, view: LayerView) -> Tensor:
        """Return the rows that are read, bool ``[B, T]``: the last ones, and some drawn for each sample."""
        live = view.visibility.seeing  # [B, T]
        # Rows are counted from the end, so that padding on the left changes nothing (KV10).
        place = live.flip(1).cumsum(1).flip(1) - 1  # [B, T]
        earlier = live & (place >= self.recent)  # [B, T]
        if not bool(earlier.any()) or not self.probe:
            return live & (place < self.recent)
        fingerprints = view.fingerprints().expand(view.batch)  # [B]
        # Other random numbers than those of `view.random`, whose ranks are -1 or more.
        draws = uniform(view.seed, -2 - view.rank, fingerprints, 1, live.shape[1])[:, 0]  # [B, T]
        drawn = draws.to(live.device).gather(1, place.clamp(min=0)).masked_fill(~earlier, 2.0)
        order = drawn.argsort(dim=1, stable=True).argsort(dim=1, stable=True)  # [B, T]
        return live & ((place < self.recent) | (order < self.probe))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1:
            raise PolicyOptionError(f"zipvl: tau is a share of attention in (0, 1], got {self.tau!r}")
        if self.recent < 1 or self.probe < 0:
            raise PolicyOptionError(
                "zipvl reads at least 1 recent row and at least 0 others, "
                f"got recent={self.recent!r} and probe={self.probe!r}"
            )
        if self.low_bits >= self.high_bits:
            raise PolicyOptionError(
                "zipvl holds unimportant tokens in fewer bits than important ones, "
                f"got high_bits={self.high_bits!r} and low_bits={self.low_bits!r}"
            )
        right = ("high_ratio",) if self.low_bits else ("keep_ratio", "keep_tokens")
        for name, value in self.stated_budget.items():
            if name not in right:
                others = "held" if self.low_bits else "dropped"
                raise PolicyOptionError(
                    f"zipvl takes {' or '.join(right)} where unimportant tokens are {others} "
                    f"(low_bits={self.low_bits}), got {name}={value!r}"
                )

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What the options ask for: an exact number of tokens, or a share of attention."""
        return self.stated_budget or {"tau": self.tau}

    fidelity = "adapted"
    paper = "arXiv 2410.08584 (ZipVL)"
    deviations = """
    Only the opening of the paper could be read, and its code could not be had; numbers of rows and how p is
    found are second-hand. How it aggregates heads is unknown. The authors' earlier ZipCache adds attention up
    within the query heads of a KV head, and each KV head ranks for itself (heads=separate). The mean over all
    heads, the default here, is flatter than each head, so it takes more tokens to reach tau: 56 % of Whisper
    base's tokens on read speech, where separate heads take 47 %. ZipCache reads a tenth of the rows, drawn
    with replacement for the random half. The queries are text and the keys are image tokens, so no query is
    dropped, and prefill attends to all tokens in full precision. No image tokens are added while text is
    generated, so nothing is compressed again. Only tokens that decoding can see count, not padding or earlier
    images of an interleaved chat. Rows that see no image are not read. The best token of each image is always
    important. Quantization is by groups of channels of one token (`kvprune.cache.quantization`). A sample
    without an image receives no attention that counts, and keeps everything.
    """
    differs = (
        "attention is averaged over all heads, which keeps more tokens than heads=separate; no query is "
        "dropped, and prefill is in full precision"
    )
    checked_against = (
        "preset=zipcache: same important tokens by KV head as ThisisBillhe/ZipCache@b6932b9 "
        "(modeling_llama.py) where all rows are read; tau: unverified"
    )
    cost = (
        "in each layer: one product of at most 128 queries and the keys, 64 rows at a time, two sorts of S "
        "numbers; two host synchronisations and one per sample; where bits are low, each decode step makes a "
        "copy of one layer's kept keys and values in the cache's own dtype"
    )
    bibtex = """@article{zipvl2024,
  title = {ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification},
  author = {He, Yefei and others},
  eprint = {2410.08584},
  archivePrefix = {arXiv},
  year = {2024}
}"""
