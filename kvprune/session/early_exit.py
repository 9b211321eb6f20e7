"""Early exit: where the guide is sure of its answer, the target is not called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.engine.guidance import GuideReceipt, Prompt
from kvprune.engine.report import CompressionReport
from kvprune.errors import GuideError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.spec import PolicySpec
from kvprune.session.compression import compress
from kvprune.session.guide import BoundGuide, Guide
from kvprune.session.registry import find_adapter, get_policy
from kvprune.text import shown

__all__ = ["GuidedAnswers", "guided_generate"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GuidedAnswers:
    """The answers to a batch, and whose they are.

    Args:
        answers: New tokens of each sample, int64 ``[n]``, up to the first end of sequence.
        by_guide: Whether the guide's answer was taken, by sample.
        scores: The decision score of each sample, the mean of the next two.
        confidence: Geometric mean of the guide's highest probability at each token of its answer.
        consistency: Probability of the guide's answer when it receives few of the encoder tokens.
        guide: What the guide cost, for all samples.
        report: Of the target's compression; None if the target was not called. It includes the guide's cost.
    """

    answers: tuple[Tensor, ...]
    by_guide: tuple[bool, ...]
    scores: tuple[float, ...]
    confidence: tuple[float, ...]
    consistency: tuple[float, ...]
    guide: GuideReceipt
    report: CompressionReport | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "answers": [answer.tolist() for answer in self.answers],
            "by_guide": list(self.by_guide),
            "scores": list(self.scores),
            "confidence": list(self.confidence),
            "consistency": list(self.consistency),
            "guide": self.guide.to_dict(),
            "report": None if self.report is None else self.report.to_dict(),
        }


def guided_generate(
    target: nn.Module,
    inputs: Mapping[str, Any],
    *,
    guide: nn.Module | Guide,
    policy: str | PolicySpec | CrossKVPolicy = "guided",
    threshold: float,
    max_new_tokens: int,
    consistency_ratio: float = 0.05,
    length_normalised: bool = True,
    seed: int = 0,
) -> GuidedAnswers:
    """Let a guide answer, and call the target, under the guide's ranking, where the guide is not sure.

    The guide generates greedily. Its confidence is ``(prod_t max_v p_t(v)) ** (1 / n)`` over the n tokens of
    its answer. Its consistency is the probability of the same answer, ``(prod_t p'_t(y_t)) ** (1 / n)``, when
    only ``consistency_ratio`` of the visible tokens, the most important ones, reach the guide's first
    cross-attention layer. The target is called for samples whose mean of the two is below the threshold.

    Args:
        target: A supported model that generates.
        inputs: Of its ``generate``, as a processor makes them: tensors ``[B, ...]``; all else is left out.
        guide: Another model of the same vision geometry, or `kvprune.Guide` with options, whose
            ``max_new_tokens`` is the limit of the guide's answer if it is not 0.
        policy: Of the target; must use guidance.
        threshold: Mean score from which on the guide's answer is taken: 0 or less always takes it, and more
            than 1 never.
        max_new_tokens: Limit of answers.
        consistency_ratio: See above.
        length_normalised: False takes the product over the answer instead of the geometric mean, which goes
            to zero for long answers.
        seed: For policies that draw random numbers.

    Raises:
        GuideError: If the guide cannot guide the target, or cannot answer; or the policy does not use it.
        BudgetError: If ``consistency_ratio`` is no fraction in (0, 1].
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise GuideError(f"max_new_tokens is a whole number, 1 or more, got {shown(max_new_tokens)}")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:
        raise GuideError(f"threshold is a number, such as 0.8, got {shown(threshold)}")
    options = guide if isinstance(guide, Guide) else Guide(guide)
    if not options.max_new_tokens:
        options = Guide(options.model, max_new_tokens=max_new_tokens, row_mean=options.row_mean)
    chosen = get_policy(policy)
    compress(target, chosen, seed=seed, guide=options)  # refuses what cannot be, before anything runs
    adapter = find_adapter(target)(target)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    guidance = BoundGuide(options, adapter).ask(
        Prompt(tensors), consistency_ratio=consistency_ratio, length_normalised=length_normalised
    )
    assert guidance.answer is not None
    assert guidance.written is not None
    assert guidance.confidence is not None
    assert guidance.consistency is not None
    scores = (guidance.confidence + guidance.consistency) / 2
    by_guide: list[bool] = (scores >= threshold).tolist()
    answers = [row[flags] for row, flags in zip(guidance.answer, guidance.written, strict=True)]
    asked = [sample for sample, taken in enumerate(by_guide) if not taken]
    report = None
    if asked:
        rows = torch.tensor(asked)
        rest = Prompt({name: value[rows.to(value.device)] for name, value in tensors.items()})
        with compress(target, chosen, seed=seed, guide=guidance.of(rows)) as run:
            new, written = adapter.answer(rest, max_new_tokens)
        report = run.report
        for sample, answer, flags in zip(asked, new, written, strict=True):
            answers[sample] = answer[flags]
    return GuidedAnswers(
        answers=tuple(answers),
        by_guide=tuple(by_guide),
        scores=tuple(scores.tolist()),
        confidence=tuple(guidance.confidence.tolist()),
        consistency=tuple(guidance.consistency.tolist()),
        guide=guidance.receipt,
        report=report,
    )
