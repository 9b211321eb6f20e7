"""A guide: a model that ranks the encoder tokens before the target, the model under the policy, sees them.

The guide reads the same prompt and adds up the attention that each encoder token receives. It is a smaller
model with the same vision geometry, or the target itself in an extra pass. A target that guides itself saves
no time, but shows how much a perfect guide would help. The guide runs inside the target's forward call, so a
timing of that call includes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kvprune.adapters.attachment import compressing
from kvprune.adapters.base import ModelAdapter
from kvprune.engine.guidance import Guidance, GuideReceipt, Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.engine.measurement import Stopwatch
from kvprune.errors import GuideError, KVPruneError, NestedCompressionError
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.guide_policies import AttentionRecord, MostImportant, OwnImages
from kvprune.session.registry import find_adapter
from kvprune.text import shown

__all__ = ["BoundGuide", "Guide", "Passes", "attended_tokens"]


@dataclass(frozen=True, eq=False)
class Guide:
    """Which model guides, and which attention it adds up.

    The importance of encoder token j is ``sum over cross-attention layers, query heads and text rows of
    A[layer, head, row, j]``, where A holds softmax attention weights. The text rows are the rows of the
    prompt that see the token's image, and the rows of the guide's own answer. The other samples of a batch do
    not change the ranking of a sample.

    The published code (SGL, arXiv 2412.03324) always lets the guide answer first and adds up the rows of
    prompt and answer: ``max_new_tokens`` as large as answers need, and ``row_mean=False``. With 0, which is
    the default here, the guide reads the prompt once. That costs less, and is not the published method.

    Args:
        model: A supported model with the target's vision geometry; None for the target itself.
        max_new_tokens: Most tokens of the guide's answer, decoded greedily. With 0, only the rows of the
            prompt count, and one forward call is enough. Otherwise the guide generates, then reads prompt and
            answer once more. The last token of the answer has no row: generation never read it.
        row_mean: Add the mean over the rows of the prompt and the mean over the rows of the answer instead of
            sums, so that a long answer does not outweigh the prompt.

    Raises:
        GuideError: If a value has the wrong type or is out of range.
    """

    model: nn.Module | None = None
    max_new_tokens: int = field(default=0, kw_only=True)
    row_mean: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise GuideError(f"a guide is a model, got {shown(self.model)}")
        limit = self.max_new_tokens
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise GuideError(f"max_new_tokens of a guide is a whole number, 0 or more, got {shown(limit)}")
        if not isinstance(self.row_mean, bool):
            raise GuideError(f"row_mean of a guide is True or False, got {shown(self.row_mean)}")


class BoundGuide:
    """A guide and its target; ranks the encoder tokens of the target's prompts.

    Args:
        guide: The guide's model and options.
        target: Adapter of the model that is guided; may be attached.

    Raises:
        GuideError: If the guide cannot guide this target. Nothing has run by then.
        UnsupportedModelError: If no adapter supports the guide.
        IncompatibleTransformersError: If transformers lacks something that its adapter relies on.
    """

    def __init__(self, guide: Guide, target: ModelAdapter) -> None:
        self.options = guide
        self.is_target = guide.model is None or guide.model is target.model
        self._target = target
        if self.is_target:
            self._adapter = type(target)(target.model)
        else:
            assert guide.model is not None
            kind = find_adapter(guide.model)
            kind.require_probes()
            self._adapter = kind(guide.model)
            if not set(guide.model.modules()).isdisjoint(target.model.modules()):
                raise GuideError(
                    f"the guide {type(guide.model).__name__} is a part of the target, or shares modules with "
                    "it, so both cannot run at once; leave guide out, and the target guides itself"
                )
            _require_same_geometry(self._adapter, target)
        for method in ("replay", "answer")[: 1 + (guide.max_new_tokens > 0)]:
            if getattr(type(self._adapter), method) is getattr(ModelAdapter, method):
                raise GuideError(
                    f"a {type(self._adapter.model).__name__} cannot guide with max_new_tokens="
                    f"{guide.max_new_tokens}: the adapter for {self._adapter.family} lacks {method}()"
                )

    def __call__(self, prompt: Prompt) -> Guidance:
        """Rank the encoder tokens of a prompt."""
        return self.ask(prompt)

    def ask(
        self, prompt: Prompt, *, consistency_ratio: float | None = None, length_normalised: bool = True
    ) -> Guidance:
        """Rank the encoder tokens of a prompt; if the guide answers, also rate its answer.

        Args:
            prompt: A prompt of the target.
            consistency_ratio: If given, also compute the probability of the answer when the guide receives
                only this fraction of visible tokens, the most important ones.
            length_normalised: Whether this probability is the geometric mean over the answer's tokens
                (True) or their product (False).

        Raises:
            GuideError: If the guide cannot read the prompt, or raises an error.
            BudgetError: If ``consistency_ratio`` is no fraction in (0, 1].
        """
        few = None if consistency_ratio is None else MostImportant(keep_ratio=consistency_ratio)
        prompt = self._readable(prompt)
        model = type(self._adapter.model).__name__
        passes = Passes(GuideReceipt(model=model, is_target=self.is_target, runs=1), attended_tokens(prompt))
        try:
            with Stopwatch(prompt.text.device) as watch, torch.no_grad():
                guidance = self._ask(prompt, few, passes, length_normalised=length_normalised)
        except (KVPruneError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise GuideError(
                f"the guide ({model}) raised {type(error).__name__} over the target's prompt: "
                f"{str(error)[:500]}"
            ) from error
        return replace(guidance, receipt=replace(passes.receipt, seconds=watch.seconds))

    def _ask(
        self, prompt: Prompt, few: CrossKVPolicy | None, passes: Passes, *, length_normalised: bool
    ) -> Guidance:
        """Run the guide's passes; ``few`` is the policy of the pass that measures consistency."""
        adapter, answer, written = self._adapter, None, None  # answer int64 [R, n], written bool [R, n]
        if self.options.max_new_tokens:
            with self._under(OwnImages()) as manager:
                answer, written = adapter.answer(prompt, self.options.max_new_tokens)
            passes.add(manager, written, calls=answer.shape[1])
        record = AttentionRecord(prompt.text.shape[1])
        with self._under(record.policy()) as manager:
            logits = adapter.replay(prompt, answer, written)  # [R, n, V]; None without an answer
        passes.add(manager, written)
        scores, rows = record.sums(len(prompt.text), by_mean=self.options.row_mean)
        guidance = Guidance(scores=scores, rows=rows, answer=answer, written=written)
        if logits is None or answer is None or written is None:
            return guidance
        guidance = replace(guidance, confidence=_mean_probability(logits, written))
        if few is None:
            return guidance
        with self._under(few, lambda _: guidance) as manager:
            logits = adapter.replay(prompt, answer, written)
        passes.add(manager, written)
        assert logits is not None
        rated = _mean_probability(logits, written, answer, mean=length_normalised)
        return replace(guidance, consistency=rated)

    def _readable(self, prompt: Prompt) -> Prompt:
        """Return the prompt on the guide's device and in its dtype.

        Raises:
            GuideError: If another model than the target cannot read it.
        """
        if not self.is_target:
            if prompt.past is not None:
                raise GuideError(
                    "an image came in a later turn, but the guide has not read the turns before; give the "
                    "whole conversation at once, or let the model guide itself (guide=None)"
                )
            if "inputs_embeds" in prompt.arguments:
                raise GuideError(
                    "the target was called with inputs_embeds, which mean nothing to another model; pass "
                    "input_ids, or let the model guide itself (guide=None)"
                )
            # Quantized weights have no dtype that an input could have.
            weight = next(one for one in self._adapter.model.parameters() if one.is_floating_point())
            prompt = replace(prompt, states=None).to(weight.device, weight.dtype)
        return prompt

    @contextmanager
    def _under(
        self, policy: CrossKVPolicy, guide: Callable[[Prompt], Guidance] | None = None
    ) -> Iterator[CrossKVManager]:
        """Run the guide under a policy. If the guide is the target, the target's adapter is off meanwhile."""
        adapter = self._adapter
        manager = CrossKVManager(policy, 0, adapter.layer_indices, guide)
        with ExitStack() as stack:
            if self.is_target:
                stack.enter_context(self._target.paused())
            running = compressing(adapter.model)
            if running is not None:
                raise NestedCompressionError(
                    f"the guide ({type(adapter.model).__name__}) is being compressed itself ({running}), so "
                    "it would rank by what is left; detach that compression, or guide with another model"
                )
            stack.callback(adapter.detach)
            adapter.attach(manager)
            yield manager


class Passes:
    """Adds up what the passes of a guide over one prompt cost."""

    def __init__(self, receipt: GuideReceipt, prompt_tokens: int) -> None:
        self.receipt = receipt
        self.prompt_tokens = prompt_tokens

    def add(self, manager: CrossKVManager, written: Tensor | None, *, calls: int = 1) -> None:
        """Add a pass: the bytes that it held and the tokens that it read.

        A pass reads the prompt and every token of the answer but the last.
        """
        read = self.prompt_tokens + (0 if written is None else int(written[:, 1:].sum()))
        held = manager.report.bytes_peak
        self.receipt = replace(self.receipt, runs=0, forward_calls=calls, tokens=read, bytes_peak=held).plus(
            self.receipt
        )


def _mean_probability(
    logits: Tensor, written: Tensor, answer: Tensor | None = None, *, mean: bool = True
) -> Tensor:
    """Return the geometric mean (or product) of the probabilities of an answer's tokens, float64 ``[R]``.

    Args:
        logits: ``[R, n, V]``.
        written: bool ``[R, n]``.
        answer: int64 ``[R, n]``; None takes the highest probability at each place.
        mean: Whether to take the geometric mean; otherwise the product.
    """
    rated = []
    for row in range(len(logits)):  # one row at a time, because the vocabulary is large
        by_token = logits[row].float().log_softmax(-1)  # [n, V]
        chosen = by_token.amax(-1) if answer is None else by_token.gather(-1, answer[row, :, None])[:, 0]
        total = chosen.double().masked_fill(~written[row], 0.0).sum()
        rated.append((total / written[row].sum() if mean else total).exp())
    return torch.stack(rated)


def _require_same_geometry(guide: ModelAdapter, target: ModelAdapter) -> None:
    """Raise GuideError unless encoder tokens and token ids mean the same to the guide and the target."""
    ours, theirs = guide.geometry(), target.geometry()
    for adapter, geometry in ((guide, ours), (target, theirs)):
        if geometry is None:
            raise GuideError(
                f"{type(adapter.model).__name__} ({adapter.family}) takes no part in guiding between models: "
                "what its encoder tokens mean to another model is not known; it can guide itself (guide=None)"
            )
    assert ours is not None
    assert theirs is not None
    if ours != theirs:

        def listed(geometry: Mapping[str, object]) -> str:
            return ", ".join(f"{name} {value}" for name, value in geometry.items())

        names = ", ".join(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise GuideError(
            f"the guide {type(guide.model).__name__} has another geometry ({names}) than the target "
            f"{type(target.model).__name__}, so its ranking would be about other tokens.\n"
            f"guide:  {listed(ours)}\ntarget: {listed(theirs)}"
        )


def attended_tokens(prompt: Prompt) -> int:
    """Return the number of text tokens of a prompt, without padding."""
    mask = prompt.arguments.get("attention_mask")
    rows, length = prompt.text.shape[:2]
    return rows * length if mask is None or mask.ndim != 2 else int(mask[:, -length:].sum())
