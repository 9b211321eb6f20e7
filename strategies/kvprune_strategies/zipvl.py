"""`zipvl`: ZipVL, as many tokens as carry most of the attention, and low precision for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvprune import Budget, CrossKVPolicy, Decision, LayerView, Selection, scoring
from kvprune.errors import PolicyOptionError
from kvprune.tokens import randomness


@dataclass(frozen=True, kw_only=True)
class ZipVL(CrossKVPolicy):
    """Keep the fewest tokens that together receive most of the attention, in each layer and sample.

    With a(s) the attention that token s receives from text rows, averaged over query heads and summed over
    rows, a layer finds the smallest p such that its p largest a(s) add up to ``tau`` of all. The p tokens of
    the highest a(s) / (number of rows that see s) are important. So the number adapts: flat attention keeps
    many tokens, peaked attention few. Unimportant tokens are dropped, or held in few bits.

    Args:
        tau: Share of attention that the important tokens receive, in (0, 1]. At 1, all tokens that receive
            any are important.
        keep_ratio: Equal-budget mode: exactly this fraction of visible tokens is kept, instead of as many as
            tau asks for. Only where the others are dropped (low_bits=0).
        high_ratio: The same where the others are held in few bits: exactly this fraction is important.
        high_bits: Precision of important tokens; 16 is the cache's own dtype.
        low_bits: Precision of the others; 0 drops them, as the later version of the paper does. The first
            version held 4 and 2 bits. All visible tokens are kept then, so the kept fraction is 1, and the
            receipt's bytes tell what was saved.
        recent: Rows at the end that are read for a(s).
        probe: Rows drawn among the others that are read besides. All rows are read if there are no more.

    Deviations: the queries are text and the keys are image tokens, so no query is dropped and prefill attends
    to all tokens in full precision. Image tokens do not grow while text is generated: nothing is compressed
    again. Only tokens that decoding can see count, padding and earlier images of an interleaved chat do not.
    Rows that see no image are not read. The best token of each image is important. Heads share tokens; how
    the paper aggregates heads could not be verified. The bits come in groups of channels of one token
    (`kvprune.cache.quantization`). A sample without an image receives no attention that counts, and keeps
    all.
    """

    tau: float = 0.975
    keep_ratio: float | None = None
    high_ratio: float | None = None
    high_bits: Literal[16, 8, 4] = 16
    low_bits: Literal[0, 8, 4, 2] = 0
    recent: int = 64
    probe: int = 64

    name: ClassVar[str] = "zipvl"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2410.08584 (ZipVL)"
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "in each layer: one product of at most 128 queries and the keys, 64 rows at a time, two sorts of S "
        "numbers; two host synchronisations and one per sample; where bits are low, each decode step makes a "
        "copy of one layer's kept keys and values in the cache's own dtype"
    )
    ranks_tokens: ClassVar[bool] = True
    bibtex: ClassVar[str] = """@article{zipvl2024,
  title = {ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification},
  author = {He, Yefei and others},
  eprint = {2410.08584},
  archivePrefix = {arXiv},
  year = {2024}
}"""

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
        unfit, other = ("keep_ratio", "high_ratio") if self.low_bits else ("high_ratio", "keep_ratio")
        if getattr(self, unfit) is not None:
            raise PolicyOptionError(
                f"zipvl takes {other} where unimportant tokens are {'held' if self.low_bits else 'dropped'} "
                f"(low_bits={self.low_bits}), got {unfit}={getattr(self, unfit)!r}"
            )
        self.budget  # noqa: B018  raises on an impossible budget

    @property
    def budget(self) -> Budget | None:
        """How many tokens are important; None where tau says."""
        ratio = self.high_ratio if self.low_bits else self.keep_ratio
        return None if ratio is None else Budget(keep_ratio=ratio)

    @property
    def exact_budget(self) -> Budget | None:
        """The budget in equal-budget mode."""
        return None if self.low_bits else self.budget

    @property
    def requested(self) -> Mapping[str, float | int]:
        """What the options ask for: an exact share of tokens, or a share of attention."""
        if self.budget is None:
            return {"tau": self.tau}
        return super().requested if self.high_ratio is None else {"high_ratio": self.high_ratio}

    @property
    def needs(self) -> frozenset[Literal["queries"]]:
        """Attention is recomputed from queries, because fused kernels return no weights."""
        return frozenset({"queries"})

    def select(self, view: LayerView) -> Decision:
        """Decide about one layer's cache."""
        rows = self._rows(view)
        mass = view.attention_mass(rows).mean(1).double()  # [B, S]
        strata = view.decode_strata  # only what decoding can see
        if self.budget is None:
            limit = self._count(mass, strata, view.keys.dtype)[:, None].expand_as(strata)
        else:
            limit = scoring.limits(self.budget, strata)
        scores = (mass / scoring.row_counts(view.visibility, rows).clamp(min=1))[:, None]
        important = scoring.keep_top(scores, strata, limit, view.visibility)  # [B, 1, S]
        if not self.low_bits:
            bits = None if self.high_bits == 16 else torch.full_like(strata[:, None], self.high_bits)
            kept = important
        else:
            kept = important | (strata == 0)[:, None]
            bits = torch.where(important, self.high_bits, self.low_bits)
        return Decision(cache=Selection.from_mask(kept, None if bits is None else bits.to(torch.uint8)))

    def _count(self, mass: Tensor, strata: Tensor, dtype: torch.dtype) -> Tensor:
        """Return how many of its largest masses add up to tau of a sample's mass, int64 ``[B]``."""
        mass = mass.masked_fill(strata < 0, 0.0)
        total, size = mass.sum(-1, keepdim=True), (strata >= 0).sum(-1)
        if self.tau == 1:
            count = (mass > 0).sum(-1)
        else:
            reached = mass.sort(dim=-1, descending=True).values.cumsum(-1)
            # What rounding in the dtype of attention may have taken away.
            slack = 16 * torch.finfo(scoring.accumulation_dtype(dtype)).eps
            count = (reached < (self.tau - slack) * total).sum(-1) + 1
        return torch.where(total[:, 0] > 0, torch.minimum(count, size), size)

    def _rows(self, view: LayerView) -> Tensor:
        """Return the rows that are read, bool ``[B, T]``: the last ones, and some drawn for each sample."""
        live = view.visibility.seeing
        # Rows are counted from the end, so that padding on the left changes nothing (KV10).
        place = live.flip(1).cumsum(1).flip(1) - 1
        earlier = live & (place >= self.recent)
        if not bool(earlier.any()) or not self.probe:
            return live & (place < self.recent)
        fingerprints = view.fingerprints().expand(view.batch)
        # Another stream than that of `view.random`, whose ranks are not negative.
        draws = randomness.uniform(view.seed, -2 - view.rank, fingerprints, 1, live.shape[1])[:, 0]
        drawn = draws.to(live.device).gather(1, place.clamp(min=0)).masked_fill(~earlier, 2.0)
        order = drawn.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return live & ((place < self.recent) | (order < self.probe))
