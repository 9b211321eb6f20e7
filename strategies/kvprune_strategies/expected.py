"""`expected`: the attention that queries to come are expected to pay (Expected Attention)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from kvprune import LayerView, ScoringPolicy, scoring
from kvprune.errors import PolicyOptionError
from kvprune_strategies.first_tokens import keep_first


@dataclass(frozen=True, kw_only=True)
class Expected(ScoringPolicy):
    """Keep the tokens with the largest product of expected attention and the length of their value.

    Queries to come are taken as normally distributed, with the mean and the covariance of the prompt's
    queries. A token's expected weight before the softmax is then ``exp(m + v / 2)``, where m and v are the
    mean and the variance of its logits. Weights are divided by their sum over all tokens, averaged over the
    query heads of a KV head, and multiplied by the L2 norm of the value.

    All live rows count that see any of the image's tokens. Few rows say little about the covariance: with
    one row it is 0, and expected attention is that row's own.

    The library of the authors leaves the first 4 rows and tokens of the prompt out (preset=kvpress). The runs
    that it reports also have epsilon=0.01, and share budgets among heads: ``adakv:scorer=expected(
    preset=published)``.

    Args:
        covariance: Whether the variance of logits counts. If not, expected attention is that of the mean
            query.
        value_norm: Whether expected attention is multiplied by the norm of the value.
        epsilon: Added to expected attention before it is multiplied, so that tokens without attention are
            ranked by their values. It matters only with ``value_norm``.
        sinks: Number of first tokens that stay whatever their scores and take no part in expected attention,
            and of first live rows whose queries do not count, as long as other rows are left.
    """

    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    sinks: int = 0

    name = "expected"
    version = 1
    needs = frozenset({"queries"})
    presets = MappingProxyType(
        {
            "kvpress": {"sinks": 4},
            "published": {"sinks": 4, "epsilon": 0.01},
        }
    )

    def score(self, view: LayerView) -> Tensor:
        """Return expected attention times the norm of values, by KV head ``[B, Hkv, S]``."""
        dtype = scoring.accumulation_dtype(view.keys)
        scores = torch.zeros(view.keys.shape[:3], dtype=dtype, device=view.keys.device)  # [B, Hkv, S]
        for members in scoring.each_stratum(view.strata):  # [B, S]
            seeing = scoring.last_rows(view.visibility, view.live.shape[1], members)  # [B, T]
            for sample in range(view.batch):
                # Gathered, so that rounding does not depend on the padding of the batch (KV10).
                rows = seeing[sample].nonzero().squeeze(1)  # [n]
                columns = (
                    members[sample].nonzero().squeeze(1)[self.sinks :]
                )  # [m]; the first ones stay anyway
                rows = rows[self.sinks :] if len(rows) > self.sinks else rows
                if len(rows) and len(columns):
                    for head in range(view.heads):
                        scores[sample, head, columns] = self._of_head(view, sample, head, rows, columns)
        return keep_first(scores, view, self.sinks)

    def _of_head(self, view: LayerView, sample: int, head: int, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the scores ``[m]`` of one KV head's columns ``[m]``, from the queries of rows ``[n]``."""
        group = view.queries.shape[1] // view.heads
        dtype = scoring.accumulation_dtype(view.keys)
        keys = view.keys[sample, head, columns].to(dtype) * view.scaling  # [m, D]
        own = slice(head * group, (head + 1) * group)
        queries = view.queries[sample, own][:, rows].to(dtype)  # [G, n, D]
        mean = queries.mean(1, keepdim=True)  # [G, 1, D]
        logits = (keys @ mean.mT).squeeze(-1)  # [G, m]
        if self.covariance:
            centered = queries - mean
            covariance = centered.mT @ centered / len(rows)  # [G, D, D]
            logits = logits + (keys @ covariance).mul_(keys).sum(-1) / 2
        weights = scoring.softmax_(logits).mean(0)  # [m]
        if not self.value_norm:
            return weights
        values = view.values[sample, head, columns]  # [m, D]
        lengths: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=dtype)  # [m]
        return (weights + self.epsilon) * lengths

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise PolicyOptionError(
                f"epsilon of policy {self.name!r} is added to attention, 0 or more, got {self.epsilon!r}"
            )
        if self.sinks < 0:
            raise PolicyOptionError(
                f"sinks of policy {self.name!r} is a number of first tokens, 0 or more, got {self.sinks}"
            )

    fidelity = "adapted"
    paper = "arXiv 2510.00636 (Expected Attention)"
    deviations = """
    Cross-attention has no rotary positions, so the average rotation over the next 512 positions, which the
    original applies to mean and covariance, has no counterpart. The original's queries and keys are those of
    one sequence, and the prompt holds thousands of them; here queries are those of the text rows alone, which
    may be few (four in Whisper). The first 4 rows and tokens count as any other (preset=kvpress leaves them
    out): rows before an image are not live anyway, and the first tokens of an image or a recording are not
    known to be attention sinks. The rule is that of the authors' code; of the paper only summaries were read.
    The runs that their library reports share budgets among heads; here each head keeps as many, unless
    `adakv` asks. The original also compresses during decoding.
    """
    differs = (
        "no rotary positions, queries of text rows only, and no first tokens are protected (preset=kvpress: "
        "4); the reported runs have epsilon=0.01 and share budgets among heads"
    )
    checked_against = (
        "same sets as the authors' NVIDIA/kvpress@8bb29b9 (ExpectedAttentionPress) at preset=kvpress and "
        "preset=published, with a rotation of angle 0"
    )
    cost = (
        "for each KV head of each layer that decides, the covariance of the queries and one product of keys "
        "with it; one pass over values; no attention weights; two host synchronisations for each sample and "
        "image"
    )
    bibtex = """
@article{expected2025,
  title = {Expected Attention: {KV} Cache Compression by Estimating Attention from Future Queries
           Distribution},
  author = {Devoto, Alessio and Jeblick, Maximilian and J{\\'e}gou, Simon},
  year = {2025},
  eprint = {2510.00636},
  archivePrefix = {arXiv},
}
"""
