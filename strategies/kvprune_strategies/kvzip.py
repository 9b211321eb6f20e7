"""`kvzip`: the attention that reconstructing the encoder's input pays (KVzip)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvprune import BudgetPolicy, Decision, LayerView, Selection, scoring
from kvprune.policy import PrefillPolicy, Reconstruction, check_scores


@dataclass(frozen=True, kw_only=True)
class KVzip(BudgetPolicy, PrefillPolicy):
    """Keep the tokens that the model needs most to write down what the encoder has read.

    The decoder reads a text of the encoder's input, with the full cache. A pair of key and value scores the
    largest attention weight that it receives in this pass, over all rows and the query heads of its KV head.
    The question plays no part: two questions about one picture keep the same tokens.

    The text of a text encoder is its own tokens, which the decoder reads after its start token. For pictures
    and sounds there is no such text, so the model first writes one greedily: Whisper a transcript in the
    language that it detects, Mllama a description after ``prompt_ids``. What such a text leaves out scores
    low. A transcript is what Whisper is mostly asked for, so one transcription gains nothing: it was made
    before, with the full cache. The method pays where a cache is asked many times.

    Args:
        share: Among whom a budget of C tokens per head is shared. "model": the heads of all layers, as
            published. "layer": the heads of each layer. "head": each head keeps C, the uniform variant of
            the authors' code.
        prompt_ids: Token ids with spaces between them, after which the text follows. For Mllama a request to
            describe the picture: without an image token among them, one for each picture and the start of
            text come first, and without any ids the model writes what it writes unprompted. For others they
            follow the start token; with any, Whisper detects no language.
        max_new_tokens: Most tokens of a text that the model writes. If one is cut, the report warns.
    """

    share: Literal["model", "layer", "head"] = "model"
    prompt_ids: str = ""
    max_new_tokens: int = 128

    name = "kvzip"
    version = 1
    needs = frozenset({"reconstruction"})

    @property
    def reconstructs_from(self) -> Reconstruction:
        """Which text the decoder reads."""
        return Reconstruction.parse(self.prompt_ids, self.max_new_tokens)

    @property
    def budget_scope(self) -> Literal["head", "layer", "model"]:  # type: ignore[override]
        """Over what the budget is exact."""
        return self.share

    def observe(self, view: LayerView) -> Tensor:
        """Return the scores of one layer, ``[B, Hkv, S]``."""
        return check_scores(view.reconstruction, view, view.decode_strata, self.name)

    def conclude(self, views: Sequence[LayerView], observed: Sequence[Tensor]) -> list[Decision]:
        """Share the budget, and keep the best tokens of each head."""
        together = len(views) if self.share == "model" else 1  # layers that share
        decisions = []
        for first in range(0, len(views), together):
            chosen = slice(first, first + together)
            decisions += self._keep(views[chosen], observed[chosen])
        return decisions

    def _keep(self, views: Sequence[LayerView], observed: Sequence[Tensor]) -> list[Decision]:
        """Decide about layers whose heads share one budget."""
        device = views[0].device
        visible, least, urgency = [], [], []
        for view, scores in zip(views, observed, strict=True):
            strata, heads = view.decode_strata, view.heads
            visible.append((strata == 0).sum(-1, keepdim=True).expand(-1, heads).to(device))
            groups = scoring.group_counts(strata, view.visibility)[:, None]
            least.append(groups.expand(-1, heads).to(device))
            urgency.append(scoring.in_keeping_order(scores, strata, view.visibility).to(device))
        most = torch.cat(visible, dim=1)  # [B, L * Hkv]
        counts = scoring.each(self.budget.resolve, most)  # [B, L * Hkv], C
        if self.share != "head":
            total = counts.sum(-1)  # [B]
            counts = scoring.apportion(torch.cat(urgency, dim=1), torch.cat(least, dim=1), most, total)
        decisions = []
        widths = [view.heads for view in views]
        for view, scores, own in zip(views, observed, counts.split(widths, dim=1), strict=True):
            limit = own.to(scores.device)[..., None].expand_as(scores)  # [B, Hkv, S]
            kept = scoring.keep_top(scores, view.decode_strata, limit, view.visibility)
            decisions.append(Decision(cache=Selection.from_mask(kept)))
        return decisions

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reconstructs_from  # noqa: B018  raises on a wrong option

    fidelity = "adapted"
    paper = "arXiv 2505.23416 (KVzip)"
    deviations = """
    The published method asks a language model to repeat its context, and lets it read the context again after
    that request. In cross-attention, encoder tokens are the context. Text encoders: their own tokens follow
    the decoder's start token without a request, because models such as BART take none. Pictures and sounds
    have no text, so the model writes one itself, which the published method never does; scores then depend on
    what this text mentions. Refused are encoders that read the question, too, and decoders that cannot write
    the text. The published softmax runs over a chunk of 2048 tokens of the context, the system prompt and the
    repeated text; here it runs over all encoder tokens, and the repeated text is in self-attention. Texts are
    not cut into chunks, so a text longer than the decoder's positions is refused. The last token of the text
    is predicted and not read. The published threshold keeps one pair less than the ratio says, and no tied
    ones; here the number is exact, and ties go to earlier tokens of a head. Scores that agree to five digits
    count as equal when heads share. The best token of each image stays in each head.
    """
    differs = (
        "the text is the encoder's own tokens without a request to repeat them, or for pictures and sounds "
        "one that the model writes; softmax over encoder tokens alone"
    )
    checked_against = (
        "same sets as the authors' snu-mllab/KVzip@5d84729 and NVIDIA/kvpress@8bb29b9 (KVzipPress), given "
        "the queries of the pass, where each head keeps some"
    )
    cost = (
        "for pictures and sounds one generation with the full cache; then one forward call over the text, "
        "and one product of queries and keys in each of its cross-attention layers; scores of all layers "
        "until the last has attended, when L * Hkv * S numbers are sorted"
    )
    bibtex = """
@article{kvzip2025,
  title = {{KVzip}: Query-Agnostic {KV} Cache Compression with Context Reconstruction},
  author = {Kim, Jang-Hyun and Kim, Jinuk and Kwon, Sangwoo and Lee, Jae W. and Yun, Sangdoo and
            Song, Hyun Oh},
  year = {2025},
  eprint = {2505.23416},
  archivePrefix = {arXiv},
}
"""
