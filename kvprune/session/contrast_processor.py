"""The logits processor of a contrast: it runs the second branch, and combines what both branches say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import returned_cache, with_cache
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.second_branch import CallRecorder, RecordedCall, rows_with_prefix
from kvprune.engine.manager import CrossKVManager
from kvprune.engine.measurement import Stopwatch
from kvprune.errors import ContrastError, UnsupportedCacheError
from kvprune.session.contrast_report import ContrastReport, TextBytes, bytes_of
from kvprune.session.contrast_rules import CombineRule
from kvprune.text import shown

__all__ = ["ContrastProcessor", "require_options"]

_COSTLY = "output_attentions", "output_hidden_states"
"""What a second call need not return."""

_OUT_OF_THE_QUESTION = 100.0
"""How far below the first branch a token is that a rule forbids, in nats: e**-100 is 0 in a float32 softmax.

It is not -inf: processors that come later forbid tokens, too, as those of timestamps do, and if they forbade
all that the rule has left, `generate` would silently write the token with id 0. So the first branch decides.
"""


def require_options(options: Any) -> None:
    """Raise if `generate` decodes in a way in which two branches cannot be contrasted.

    Args:
        options: Its generation config.

    Raises:
        ContrastError: Names the option and says what would be right.
        UnsupportedCacheError: If there is no cache, or a static one.
    """
    if not options.use_cache:
        raise UnsupportedCacheError(
            "contrast keeps a cache for each of its two branches, got use_cache=False; leave it out"
        )
    if options.cache_implementation not in (None, "dynamic"):
        raise UnsupportedCacheError(
            "the second branch gets a cache like that of the first one, which must grow, got "
            f"cache_implementation={shown(options.cache_implementation)}; leave it out"
        )
    if getattr(options, "prefill_chunk_size", None) is not None:
        raise ContrastError(
            f"prefill_chunk_size={options.prefill_chunk_size} passes the prompt in chunks, of which the "
            "second branch would read the last one only; leave it out"
        )
    if options.guidance_scale not in (None, 1):
        raise ContrastError(
            f"guidance_scale={options.guidance_scale:g} is a contrast of its own, with a branch without "
            "prompt; use one of the two: leave guidance_scale out"
        )


class ContrastProcessor:
    """Combines, at each step of one `generate`, the scores with those of the second branch.

    Args:
        adapter: Hooks the model for the second branch; its hooks wait otherwise.
        manager: Decides what the second branch keeps.
        recorder: Has the latest call of the first branch.
        rule: Combines the two branches.
        report: Counts steps, time and bytes.
        beams: Consecutive rows of one sample that change places; 1 if rows stay where they are.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        manager: CrossKVManager,
        recorder: CallRecorder,
        rule: CombineRule,
        report: ContrastReport,
        beams: int,
    ) -> None:
        self._adapter, self._manager, self._recorder = adapter, manager, recorder
        self._rule, self._report, self._beams = rule, report, beams
        self._cross = frozenset(adapter.layer_indices)
        self._text = TextBytes(self._cross), TextBytes(self._cross)  # of the first and the second branch
        self._first_cache: Any = None
        self._cache: Any = None
        self._read: Tensor | None = None  # int64 [B, T], token ids of the rows at the latest step
        self._decided: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return combined log-probabilities ``[B, V]``.

        Args:
            input_ids: int64 ``[B, T]``, the tokens of each row so far.
            scores: ``[B, V]``, what the first branch says about the next token.
        """
        call = self._recorder.take()
        is_first = self._read is None
        if is_first:
            self._start(call)
        else:
            self._follow(call, input_ids)
        self._read = input_ids
        logits, watch = self._second(call)
        if is_first:
            self._require_dropped()
        with Stopwatch(scores.device) as combining:
            full, pruned = scores.float(), logits.float()
            if full.shape != pruned.shape or full.device != pruned.device:
                pruned = self._fitting(full, pruned)
            full = full.log_softmax(-1)
            if is_first or not self._rule.takes_logits:
                pruned = pruned.log_softmax(-1)
            if is_first:
                self._decided = self._rule.begin(full, pruned)
            combined = self._rule.combine(full, pruned, self._decided)
            # Beams are compared by sums of log-probabilities, so these must be some.
            combined = torch.maximum(combined.log_softmax(-1), full - _OUT_OF_THE_QUESTION).to(scores.dtype)
        self._count(call, watch, combining, is_first=is_first)
        return combined

    def _fitting(self, full: Tensor, pruned: Tensor) -> Tensor:
        """Return what the second branch says on the device of the first one; raise if shapes differ."""
        if full.shape != pruned.shape:
            raise ContrastError(
                f"the first branch returned scores {list(full.shape)}, the second one {list(pruned.shape)}"
            )
        return pruned.to(full.device)

    def _start(self, call: RecordedCall) -> None:
        """Take the cache of the second branch, when the first branch has read the prompt."""
        cache = call.cache if call.returned is None else call.returned
        if cache is None:
            raise UnsupportedCacheError(
                f"generate calls {type(call.module).__name__} without a cache; contrast needs use_cache=True "
                "and a model that has a cache"
            )
        if cache.is_compileable:
            raise UnsupportedCacheError(
                f"the second branch gets a cache like that of the first one, which must grow, got "
                f"{shown(cache)}; leave past_key_values out"
            )
        empty = self._recorder.take_empty()
        if call.cache is not None and (call.past != 0 or empty is None):
            raise UnsupportedCacheError(
                f"the cache holds {call.past} tokens of earlier turns, which the second branch has not read; "
                "leave past_key_values out and pass the whole conversation"
            )
        call.require_unchanged_states()
        # Without a cache in the first call, as MusicGen's, the second branch makes its own, too.
        self._first_cache, self._cache = cache, empty

    def _follow(self, call: RecordedCall, input_ids: Tensor) -> None:
        """Reorder the second cache as `generate` has reordered the first one."""
        assert self._read is not None
        if call.cache is not self._first_cache:
            raise ContrastError(
                f"{type(call.module).__name__} was called with another cache between two tokens, so the "
                "second branch cannot follow; another logits processor may have called the model"
            )
        if len(input_ids) != len(self._read):
            raise ContrastError(
                f"the batch has {len(input_ids)} rows, and had {len(self._read)} at the token before; "
                "contrast cannot follow rows that come or go"
            )
        if self._beams == 1:
            return
        rows, found = rows_with_prefix(self._read, input_ids, self._beams)
        if not bool(found.all()):  # one device transfer; beam search makes several at each step
            raise ContrastError(
                f"row {int((~found).nonzero()[0])} continues none of the beams of its sample, so the second "
                "branch cannot follow this way of decoding"
            )
        self._cache.reorder_cache(rows)
        if self._decided is not None:
            self._decided = self._decided[rows]

    def _second(self, call: RecordedCall) -> tuple[Tensor, Stopwatch]:
        """Repeat a call in the second branch; return its logits of the last token, ``[B, V]``."""
        named = self._adapter.second_call(with_cache(call.arguments, self._cache), call.encoding)
        named["return_dict"] = True
        named |= {name: False for name in _COSTLY if name in named}
        # Without gradients, as all that generate does.
        with self._adapter.resumed(), self._recorder.paused(), Stopwatch(call.device) as watch:
            output = call.module(**named)
        returned = returned_cache(output)
        self._cache = self._cache if returned is None else returned
        if self._cache.get_seq_length() != self._first_cache.get_seq_length():
            raise ContrastError(
                f"the second branch has read {self._cache.get_seq_length()} tokens, the first one "
                f"{self._first_cache.get_seq_length()}: something calls the model between two tokens"
            )
        logits: Tensor = output.logits[:, -1]  # [B, V]
        return logits, watch

    def _require_dropped(self) -> None:
        """Raise if both branches read the same, because then they say the same.

        Raises:
            ContrastError: Names the policy.
        """
        kept, report = self._manager.history.kept, self._manager.report
        if not report.prefills:
            raise ContrastError(
                f"the model read no encoder states in this generate, so policy {self._manager.policy.spec} "
                "had nothing to drop and there is nothing to contrast; pass an image, a sound or a text to "
                "encode"
            )
        changed = any(one.merge is not None or one.quantizes for one in kept.selections.values())
        # The last prompt token was read again, which is the first step of a policy that decides in steps.
        drops = self._manager.steps.reads_less() or any(
            fraction < 1 for fraction in report.kept_per_sample
        )  # NaN where a sample sees no image
        if not (drops or changed or report.text_layers):
            reads = " and reads all of it at the first token" if self._manager.steps.is_active else ""
            raise ContrastError(
                f"policy {self._manager.policy.spec} drops nothing of this input that the answer can see"
                f"{reads}, so both branches say the same, and there is nothing to contrast; choose a policy "
                "or a budget that drops some of it, such as against='divprune:keep_ratio=0.1'"
            )

    def _count(self, call: RecordedCall, watch: Stopwatch, combining: Stopwatch, *, is_first: bool) -> None:
        """Count a step in the report."""
        report = self._report
        report.generations += is_first
        report.steps += 1
        report.decided = self._decided
        report.full.add(call.watch, is_prefill=is_first)
        report.pruned.add(watch, is_prefill=is_first)
        first, second = self._text
        if is_first:
            report.full.bytes_cross = bytes_of(self._first_cache, self._cross)
            report.pruned.bytes_cross = self._manager.report.bytes_held
        else:
            report.add_combining(combining)
        report.full.bytes_text = first.of(self._first_cache)
        report.pruned.bytes_text = second.of(self._cache)
