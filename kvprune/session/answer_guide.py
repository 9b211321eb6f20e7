"""Attention to the encoder by the rows that predict a known answer: a reference for policies, no method.

A method must choose tokens before the answer is known. To see how much a perfect look at the answer would
help, `answer_attention` reads the answer that a model gave with the full cache, and ranks the encoder tokens
by the attention of the rows that predicted it. Policies with ``reads_answer``, such as ``answer-attention``,
take this ranking; all others refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.base import ModelAdapter
from kvprune.engine.guidance import Guidance, GuideReceipt, Prompt
from kvprune.engine.measurement import Stopwatch
from kvprune.errors import GuideError
from kvprune.policy.base import CrossKVPolicy, Need
from kvprune.policy.moments import FeaturePolicy
from kvprune.policy.nesting import parts
from kvprune.policy.view import FeatureView
from kvprune.session.guide import BoundGuide, Guide, Passes, attended_tokens
from kvprune.session.guide_policies import AnswerRecord
from kvprune.session.registry import find_adapter
from kvprune.text import shown
from kvprune.tokens.decision import Decision

__all__ = ["AnswerGuide", "answer_attention", "bound_guide", "require_matching_guide"]


def answer_attention(
    model: nn.Module, inputs: Mapping[str, Any], answer: Tensor, written: Tensor
) -> Guidance:
    """Rank the encoder tokens of a batch by the attention of the rows that predict a known answer.

    The answer is teacher-forced: one forward call reads prompt and answer, and nothing is pruned. The score
    of encoder token j is ``sum over cross-attention layers of the mean over rows and query heads of
    A[layer, head, row, j]``, where A holds softmax attention weights. The last row of the prompt predicts the
    first token of the answer, and each token of the answer but the last one predicts the next. All of these
    rows count, and no other. One ranking serves all layers and heads, and every budget.

    To learn what the decoder's prompt is, the model first generates one token from the inputs, without a
    cache. The receipt counts this call, too. A Whisper that must detect the language makes one more.

    Args:
        model: A supported model that can generate, not compressed at the moment.
        inputs: What was passed to ``generate``: tensors, and options such as ``language`` of Whisper.
        answer: int64 ``[B, n]``, the new tokens of greedy decoding under the full cache, without the prompt.
        written: bool ``[B, n]``, true for the tokens of each answer, which come first; the rest is padding.
            An end-of-sequence token that the model generated is a part of its answer. (Whisper's ``generate``
            cuts it off; append it where the model stopped by itself.)

    Returns:
        Guidance for this batch, to pass to ``kvprune.compress`` as ``guide``.

    Raises:
        GuideError: If answer or written do not fit the inputs, the model cannot generate, or the inputs are
            read in several parts, such as sounds that are longer than Whisper's window.
        NestedCompressionError: If the model is being compressed.
        UnsupportedModelError, IncompatibleTransformersError: As `kvprune.compress` raises them.
    """
    kind = find_adapter(model)
    kind.require_probes()
    guide = AnswerGuide(kind(model), answer, written)
    if answer.ndim != 2:
        raise GuideError(f"answer is int64 [B, n], one row for each sample, got shape {list(answer.shape)}")
    prompt, receipt = guide.prompt_of(inputs)
    guidance = guide.ask(prompt)
    return replace(guidance, receipt=guidance.receipt.plus(receipt))


class AnswerGuide(BoundGuide):
    """Ranks the encoder tokens of a model's prompts by the attention of the rows that predict a given answer.

    Args:
        target: Adapter of the model; may be attached.
        answer: int64 ``[R, n]``, the answer to each prompt of a batch; or ``[n]``, the same for all prompts.
        written: bool, of the same shape: which tokens belong to the answer. None for all of them.

    Raises:
        GuideError: If answer or written have another shape or type, or an answer has no token.
    """

    def __init__(self, target: ModelAdapter, answer: Tensor, written: Tensor | None = None) -> None:
        super().__init__(Guide(), target)
        self._answer, self._written = _checked(answer, written)

    def _ask(
        self, prompt: Prompt, few: CrossKVPolicy | None, passes: Passes, *, length_normalised: bool
    ) -> Guidance:
        """Run prompt and answer once, and add up the attention of the rows that predict the answer."""
        rows, device = len(prompt.text), prompt.text.device
        answer, written = self._answer.to(device), self._written.to(device)
        if answer.ndim == 1:
            answer, written = answer.expand(rows, -1), written.expand(rows, -1)
        if len(answer) != rows:
            raise GuideError(f"there are answers to {len(answer)} prompts, but the model was given {rows}")
        record = AnswerRecord(prompt.text.shape[1], written)
        with self._under(record.policy()) as manager:
            self._adapter.replay(prompt, answer, written)
        passes.add(manager, written)
        passes.receipt = replace(passes.receipt, saw_answer=True)
        scores, counted = record.means(rows)
        return Guidance(scores=scores, rows=counted, answer=answer, written=written)

    def prompt_of(self, inputs: Mapping[str, Any]) -> tuple[Prompt, GuideReceipt]:
        """Return the prompt that ``generate`` makes of its inputs, and what it cost to learn it.

        Raises:
            GuideError: If the model cannot generate, or it does not read one prompt over one batch of encoder
                states.
        """
        generator: Any = self._adapter.model
        name = type(generator).__name__
        if not getattr(generator, "can_generate", lambda: False)():
            raise GuideError(f"{name} cannot generate, so it gave no answer; pass the model with its head")
        prompts: list[Prompt] = []

        def note(prompt: Prompt) -> Guidance:
            prompts.append(prompt)
            assert prompt.states is not None
            nothing = prompt.states.new_zeros(prompt.states.shape[:2], dtype=torch.float32)  # [R, S]
            return Guidance(scores=nothing, rows=nothing[:, 0].long())

        device = next(generator.parameters()).device
        with self._under(_Whole(), note) as manager, Stopwatch(device) as watch, torch.no_grad():
            generator.generate(**{**inputs, **_ONE_TOKEN})
        if not prompts:
            raise GuideError(f"{name} received no encoder states with these inputs: {', '.join(inputs)}")
        prompt = prompts[-1]
        if not all(_same(one.states, prompt.states) for one in prompts):
            raise GuideError(
                f"{name} reads these inputs in {len(prompts)} parts with encoder states of their own, as "
                "Whisper does with long sounds; pass each part by itself, with its own answer"
            )
        receipt = GuideReceipt(
            model=name,
            is_target=True,
            forward_calls=len(prompts),
            tokens=sum(map(attended_tokens, prompts)),
            seconds=watch.seconds,
            bytes_peak=manager.report.bytes_peak,
        )
        return prompt, receipt


def require_matching_guide(policy: CrossKVPolicy, guide: object) -> None:
    """Raise unless a policy that reads the answer has guidance that was made from one, and no other has.

    Args:
        policy: The policy, which needs "guidance".
        guide: The guide that was given for it.

    Raises:
        GuideError: Says which function makes what the policy takes.
    """
    knows = isinstance(guide, AnswerGuide) or (isinstance(guide, Guidance) and guide.receipt.saw_answer)
    readers = [part.name for part in parts(policy) if part.reads_answer]
    if readers and not knows:
        got = "no guide" if guide is None else f"a {type(guide).__name__} that was not made from an answer"
        raise GuideError(
            f"policy {readers[0]} is a reference, not a method: it ranks tokens by a known answer, and takes "
            "only guidance that was made from one. Make it with kvprune.answer_attention(model, inputs, "
            f"answer, written), and pass it as guide=; got {got}"
        )
    if knows and not readers:
        raise GuideError(
            f"policy {policy.spec} is a method, which must choose tokens before the answer is known, but its "
            "guide was given the answer; use a guide that was not, or the policy answer-attention"
        )


@dataclass(frozen=True, kw_only=True)
class _Whole(FeaturePolicy):
    """Drops nothing, and lets the manager ask for guidance."""

    name = "answer-prompt"
    keeps_invisible = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"guidance"})

    def choose(self, view: FeatureView) -> Decision:
        return Decision()


_ONE_TOKEN: Mapping[str, Any] = {
    "max_new_tokens": 1,
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": False,
    "return_dict_in_generate": False,
    **dict.fromkeys(("temperature", "top_p", "top_k")),  # unset, or generate warns
}
"""Options of ``generate`` with which it reads the prompt and stops."""


def _checked(answer: Tensor, written: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return answer and written without columns that no sample wrote; token ids of padding are 0.

    Raises:
        GuideError: As `AnswerGuide` says.
    """
    if not isinstance(answer, Tensor) or answer.dtype != torch.int64 or answer.ndim not in (1, 2):
        raise GuideError(f"answer is int64, [B, n], got {_described(answer)}")
    if written is None:
        written = torch.ones_like(answer, dtype=torch.bool)
    if not isinstance(written, Tensor) or written.dtype != torch.bool or written.shape != answer.shape:
        raise GuideError(
            f"written is bool, of the shape of the answer, {list(answer.shape)}, got {_described(written)}"
        )
    written = written.to(answer.device)
    lengths = written.sum(-1)  # [B]
    places = torch.arange(answer.shape[-1], device=answer.device)
    if not bool((lengths > 0).all()) or not torch.equal(places < lengths[..., None], written):
        raise GuideError(
            "written is true for the first tokens of each answer, one or more, and false for the padding "
            f"after them, got {shown(written.int().tolist(), 300)}"
        )
    longest = int(lengths.max())
    return answer.masked_fill(~written, 0)[..., :longest], written[..., :longest]


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shown(value, 200)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two calls brought the same encoder states, up to rounding."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return one is other or torch.allclose(one, other, rtol=1e-2, atol=1e-3)


def bound_guide(
    guide: nn.Module | Guide | Guidance | AnswerGuide | None, target: ModelAdapter, policy: CrossKVPolicy
) -> Callable[[Prompt], Guidance] | None:
    """Return the function that provides guidance; None if the policy does not use a guide.

    Raises:
        GuideError: If a guide is given and the policy does not use one, or the guide knows the answer and the
            policy must not, or the other way round.
    """
    if "guidance" not in policy.needs:
        if guide is not None:
            raise GuideError(
                f"policy {policy.spec} does not use a guide, but got one ({type(guide).__name__}); leave "
                'guide out, or choose a policy that needs "guidance", such as guided'
            )
        return None
    require_matching_guide(policy, guide)
    if isinstance(guide, Guidance):
        return lambda prompt: guide
    if isinstance(guide, AnswerGuide):
        return guide
    return BoundGuide(guide if isinstance(guide, Guide) else Guide(guide), target)
