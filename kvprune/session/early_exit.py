"""Early exit: answers for which the guide is confident are taken as they are; the target answers the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kvprune.engine.guidance import Guidance, GuideReceipt, Prompt
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
    """The answers to a batch, and whether the guide or the target gave them.

    Args:
        answers: New tokens of each sample, int64 ``[n]``, up to the first end-of-sequence token.
        by_guide: For each sample, whether the guide's answer was taken.
        scores: Decision score of each sample: the mean, or product, of its confidence and its consistency.
        confidence: Geometric mean of the guide's highest probability at each token of its answer.
        consistency: Probability that the guide gives its answer when it receives few of the encoder tokens.
        guide: What the guide cost, for all samples together.
        report: Report of the target's compression, including the guide's cost; None if the target was not
            called.
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
    combine: Literal["mean", "product"] = "mean",
    seed: int = 0,
    reread: bool = False,
) -> GuidedAnswers:
    """Let a guide answer; call the target, under the guide's ranking, where the guide is not confident.

    The guide generates greedily. Its confidence is ``(prod_t max_v p_t(v)) ** (1 / n)`` over the n tokens of
    its answer. Its consistency is the probability of the same answer, ``(prod_t p'_t(y_t)) ** (1 / n)``, when
    only ``consistency_ratio`` of the visible tokens, the most important ones, reach the guide's first
    cross-attention layer. The target is called for samples whose score, made of the two, is below the
    threshold.

    The released code of SGL (arXiv 2412.03324) computes both numbers, but decides nothing by them: it always
    calls both models. Its consistency is the product over the answer (``length_normalised=False``). The
    geometric mean is our choice, because products go to zero for long answers. How the two make one score
    stands there only in lines that are commented out, as their mean and as their product (``combine``). No
    code or text that we could read names a threshold.

    Args:
        target: A supported model that can generate.
        inputs: Inputs of its ``generate``, as a processor makes them. Tensors ``[B, ...]`` are used;
            everything else is ignored.
        guide: Another model with the same vision geometry, or a `kvprune.Guide` with options. If the guide's
            own ``max_new_tokens`` is not 0, it limits the guide's answer.
        policy: Policy of the target; must use guidance.
        threshold: The guide's answer is taken if its score is at least this: 0 or less always takes it, more
            than 1 never.
        max_new_tokens: Most new tokens of an answer.
        consistency_ratio: Fraction of visible tokens that the guide receives for its consistency, in (0, 1].
        length_normalised: Whether the consistency is the geometric mean over the answer's tokens. False
            takes their product, as the released code does.
        combine: The score is the "mean" or the "product" of confidence and consistency.
        seed: Seed of policies that draw random numbers.
        reread: Whether the target reads the last prompt token again from its pruned cache, see
            `kvprune.compress`. The guide's passes never do.

    Raises:
        GuideError: If the guide cannot guide the target or cannot answer, the policy does not use it, or an
            option has a wrong value.
        BudgetError: If ``consistency_ratio`` is no fraction in (0, 1].
    """
    _require_limits(max_new_tokens, threshold)
    if combine not in ("mean", "product"):
        raise GuideError(f"combine is 'mean' or 'product', got {shown(combine)}")
    options = _answering(guide, max_new_tokens)
    chosen = get_policy(policy)
    compress(
        target, chosen, seed=seed, guide=options, reread=reread
    )  # raises here, before the guide spends time
    adapter = find_adapter(target)(target)
    prompt = Prompt({name: value for name, value in inputs.items() if isinstance(value, Tensor)})
    guidance = BoundGuide(options, adapter).ask(
        prompt, consistency_ratio=consistency_ratio, length_normalised=length_normalised
    )
    answers, confidence, consistency = _rated(guidance)
    both = torch.stack([confidence, consistency])  # [2, B]
    scores = both.mean(0) if combine == "mean" else both.prod(0)  # [B]
    by_guide: list[bool] = (scores >= threshold).tolist()
    asked = [sample for sample, taken in enumerate(by_guide) if not taken]
    report = None
    if asked:
        rows = torch.tensor(asked)
        with compress(target, chosen, seed=seed, guide=guidance.of(rows), reread=reread) as run:
            new, written = adapter.answer(_of_samples(prompt, rows), max_new_tokens)  # both [asked, n]
        report = run.report
        for sample, answer, flags in zip(asked, new, written, strict=True):
            answers[sample] = answer[flags]
    return GuidedAnswers(
        answers=tuple(answers),
        by_guide=tuple(by_guide),
        scores=tuple(scores.tolist()),
        confidence=tuple(confidence.tolist()),
        consistency=tuple(consistency.tolist()),
        guide=guidance.receipt,
        report=report,
    )


def _require_limits(max_new_tokens: object, threshold: object) -> None:
    """Raise GuideError unless the limit on answers is a positive int and the threshold a number."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise GuideError(f"max_new_tokens is a whole number, 1 or more, got {shown(max_new_tokens)}")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:  # NaN
        raise GuideError(f"threshold is a number, such as 0.8, got {shown(threshold)}")


def _answering(guide: nn.Module | Guide, max_new_tokens: int) -> Guide:
    """Return the guide with its options; its answer has the given limit if it states none."""
    options = guide if isinstance(guide, Guide) else Guide(guide)
    return options if options.max_new_tokens else replace(options, max_new_tokens=max_new_tokens)


def _rated(guidance: Guidance) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return a guide's answers, int64 ``[n]`` each, with their confidence and consistency, ``[B]``."""
    assert guidance.answer is not None  # [B, n]
    assert guidance.written is not None  # bool [B, n]
    assert guidance.confidence is not None
    assert guidance.consistency is not None
    answers = [row[flags] for row, flags in zip(guidance.answer, guidance.written, strict=True)]
    return answers, guidance.confidence, guidance.consistency


def _of_samples(prompt: Prompt, rows: Tensor) -> Prompt:
    """Return the prompt of some of its samples; ``rows`` is int64 ``[samples]``."""
    return Prompt({name: value[rows.to(value.device)] for name, value in prompt.arguments.items()})
