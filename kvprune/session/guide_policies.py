"""The policies under which a guide runs, and the record of the attention that it pays to encoder tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.errors import GuideError
from kvprune.policy.base import CrossKVPolicy, Need
from kvprune.policy.moments import FeaturePolicy, FeatureScoringPolicy
from kvprune.policy.view import FeatureView, LayerView
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["AnswerRecord", "AttentionRecord", "MostImportant", "OwnImages", "PeakRecord"]

_NO_STATES = "the guide ran, but none of its cross-attention layers received encoder states"


@dataclass(frozen=True, kw_only=True)
class OwnImages(FeaturePolicy):
    """Drops, for each sample, the columns of images that only other samples of the batch have; nothing else.

    In stock transformers, text before an image attends to all columns, these included. Without them the guide
    computes for each sample what stock computes for that sample alone (KV10). Where all samples have the same
    number of images, the result is bit-identical to stock.
    """

    name = "guide"
    keeps_invisible = True

    def choose(self, view: FeatureView) -> Decision:
        """Drop the images that no row of a sample sees."""
        images = view.images.expand(view.batch, -1)  # [B, S], the image of each column
        seen = view.visible_in_prefill  # [B, S]
        # [B, S]; column i tells whether any row sees image i.
        shown = torch.zeros_like(images).scatter_add_(-1, images, seen.to(images.dtype)) > 0
        own = shown.gather(-1, images) | ~seen.any(-1, keepdim=True)
        return Decision() if bool(own.all()) else Decision(onward=Selection.from_mask(own[:, None]))


class AttentionRecord:
    """Adds up attention over layers and heads, separately for the rows of the prompt and of the answer."""

    def __init__(self, prompt_rows: int) -> None:
        self._prompt_rows = prompt_rows
        self._parts: list[tuple[Tensor, Tensor]] = []  # of prompt and answer: sums [R, S], rows [R]
        self._received: Selection | None = None

    def policy(self) -> CrossKVPolicy:
        """Return a policy that decides as `OwnImages` does and records the attention of each layer."""
        record = self

        @dataclass(frozen=True, kw_only=True)
        class Recorder(OwnImages):
            @property
            def needs(self) -> frozenset[Need]:
                return frozenset({"queries"})

            def choose(self, view: FeatureView) -> Decision:
                decision = super().choose(view)
                record._received = decision.received
                return decision

            def select(self, view: LayerView) -> Decision:
                record.add(view)
                return Decision()

        return Recorder()

    def add(self, view: LayerView) -> None:
        """Add the attention of one layer."""
        seeing = view.visibility.seeing  # [B, T], rows that see an image
        in_prompt = torch.arange(seeing.shape[1], device=seeing.device) < self._prompt_rows
        for part, rows in enumerate((seeing & in_prompt, seeing & ~in_prompt)):
            if part and seeing.shape[1] == self._prompt_rows:
                break
            mass = view.attention_mass(rows).sum(1)  # [B, Hq, S] -> [B, S]
            if part == len(self._parts):
                self._parts.append((mass, rows.sum(-1)))
            else:
                before, counted = self._parts[part]
                self._parts[part] = before + mass.to(before.device), counted

    def sums(self, batch: int, *, by_mean: bool) -> tuple[Tensor, Tensor]:
        """Return the scores ``[R, S]``, and the number of rows that were added up for each sample ``[R]``."""
        if not self._parts:
            raise GuideError(_NO_STATES)
        scores = [mass / rows.clamp(min=1)[:, None] if by_mean else mass for mass, rows in self._parts]
        total = torch.stack(scores).sum(0)
        return self._of_batch(total, torch.stack([rows for _, rows in self._parts]).sum(0), batch)

    def _of_batch(self, total: Tensor, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Return scores and numbers of rows for each row of the batch and for all columns."""
        copies = batch // len(total)  # rows of the batch that the guide held as one
        return self._spread(total, batch), rows.repeat_interleave(copies)

    def _spread(self, scores: Tensor, batch: int) -> Tensor:
        """Return scores ``[R, ..., S]`` of what the guide received for the whole batch and all columns."""
        copies = batch // len(scores)
        if self._received is not None:  # padding of a ragged batch has score 0
            everything = scores.new_zeros(*scores.shape[:-1], self._received.columns)
            index = self._received.indices[:, 0].to(scores.device)  # [R, K]
            index = index.reshape(len(index), *[1] * (scores.ndim - 2), -1).expand_as(scores)
            scores = everything.scatter_add_(-1, index, scores)
        return scores.repeat_interleave(copies, dim=0)


class AnswerRecord(AttentionRecord):
    """Adds up the attention of the rows that predict an answer: their mean over rows and query heads.

    Args:
        prompt_rows: Text rows T of the prompt.
        written: bool ``[R, n]``, which tokens belong to the answer.
    """

    def __init__(self, prompt_rows: int, written: Tensor) -> None:
        super().__init__(prompt_rows)
        before = written.new_zeros(len(written), prompt_rows - 1)
        self._predicting = torch.cat([before, written], dim=1)  # [R, T + n - 1]: row T - 1 predicts token 0

    def add(self, view: LayerView) -> None:
        """Add the attention of one layer."""
        seeing = view.visibility.seeing  # [R, T + n - 1]
        rows = seeing & self._predicting.to(seeing.device)
        counted = rows.sum(-1)  # [R]
        mean = view.attention_mass(rows).mean(1) / counted.clamp(min=1)[:, None]  # [R, Hq, S] -> [R, S]
        if self._parts:
            (before, counted), mean = self._parts[0], mean.to(self._parts[0][0].device)
            mean = before + mean
        self._parts = [(mean, counted)]

    def means(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the scores ``[R, S]``, and the number of rows over which the mean was taken ``[R]``."""
        if not self._parts:
            raise GuideError(_NO_STATES)
        (total, rows), *_ = self._parts
        return self._of_batch(total, rows, batch)


class PeakRecord(AttentionRecord):
    """Keeps the largest attention of each layer to each token, over all text rows, by KV head."""

    def __init__(self) -> None:
        super().__init__(0)
        self._peaks: list[Tensor] = []  # [R, Hkv, S] of each layer

    def add(self, view: LayerView) -> None:
        """Note one layer."""
        peak = view.attention_peak()  # [R, Hq, S]
        self._peaks.append(peak.unflatten(1, (view.heads, -1)).amax(2))

    def layers(self, batch: int) -> tuple[Tensor, ...]:
        """Return the peaks of each layer, ``[batch, Hkv, S]``."""
        if not self._peaks:
            raise GuideError(_NO_STATES)
        return tuple(self._spread(peak, batch) for peak in self._peaks)


@dataclass(frozen=True, kw_only=True)
class MostImportant(FeatureScoringPolicy):
    """Keeps only the tokens that the guide finds most important, from before the first layer on."""

    name = "guide-consistency"

    @property
    def needs(self) -> frozenset[Need]:
        """The guide's scores."""
        return frozenset({"guidance"})

    def score(self, view: FeatureView) -> Tensor:
        """Return the importance of each token, ``[B, 1, S]``."""
        return view.guidance[:, None]
