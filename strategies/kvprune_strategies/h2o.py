"""`h2o`: heavy hitters, the tokens that receive most attention from the text."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from kvprune import Budget, DecodePolicy, HeldView, LayerView, ScoringPolicy, Selection, StepView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import State


@dataclass(frozen=True, kw_only=True)
class H2O(ScoringPolicy, DecodePolicy):
    """Keep the tokens that receive most attention from the text rows of the prompt.

    The score of a token is the attention that it receives from all live rows, averaged over the query heads
    of a KV head. Also known as observed attention.

    The authors' code does not divide (preset=published). Its scripts keep a tenth of the prompt by score, and
    the last tenth whatever its scores.

    Args:
        normalize: Whether a token's sum is divided by the number of live rows that may attend to it. If not,
            earlier images of a prompt score higher, because more rows see them.
        steps: Decode steps in which the cache shrinks to its budget. After the prompt it keeps everything,
            and each of these steps adds its attention to the scores and drops its share of what is too much.
            0: the prompt alone decides, right after it.
    """

    normalize: bool = True
    steps: int = 0

    name = "h2o"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType({"published": {"normalize": False}})
    moment = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 0:
            raise PolicyOptionError(f"steps of policy 'h2o' is a number of decode steps, got {self.steps}")
        if self.steps and self.reach == "onward":
            raise PolicyOptionError(
                f"policy 'h2o' with steps={self.steps} drops tokens while it decodes, so later layers "
                "receive all of them; leave reach=onward out, or steps"
            )

    @property
    def exact_budget(self) -> Budget | None:
        """The budget; None if decode steps shrink the cache, because the prompt then keeps everything."""
        return None if self.steps else super().exact_budget

    @property
    def takes_steps(self) -> bool:
        """Whether decode steps count."""
        return self.steps > 0

    def spares(self, view: LayerView) -> bool:
        """Keep everything after the prompt if decode steps shrink the cache."""
        return self.steps > 0

    def score(self, view: LayerView) -> Tensor:
        """Return the attention of live rows by KV head ``[B, Hkv, S]``."""
        mass = scoring.by_kv_head(view.attention_mass(), view.heads)  # [B, Hkv, S]
        if not self.normalize:
            return mass
        rows = scoring.row_counts(view.visibility)  # [B, S]
        return mass / rows.clamp(min=1)[:, None]

    def prepare(self, view: HeldView) -> State:
        """Return what the prompt's rows paid to each entry, by the entries that the prompt has left."""
        if view.earlier is not None:
            raise PolicyOptionError(
                f"policy 'h2o' with steps={self.steps} has dropped tokens of an earlier image and cannot "
                "take a later one; use steps=0, or start with an empty cache"
            )
        mass = scoring.by_kv_head(view.layer.attention_mass(), view.keys.shape[1])  # [R, Hkv, S]
        columns = view.arrived.expand(-1, mass.shape[1], -1)  # [R, Hkv, K]
        counts = view.valid[:, 0].sum(-1)  # [R]
        limit = torch.tensor(self.budget.resolve_all(counts.tolist()), device=counts.device)
        rows = scoring.row_counts(view.layer.visibility).to(mass)[:, None].expand_as(mass)
        first = torch.arange(view.entries, device=columns.device)  # which of the prompt's entries each one is
        return {
            "mass": mass.gather(-1, columns),
            "rows": rows.gather(-1, columns),
            "entry": first.expand_as(columns),
            "limit": limit,
            "count": counts,
        }

    def attend(self, step: StepView, state: State) -> Selection | None:
        """Read everything that is left."""
        return None

    def observe(self, step: StepView, attention: Tensor, state: State) -> tuple[State, Selection | None]:
        """Add the step's attention to the scores, and drop this step's share of what is too much."""
        left = self.steps - 1 - step.taken  # steps after this one that still drop something
        if left < 0:
            return state, None
        entry = state["entry"]  # [N, Hkv, K]
        paid = scoring.by_kv_head(attention, step.heads).to(state["mass"])
        mass = state["mass"].scatter_add(-1, entry, paid)  # [N, Hkv, entries after the prompt]
        scores = mass / (state["rows"] + step.taken + 1) if self.normalize else mass
        # Of what is too much, left / (left + 1) stays; the same for a sample alone as in its batch.
        limit = state["limit"]
        count = limit + (state["count"] - limit) * left // (left + 1)  # [N]
        most = self.budget.resolve(mass.shape[-1])
        width = most + (step.entries - most) * left // (left + 1)
        kept = step.best(scores.gather(-1, entry), width, count)
        entry = entry.gather(-1, kept.indices)
        return {**state, "mass": mass, "entry": entry, "count": count}, kept

    fidelity = "adapted"
    paper = "arXiv 2306.14048 (H2O)"
    deviations = """
    Scores are those of the prompt. The original also adds up attention at each decode step, and evicts one
    token for each new one. Decoding adds no image tokens, so with steps=0 nothing is left to evict; with
    steps=n the cache shrinks to its budget within n steps. No part of the budget goes to recent tokens.
    The original does not divide; dividing changes the order only where one row sees more images than another.
    The original keeps tokens by query head; here, as in KVCache-Factory (kv_head), a KV head's query heads
    are averaged.
    """
    differs = (
        "scores of the prompt only (steps=0), where the original also evicts at each decode step; sums are "
        "divided"
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
