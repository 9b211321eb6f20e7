"""`quest`: in each decode step, read the pages of the cache whose bounds promise the highest logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvprune import Budget, DecodePolicy, HeldView, Selection, StepView
from kvprune.errors import PolicyOptionError
from kvprune.policy import BudgetPolicy, State


@dataclass(frozen=True, kw_only=True)
class Quest(BudgetPolicy, DecodePolicy):
    """Read in each decode step the pages whose keys could fit this step's queries best; keep everything.

    A page is a run of held entries. The largest and smallest key of a page in each channel bound the logit
    of any of its entries for a query. Pages are read whole, in the order of these bounds, until the budget is
    spent; the last one may be read in part, from its beginning.

    Args:
        keep_ratio: Fraction of visible tokens that a step reads, in (0, 1]; 0.5 if neither this nor
            keep_tokens is given. All tokens stay in the cache.
        keep_tokens: Number of visible tokens that a step reads, instead of a fraction.
        page: Entries of a page.
    """

    page: int = 16

    name = "quest"
    version = 1
    compiles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page < 1:
            raise PolicyOptionError(f"page of policy 'quest' is at least 1, got {self.page}")

    @property
    def exact_budget(self) -> Budget | None:
        """None: the budget says what a step reads, and the cache keeps everything."""
        return None

    def prepare(self, view: HeldView) -> State:
        """Return bounds of each page's keys ``[R, Hkv, P, D]``, and how much each sample reads ``[R]``."""
        counts = view.valid[:, 0].sum(-1).tolist()  # heads hold equally many
        ragged = min(counts) < view.entries
        most = torch.finfo(view.keys.dtype).max  # finite, because a query may be 0 in a channel

        def bounds(extreme: Callable[[Tensor, int], Tensor], worst: float) -> Tensor:
            keys = torch.where(view.valid[..., None], view.keys, worst) if ragged else view.keys
            whole = view.entries // self.page * self.page
            pages = [extreme(keys[:, :, :whole].unflatten(2, (-1, self.page)), 3)]  # [R, Hkv, P, D]
            if whole < view.entries:  # the last page is short
                pages.append(extreme(keys[:, :, whole:], 2)[:, :, None])
            return torch.cat(pages, dim=2)

        state = {"largest": bounds(torch.amax, -most), "smallest": bounds(torch.amin, most)}
        if ragged:
            state["limit"] = torch.tensor(self.budget.resolve_all(counts), device=view.keys.device)
        return state

    def attend(self, step: StepView, state: State) -> Selection | None:
        """Read the entries of the pages with the highest bounds."""
        count = self.budget.resolve(step.entries)
        if count == step.entries:
            return None
        queries = step.grouped_queries()  # [N, Hkv, g, D]
        # In each channel, the bound counts that gives the larger product.
        up = queries.clamp(min=0) @ state["largest"].to(queries).transpose(-1, -2)  # [N, Hkv, g, P]
        down = queries.clamp(max=0) @ state["smallest"].to(queries).transpose(-1, -2)
        bounds = (up + down).amax(2)  # [N, Hkv, P]: the query head that wants the page most
        return step.best_pages(bounds, self.page, count, state.get("limit"))

    fidelity = "adapted"
    paper = "arXiv 2406.10774 (Quest)"
    deviations = """
    Cross-attention adds no tokens while it decodes, so the bounds are computed once. A page is a run of 16
    held entries in column order (the authors' page size); a page may straddle rows of a picture. Query heads
    that share a KV head read the same pages, those that one of them wants most. The original leaves the first
    two layers whole; here each layer reads its budget. The last page may be read in part, so that the budget
    is exact; the original counts pages.
    """
    differs = (
        "heads of a group read the same pages; the last page may be read in part; no layer is left whole"
    )
    checked_against = "same tokens in a decode step as mit-han-lab/Quest@01c1623, for budgets of whole pages"
    cost = (
        "in each step, two products of queries and page bounds (an eighth of all keys at page=16), a sort of "
        "the pages, and a copy of what is read; the bounds take a sixteenth of the cache"
    )
    bibtex = """
@article{quest2024,
  title = {{QUEST}: Query-Aware Sparsity for Efficient Long-Context {LLM} Inference},
  author = {Tang, Jiaming and Zhao, Yilong and Zhu, Kan and Xiao, Guangxuan and Kasikci, Baris and Han, Song},
  year = {2024},
  eprint = {2406.10774},
  archivePrefix = {arXiv},
}
"""
