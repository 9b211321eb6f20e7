"""`csp`: one quota for what the text attends to in the image, one for what it attends to in itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from kvprune import Budget, CrossKVPolicy, Decision, LayerView, Selection, TextView, scoring
from kvprune.errors import PolicyOptionError
from kvprune.policy import Need


@dataclass(frozen=True, kw_only=True)
class CSP(CrossKVPolicy):
    """Keep, by KV head, the image tokens and the text entries that the end of the prompt attends to most.

    Image tokens compete in each cross-attention layer, text entries in each self-attention layer, so neither
    crowds out the other. Scores are sums over the window's rows of softmax weights with a null key beside
    the others ("n-softmax"); they only choose, attention itself stays what it is.

    Args:
        keep_ratio: Fraction of visible image tokens kept, in (0, 1]; 0.5 if nothing else is given. As with
            every other policy, so that comparisons at one keep_ratio compare like with like.
        keep_tokens: Number of visible image tokens kept, instead of a fraction.
        text_keep: Fraction of text entries kept, in (0, 1]; all of them by default.
        total_ratio: Instead of the three above, one budget for both: this fraction of all entries of image
            and text, over all layers.
        cross_share: What part of total_ratio goes to images, in [0, 1]; 0.5 in most of the published
            settings. What one of the two cannot hold goes to the other, and a warning says so.
        window: Number of last text rows that count.
        recent: Number of last text entries that stay whatever their scores, at least 1.
        null_keys: How many null keys there are in each row (n of the n-softmax); 0 is plain softmax.

    Deviations: image tokens never ask in cross-attention, so rows of the window are text; the published
    window and recent part are fractions of a prompt in which the image's tokens stand, here they are
    numbers. The published code stores twice what both quotas choose; here they are different caches.
    Budgets are rounded exactly, each pool keeps at least one entry in each layer, and heads that share a KV
    head add up. Prompts without an image are not compressed; in a batch with others, their text is.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    text_keep: float = 1.0
    total_ratio: float | None = None
    cross_share: float = 0.5
    window: int = 16
    recent: int = 4
    null_keys: float = 1.0

    name: ClassVar[str] = "csp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "arXiv 2412.04652 (Cross-Self Pruning)"
    bibtex: ClassVar[str] = """
@article{csp2024,
  title = {Cross-Self {KV} Cache Pruning for Efficient Vision-Language Inference},
  author = {Pei, Xiaohuan and others},
  year = {2024},
  eprint = {2412.04652},
  archivePrefix = {arXiv},
}
"""
    fidelity: ClassVar[str] = "adapted"
    cost: ClassVar[str] = (
        "the window's product of queries and keys in each cross-attention layer, and in each self-attention "
        "layer if text is pruned; at most 16 MiB alive; a few host synchronisations for each layer and sample"
    )
    ranks_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        apart = self.keep_ratio is not None or self.keep_tokens is not None
        if self.total_ratio is None and not apart:
            object.__setattr__(self, "keep_ratio", 0.5)
        super().__post_init__()
        if self.total_ratio is None:
            self.exact_budget  # noqa: B018  raises on an impossible budget
        elif apart or self.text_keep != 1.0:
            raise PolicyOptionError(
                f"policy {self.name!r} takes either total_ratio (and cross_share), or keep_ratio, "
                f"keep_tokens and text_keep; got {self.spec}"
            )
        for name, value, least in (
            ("text_keep", self.text_keep, None),
            ("total_ratio", self.total_ratio, None),
            ("cross_share", self.cross_share, 0),
            ("window", self.window, 1),
            ("recent", self.recent, 1),
            ("null_keys", self.null_keys, 0),
        ):
            if value is None:
                continue
            most = math.inf if name in ("window", "recent", "null_keys") else 1
            if not (0 < value <= most if least is None else least <= value <= most) or value == math.inf:
                allowed = "in (0, 1]" if least is None else "in [0, 1]" if most == 1 else f"at least {least}"
                raise PolicyOptionError(f"{name} of policy {self.name!r} is {allowed}, got {value!r}")

    @property
    def needs(self) -> frozenset[Need]:
        """Queries; text and its cache only if text is pruned."""
        if self.total_ratio is not None:
            return frozenset({"queries", "text", "text_cache"})
        return frozenset({"queries"}) if self.text_keep == 1.0 else frozenset({"queries", "text_cache"})

    @property
    def exact_budget(self) -> Budget | None:
        """The budget for image tokens; none where it depends on how much text there is."""
        if self.total_ratio is not None:
            return None
        return Budget(keep_ratio=self.keep_ratio, keep_tokens=self.keep_tokens)

    @property
    def requested(self) -> dict[str, float | int]:
        """What the options ask to keep."""
        if self.total_ratio is not None:
            return {"total_ratio": self.total_ratio, "cross_share": self.cross_share}
        text = {} if self.text_keep == 1.0 else {"text_keep": self.text_keep}
        return {**super().requested, **text}

    def select(self, view: LayerView) -> Decision:
        """Keep the image tokens with the highest scores in each KV head."""
        strata = view.decode_strata  # only what decoding can see
        rows = scoring.last_rows(view.visibility, self.window, strata == 0)
        scores = _by_kv_head(view.attention_mass(rows, null_keys=self.null_keys), view.heads)
        budget = self.exact_budget
        note = ""
        if budget is not None:
            limit = scoring.limits(budget, strata)
        else:
            text = view.text
            counts, note = self._shares(
                view.visible.sum(-1), view.num_layers, text.real.sum(-1), text.num_layers, cross=True
            )
            # A sample without an image attends to all there is; one token of it stays.
            limit = torch.where(strata < 0, 0, counts.clamp(min=1)[:, None])
        kept = scoring.keep_top(scores, strata, limit, view.visibility)
        return Decision(cache=Selection.from_mask(kept), note=note)

    def select_text(self, view: TextView) -> Selection:
        """Keep the last text entries, and those with the highest scores in each KV head."""
        real, available = view.real, view.real.sum(-1)
        if self.total_ratio is None:
            budget = Budget(keep_ratio=self.text_keep)
            counts = torch.tensor(budget.resolve_all(available.tolist()), device=view.device)
        else:
            counts, _ = self._shares(
                view.image_tokens, view.cross_layers, available, view.num_layers, cross=False
            )
        scores = _by_kv_head(
            view.attention_mass(_last(view.real_rows, self.window), null_keys=self.null_keys), view.heads
        )
        recent = _last(real, counts.clamp(max=self.recent)[:, None])[:, None].expand_as(scores)
        ranks = scoring.rank_within(scores, torch.where(real, 0, -1), recent)
        kept = (ranks < counts[:, None, None]) & real[:, None]
        kept[..., -1] |= ~real.any(-1, keepdim=True)
        return Selection.from_mask(kept)

    def _shares(
        self, images: Tensor, cross_layers: int, texts: Tensor, text_layers: int, *, cross: bool
    ) -> tuple[Tensor, str]:
        """Return how many entries each layer of one kind keeps of each sample ``[B]``, and a note."""
        shares, notes = [], []
        for image, text in zip(images.tolist(), texts.tolist(), strict=True):
            share, note = self.split(image, cross_layers, text, text_layers)
            shares.append(share[0 if cross else 1])
            notes += [note] if note else []
        return torch.tensor(shares, device=images.device), "; ".join(dict.fromkeys(notes))

    def split(
        self, image: int, cross_layers: int, text: int, text_layers: int
    ) -> tuple[tuple[int, int], str]:
        """Return what each cross-attention and each self-attention layer keeps, and what to say about it.

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
        if own != free:  # what text cannot hold goes to images; what it must hold, they give
            cross = min(image, max(1, (total - text_layers * own) // cross_layers))
        if not image or cross == wanted:
            return (cross, own), ""
        if cross < wanted:
            return (cross, own), "csp: images cannot have all of their share; text keeps what is left of it"
        if wanted == 0 and cross == 1:
            return (cross, own), "csp: images have no share, and keep one token in each layer and head"
        return (cross, own), "csp: text cannot hold all of its share; images keep what is left of it"


def _by_kv_head(mass: Tensor, kv_heads: int) -> Tensor:
    """Add up query heads that share a KV head, ``[B, Hq, S]`` to ``[B, Hkv, S]``."""
    return rearrange(mass, "b (h g) s -> b h g s", h=kv_heads).sum(2)


def _last(flags: Tensor, count: int | Tensor) -> Tensor:
    """Mark the last ``count`` true ones of each row, bool ``[B, T]``."""
    return flags & (flags.flip(-1).cumsum(-1).flip(-1) <= count)
