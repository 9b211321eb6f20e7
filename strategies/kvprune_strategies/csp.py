"""`csp`: Cross-Self Pruning, one quota for image tokens and one for text entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

import torch
from torch import Tensor

from kvprune import Budget, BudgetPolicy, Decision, LayerView, Selection, TextView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class CSP(BudgetPolicy):
    """Keep, by KV head, the image tokens and the text entries that the end of the prompt attends to most.

    Image tokens compete in each cross-attention layer and text entries in each self-attention layer, so
    neither crowds out the other. A score is the sum of softmax weights over the window's rows, where each
    softmax has null keys of logit zero as well ("n-softmax"). Scores only choose; attention does not change.

    The published runs prune both (preset=published: total_ratio=0.2, cross_share=0.25). The defaults leave
    text whole, because no other policy prunes it and not all models allow it; they keep what
    `snapkv:pool=none,window=16` keeps, except that null keys give rows of low logits less weight.

    Args:
        keep_ratio: Fraction of visible image tokens kept, in (0, 1]; 0.5 if no budget is given. It does not
            count text, as in every other policy, so policies are comparable at one keep_ratio.
        keep_tokens: Number of visible image tokens kept, instead of a fraction.
        text_keep: Fraction of text entries kept, in (0, 1]; all of them by default.
        total_ratio: One budget for images and text, instead of the three above: this fraction of all their
            entries, over all layers.
        cross_share: Which part of total_ratio goes to images, in [0, 1]. What one of the two cannot hold goes
            to the other, and a warning says so. The published cross_ratio c is a part of what the recent
            entries leave, which is half of the budget there: c = 0.5, in most of its settings, is 0.25 here.
        window: Number of last text rows that count; a tenth of the prompt in the published runs.
        recent: Number of last text entries that stay whatever their scores, at least 1; a tenth of the prompt
            in the published runs.
        null_keys: Number n of null keys in each row of the n-softmax; 0 is plain softmax.
    """

    text_keep: float = 1.0
    total_ratio: float | None = None
    cross_share: float = 0.5
    window: int = 16
    recent: int = 4
    null_keys: float = 1.0

    name = "csp"
    version = 1
    budget_alternatives = ("total_ratio",)
    presets = MappingProxyType({"published": {"total_ratio": 0.2, "cross_share": 0.25}})

    def select(self, view: LayerView) -> Decision:
        """Keep the image tokens with the highest scores in each KV head."""
        strata = view.decode_strata  # [B, S], only what decoding can see
        rows = scoring.last_rows(view.visibility, self.window, strata == 0)  # [B, T]
        mass = view.attention_mass(rows, null_keys=self.null_keys)  # [B, Hq, S]
        scores = mass.unflatten(1, (view.heads, -1)).sum(2)  # [B, Hkv, S]
        note = ""
        if self.total_ratio is None:
            limit = scoring.limits(self.budget, strata)  # [B, S]
        else:
            text = view.text
            counts, note = self._shares(
                view.visible.sum(-1), view.num_layers, text.real.sum(-1), text.num_layers, cross=True
            )
            # A sample without an image attends to everything; one token stays.
            limit = torch.where(strata < 0, 0, counts.clamp(min=1)[:, None])  # [B, S]
        kept = scoring.keep_top(scores, strata, limit, view.visibility)
        return Decision(cache=Selection.from_mask(kept), note=note)

    def select_text(self, view: TextView) -> Selection:
        """Keep the last text entries, and those with the highest scores in each KV head."""
        real, available = view.real, view.real.sum(-1)  # [B, Tk], [B]
        if self.total_ratio is None:
            budget = Budget(keep_ratio=self.text_keep)
            counts = torch.tensor(budget.resolve_all(available.tolist()), device=view.device)
        else:
            counts, _ = self._shares(
                view.image_tokens, view.cross_layers, available, view.num_layers, cross=False
            )
        rows = _last(view.real_rows, self.window)  # [B, T]
        mass = view.attention_mass(rows, null_keys=self.null_keys)  # [B, Hq, Tk]
        scores = mass.unflatten(1, (view.heads, -1)).sum(2)  # [B, Hkv, Tk]
        recent = _last(real, counts.clamp(max=self.recent)[:, None])[:, None].expand_as(scores)
        ranks = scoring.rank_within(scores, torch.where(real, 0, -1), recent)  # [B, Hkv, Tk]
        kept = (ranks < counts[:, None, None]) & real[:, None]  # [B, Hkv, Tk]
        kept[..., -1] |= ~real.any(-1, keepdim=True)  # a sample of padding only
        return Selection.from_mask(kept)

    def _shares(
        self, images: Tensor, cross_layers: int, texts: Tensor, text_layers: int, *, cross: bool
    ) -> tuple[Tensor, str]:
        """Return how many entries of each sample a layer keeps, int64 ``[B]``, and a note for the user.

        Args:
            images: int64 ``[B]``, image tokens that decoding sees.
            cross_layers: Number of cross-attention layers.
            texts: int64 ``[B]``, text entries.
            text_layers: Number of self-attention layers.
            cross: Whether the layer is a cross-attention layer.
        """
        shares, notes = [], []
        for image, text in zip(images.tolist(), texts.tolist(), strict=True):
            share, note = self.split(image, cross_layers, text, text_layers)
            shares.append(share[0 if cross else 1])
            notes += [note] if note else []
        return torch.tensor(shares, device=images.device), "; ".join(dict.fromkeys(notes))

    def split(
        self, image: int, cross_layers: int, text: int, text_layers: int
    ) -> tuple[tuple[int, int], str]:
        """Return how many entries each cross-attention and each self-attention layer keeps, and a note.

        Args:
            image: Image tokens that decoding sees.
            cross_layers: Number of cross-attention layers.
            text: Text entries.
            text_layers: Number of self-attention layers.
        """
        part, share = Fraction(str(self.total_ratio)), Fraction(str(self.cross_share))
        total = math.ceil(part * (cross_layers * image + text_layers * text))
        wanted = math.ceil(share * total / cross_layers)
        cross = min(image, max(1, wanted))
        free = (total - cross_layers * cross) // text_layers
        own = min(text, max(min(text, self.recent), free))
        if own != free:  # text cannot hold its share, or must hold more; the rest is that of images
            cross = min(image, max(1, (total - text_layers * own) // cross_layers))
        if not image or cross == wanted:
            return (cross, own), ""
        if cross < wanted:
            return (cross, own), "csp: images cannot have all of their share; text keeps what is left of it"
        if wanted == 0 and cross == 1:
            return (cross, own), "csp: images have no share, and keep one token in each layer and head"
        return (cross, own), "csp: text cannot hold all of its share; images keep what is left of it"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_ratio is not None and self.text_keep != 1.0:
            raise PolicyOptionError(
                f"policy {self.name!r} takes either total_ratio (and cross_share), or keep_ratio, "
                f"keep_tokens and text_keep; got {self.spec}"
            )
        for name, fits, allowed in (
            ("text_keep", 0 < self.text_keep <= 1, "in (0, 1]"),
            ("cross_share", 0 <= self.cross_share <= 1, "in [0, 1]"),
            ("window", self.window >= 1, "at least 1"),
            ("recent", self.recent >= 1, "at least 1"),
            ("null_keys", self.null_keys >= 0, "at least 0"),
        ):
            if not fits:
                raise PolicyOptionError(
                    f"{name} of policy {self.name!r} is {allowed}, got {getattr(self, name)!r}"
                )

    @property
    def needs(self) -> frozenset[Need]:
        """Queries; the text's cache if text is pruned, and the text itself if both share one budget."""
        if self.total_ratio is not None:
            return frozenset({"queries", "text", "text_cache"})
        return frozenset({"queries"}) if self.text_keep == 1.0 else frozenset({"queries", "text_cache"})

    @property
    def requested(self) -> dict[str, float | int]:
        """The budget, and its share for images or the one for text."""
        if self.total_ratio is not None:
            return {"total_ratio": self.total_ratio, "cross_share": self.cross_share}
        text = {} if self.text_keep == 1.0 else {"text_keep": self.text_keep}
        return {**super().requested, **text}

    fidelity = "adapted"
    paper = "arXiv 2412.04652 (Cross-Self Pruning)"
    deviations = """
    The queries of cross-attention are text, so all rows of the window are text. The published window and
    recent part are fractions of a prompt that contains the image's tokens; here they are numbers, also at
    preset=published. Text and image have a softmax each here, and share one there. The published code stores
    what both quotas choose twice; here there are two different caches. At cross_ratio 0 the published code
    keeps 1 image token and 308 text tokens, whatever the budget. Budgets are rounded exactly. Each quota
    keeps at least one entry in each layer. Query heads that share a KV head are summed. Prompts without an
    image are not compressed; in a batch with other prompts, their text is.
    """
    differs = (
        "by default the text half is off (as snapkv:pool=none,window=16); the window and recent are numbers"
    )
    checked_against = (
        "same sets as TerryPei/CSP@1c52eef (New_LayerWise), image and text, at preset=published with the "
        "window and recent part of its prompts"
    )
    cost = (
        "the window's product of queries and keys in each cross-attention layer, and in each self-attention "
        "layer if text is pruned; at most 16 MiB alive; a few host synchronisations for each layer and sample"
    )
    bibtex = """
@article{csp2024,
  title = {Cross-Self {KV} Cache Pruning for Efficient Vision-Language Inference},
  author = {Pei, Xiaohuan and others},
  year = {2024},
  eprint = {2412.04652},
  archivePrefix = {arXiv},
}
"""


def _last(flags: Tensor, count: int | Tensor) -> Tensor:
    """Mark the last ``count`` true ones of each row, bool ``[B, T]``."""
    return flags & (flags.flip(-1).cumsum(-1).flip(-1) <= count)
