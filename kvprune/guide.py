"""A guide: a model that ranks the encoder tokens before the model under the policy sees them.

The guide reads the same prompt and adds up the attention that each encoder token receives. It is a smaller
model with the same vision geometry, or the target itself in a pass before (nothing is saved then, but it
shows what the best of guides could tell). It runs inside the target's forward call, so whoever times that
call times the guide, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.base import ModelAdapter, compressing
from kvprune.errors import GuideError, KVPruneError, NestedCompressionError
from kvprune.guidance import Guidance, GuideReceipt, Prompt
from kvprune.manager import CrossKVManager
from kvprune.moments import FeaturePolicy, FeatureScoringPolicy
from kvprune.policy import CrossKVPolicy, Need
from kvprune.receipts import Stopwatch
from kvprune.registry import find_adapter
from kvprune.selection import Decision, Selection
from kvprune.text import shown
from kvprune.view import FeatureView, LayerView

__all__ = ["BoundGuide", "Guide"]


@dataclass(frozen=True, eq=False)
class Guide:
    """Which model guides, and what it adds up.

    The importance of encoder token j is ``sum over cross-attention layers, query heads and text rows of
    A[layer, head, row, j]``, with ordinary softmax weights. Text rows are those of the prompt that see the
    token's image, and those of the guide's own answer. A sample is ranked in a batch as it is alone.

    Args:
        model: A supported model of the target's vision geometry; None for the target itself.
        max_new_tokens: Most tokens of the guide's answer, decoded greedily. 0: the rows of the prompt only,
            in one forward call. Otherwise the guide generates, and reads prompt and answer once more; the
            rows are those that it ran in generation, so the last token of the answer has none.
        row_mean: Add the means over the rows of the prompt and over those of the answer instead of sums, so
            that a long answer does not outvote the prompt.
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
    """A guide for one target: can be asked about prompts.

    Args:
        guide: Its options.
        target: Adapter of the model that is guided; may be attached.

    Raises:
        GuideError: If the guide cannot guide this target; nothing has run then.
        UnsupportedModelError: If no adapter knows the guide.
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
        """Rank the encoder tokens of a prompt, and rate the answer.

        Args:
            prompt: Of the target.
            consistency_ratio: Rate the answer also by its probability when the guide receives only this
                fraction of visible tokens, the most important ones. None: not.
            length_normalised: Whether that is the geometric mean over the answer's tokens, or the product.

        Raises:
            GuideError: If the guide cannot read the prompt, or fails.
            BudgetError: If ``consistency_ratio`` is no fraction in (0, 1].
        """
        few = None if consistency_ratio is None else _MostImportant(keep_ratio=consistency_ratio)
        prompt = self._readable(prompt)
        model = type(self._adapter.model).__name__
        passes = _Passes(GuideReceipt(model=model, is_target=self.is_target, runs=1), _attended(prompt))
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
        self, prompt: Prompt, few: CrossKVPolicy | None, passes: _Passes, *, length_normalised: bool
    ) -> Guidance:
        adapter, answer, written = self._adapter, None, None
        if self.options.max_new_tokens:
            with self._under(_OwnImages()) as manager:
                answer, written = adapter.answer(prompt, self.options.max_new_tokens)
            passes.add(manager, written, calls=answer.shape[1])
        record = _Record(prompt.text.shape[1])
        with self._under(record.policy()) as manager:
            logits = adapter.replay(prompt, answer, written)
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
        """Return the prompt as the guide can read it."""
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
        """Run the guide under a policy of ours; if it is the target, the target's adapter stands aside."""
        adapter = self._adapter
        manager = CrossKVManager(policy, 0, adapter.layer_indices, guide)
        with ExitStack() as stack:
            if self.is_target:
                stack.enter_context(self._target.standing_aside())
            running = compressing(adapter.model)
            if running is not None:
                raise NestedCompressionError(
                    f"the guide ({type(adapter.model).__name__}) is being compressed itself ({running}), so "
                    "it would rank by what is left; detach that compression, or guide with another model"
                )
            stack.callback(adapter.detach)
            adapter.attach(manager)
            yield manager


@dataclass(frozen=True, kw_only=True)
class _OwnImages(FeaturePolicy):
    """Drops, for each sample, the images that only other samples of its batch have, and nothing else.

    Text before an image attends to all columns in stock, also to these. So the guide is for each sample what
    stock is for that sample alone (KV10), and bit by bit what stock is where all have as many images.
    """

    name = "guide"
    keeps_invisible = True

    def choose(self, view: FeatureView) -> Decision:
        images = view.images.expand(view.batch, -1)
        seen = view.visible_in_prefill
        shown = torch.zeros_like(images).scatter_add_(-1, images, seen.to(images.dtype)) > 0
        own = shown.gather(-1, images) | ~seen.any(-1, keepdim=True)
        return Decision() if bool(own.all()) else Decision(onward=Selection.from_mask(own[:, None]))


class _Passes:
    """Counts what the passes over one prompt cost."""

    def __init__(self, receipt: GuideReceipt, prompt_tokens: int) -> None:
        self.receipt = receipt
        self._prompt_tokens = prompt_tokens

    def add(self, manager: CrossKVManager, written: Tensor | None, *, calls: int = 1) -> None:
        """Add a pass: what it held, and what it read: the prompt, and all but the last of the answer."""
        read = self._prompt_tokens + (0 if written is None else int(written[:, 1:].sum()))
        held = manager.report.bytes_peak
        self.receipt = replace(self.receipt, runs=0, forward_calls=calls, tokens=read, bytes_peak=held).plus(
            self.receipt
        )


class _Record:
    """Adds up attention over layers and heads, apart for the rows of prompt and answer."""

    def __init__(self, prompt_rows: int) -> None:
        self._prompt_rows = prompt_rows
        self._parts: list[tuple[Tensor, Tensor]] = []  # of prompt and answer: sums [R, S], rows [R]
        self._received: Selection | None = None

    def policy(self) -> CrossKVPolicy:
        """Return a policy that decides what `_OwnImages` decides, and records what it is shown."""
        record = self

        @dataclass(frozen=True, kw_only=True)
        class Recorder(_OwnImages):
            @property
            def needs(self) -> frozenset[Need]:
                return frozenset({"queries"})

            def choose(self, view: FeatureView) -> Decision:
                decision = super().choose(view)
                record._received = decision.onward
                return decision

            def select(self, view: LayerView) -> Decision:
                record.add(view)
                return Decision()

        return Recorder()

    def add(self, view: LayerView) -> None:
        """Add one layer."""
        seeing = view.visibility.seeing
        in_prompt = torch.arange(seeing.shape[1], device=seeing.device) < self._prompt_rows
        for part, rows in enumerate((seeing & in_prompt, seeing & ~in_prompt)):
            if part and seeing.shape[1] == self._prompt_rows:
                break
            mass = view.attention_mass(rows).sum(1)
            if part == len(self._parts):
                self._parts.append((mass, rows.sum(-1)))
            else:
                before, counted = self._parts[part]
                self._parts[part] = before + mass.to(before.device), counted

    def sums(self, batch: int, *, by_mean: bool) -> tuple[Tensor, Tensor]:
        """Return scores ``[R, S]`` and the rows that were added up ``[R]``."""
        if not self._parts:
            raise GuideError("the guide ran, but none of its cross-attention layers received encoder states")
        scores = [mass / rows.clamp(min=1)[:, None] if by_mean else mass for mass, rows in self._parts]
        copies = batch // scores[0].shape[0]  # rows that the guide held as one
        total = torch.stack(scores).sum(0)
        if self._received is not None:  # back to all columns; what pads a ragged batch has no attention
            everything = total.new_zeros(len(total), self._received.columns)
            total = everything.scatter_add_(-1, self._received.indices[:, 0], total)
        total = total.repeat_interleave(copies, dim=0)
        return total, torch.stack([rows for _, rows in self._parts]).sum(0).repeat_interleave(copies)


@dataclass(frozen=True, kw_only=True)
class _MostImportant(FeatureScoringPolicy):
    """Drops all but the most important tokens before the first layer."""

    name = "guide-consistency"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"guidance"})

    def score(self, view: FeatureView) -> Tensor:
        return view.guidance[:, None]


def _mean_probability(
    logits: Tensor, written: Tensor, answer: Tensor | None = None, *, mean: bool = True
) -> Tensor:
    """Return the geometric mean (or product) of the probabilities of an answer's tokens, float64 ``[R]``.

    Args:
        logits: ``[R, n, V]``.
        written: bool ``[R, n]``.
        answer: int64 ``[R, n]``; None takes the highest probability at each place.
        mean: Whether to take the mean.
    """
    rated = []
    for row in range(len(logits)):  # one at a time: the vocabulary is wide
        by_token = logits[row].float().log_softmax(-1)
        chosen = by_token.amax(-1) if answer is None else by_token.gather(-1, answer[row, :, None])[:, 0]
        total = chosen.double().masked_fill(~written[row], 0.0).sum()
        rated.append((total / written[row].sum() if mean else total).exp())
    return torch.stack(rated)


def _require_same_geometry(guide: ModelAdapter, target: ModelAdapter) -> None:
    """Raise unless encoder tokens and token ids of a guide are those of the target."""
    ours, theirs = guide.geometry(), target.geometry()
    for adapter, geometry in ((guide, ours), (target, theirs)):
        if geometry is None:
            raise GuideError(
                f"{type(adapter.model).__name__} ({adapter.family}) takes no part in guiding between models: "
                "what its encoder tokens mean to another model is not known; it can guide itself (guide=None)"
            )
    if ours != theirs:

        def listed(geometry: Any) -> str:
            return ", ".join(f"{name} {value}" for name, value in geometry.items())

        raise GuideError(
            f"the guide {type(guide.model).__name__} has another geometry than the target "
            f"{type(target.model).__name__}, so its ranking would be about other tokens.\n"
            f"guide:  {listed(ours)}\ntarget: {listed(theirs)}"
        )


def _attended(prompt: Prompt) -> int:
    """Return how many text tokens of a prompt are no padding."""
    mask = prompt.arguments.get("attention_mask")
    rows, length = prompt.text.shape[:2]
    return rows * length if mask is None or mask.ndim != 2 else int(mask[:, -length:].sum())
