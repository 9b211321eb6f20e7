"""The cross-attention cache manager: asks the policy, checks the answer, applies it to the cache layers.

It knows tensors, selections and visibility, and no model. An adapter tells it that a prefill begins, that
a layer is about to run, that it has run, and that the prefill is over:

    begin(visibility, ...)                  once per forward call that brings encoder states
    before_layer(rank, cache layer, ...)    -> what arrives at the layer; a policy that looks at
                                               features decides before the first layer
    after_layer(rank, cache layer, ...)     the policy decides and the cache keeps, or the policy observes
    end()                                   a policy that observed decides now; the receipt is written

Decoding never comes here: it reads what the cache layers hold.

Rows of the batch that are copies of one sample (its beams, its return sequences) are decided about once and
held once. Here and in views, R counts the rows that differ; what users read counts the batch B again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvprune.cache.contents import Arrival
from kvprune.cache.copies import Twins
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.application import attended, carrying, require_onward, retain
from kvprune.engine.guidance import Guidance, Prompt, to_rows
from kvprune.engine.kept import KeptSelections
from kvprune.engine.measurement import PrefillRecord, Stopwatch
from kvprune.engine.policy_calls import PolicyCalls
from kvprune.engine.prefill import Asked, Observed, Prefill
from kvprune.engine.report import CompressionReport
from kvprune.errors import (
    GuideError,
    UnsupportedCacheError,
)
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.captured import Captured
from kvprune.policy.checks import check_decision, check_text
from kvprune.policy.moments import FeaturePolicy, PrefillPolicy
from kvprune.policy.text_view import TextView
from kvprune.tokens.decision import Decision
from kvprune.tokens.layout import Layout
from kvprune.tokens.reindexing import compose
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["CrossKVManager"]


class CrossKVManager:
    """Joins one policy with the cache layers of one model.

    Args:
        policy: Decides.
        seed: For policies that draw random numbers.
        layer_indices: The model's cross-attention layers in order; their positions are the ranks.
        guide: Answers policies that need "guidance"; asked once for each prefill, before its first layer.
    """

    def __init__(
        self,
        policy: CrossKVPolicy,
        seed: int,
        layer_indices: Sequence[int],
        guide: Callable[[Prompt], Guidance] | None = None,
    ) -> None:
        self.policy = policy
        self.guide = guide
        self.layer_indices = tuple(layer_indices)
        self._calls = PolicyCalls(policy, seed, self.layer_indices)
        self.report = CompressionReport(policy=policy.spec, seed=seed, requested=dict(policy.requested))
        self.kept = KeptSelections()
        self._prefill: Prefill | None = None

    @property
    def in_prefill(self) -> bool:
        """Whether a forward call that brings encoder states is running."""
        return self._prefill is not None

    def begin(
        self,
        visibility: Visibility,
        new_columns: int,
        fingerprints: Callable[[], Tensor],
        *,
        twins: Twins | None = None,
        cached: bool = True,
        layout: Callable[[], Layout] | None = None,
        prompt: Callable[[Tensor], Prompt] | None = None,
        capture: Callable[[], Captured] | None = None,
    ) -> None:
        """Open a prefill.

        Args:
            visibility: Of all columns, those of earlier images included, for R rows.
            new_columns: How many of the last columns arrive in this call.
            fingerprints: Returns int64 ``[R]``, the seeds of random policies (`kvprune.tokens.randomness`).
            twins: How many consecutive rows of the batch are copies of one; none by default.
            cached: Whether there is a cache; without one, decisions reach later layers only.
            layout: Returns where the new columns lie in their images, for R rows; None if that is not known.
            prompt: Returns what a guide needs to repeat this call for R rows, given the features of the new
                columns, ``[R, S, C]``; None if the adapter cannot say.
            capture: Returns what was captured of all new columns, for R rows, once the encoder has run;
                None if nothing was.
        """
        self.report.count_encoder_input()
        first_new = visibility.columns - new_columns
        self._prefill = Prefill(
            visibility,
            first_new,
            fingerprints,
            twins or Twins(),
            cached,
            PrefillRecord(cached=cached),
            layout,
            prompt,
            capture,
        )

    def before_layer(self, rank: int, layer: CrossKVLayer, features: Tensor) -> Arrival:
        """Tell a cache layer what arrives, and return it, for R rows.

        Args:
            rank: Of the layer among the cross-attention layers.
            layer: Its cache layer.
            features: ``[B, S, C]``, all new columns as they would enter the layer's projections.

        Raises:
            UnsupportedCacheError: If the mask covers other columns than the cache has seen.
            SelectionError: If the policy decides about features and breaks an invariant.
        """
        prefill = self._running()
        if layer.columns != prefill.first_new:
            raise UnsupportedCacheError(
                f"the mask covers {prefill.visibility.columns} columns, {prefill.new_columns} of them new, "
                f"but layer {self.layer_indices[rank]} has seen {layer.columns} before; pass a "
                "cross-attention mask over all images of the conversation, and features of the new ones only"
            )
        if not prefill.is_prepared:
            self._prepare(prefill, features[:: prefill.twins.copies])
        layer.separate()
        prefill.record.arrives(self.layer_indices[rank], layer)
        return layer.expect(prefill.onward, prefill.new_columns, prefill.twins)

    def _prepare(self, prefill: Prefill, features: Tensor) -> None:
        """Do what comes before the first layer: collect what was captured, ask the guide, choose features."""
        prefill.is_prepared = True
        if prefill.capture is not None:
            prefill.captured = prefill.captured.joined(prefill.capture())
        if "guidance" in self.policy.needs:
            self._ask_guide(prefill, features)
        if isinstance(self.policy, FeaturePolicy):
            self._choose(self.policy, prefill, features)

    def after_text(self, view: TextView, layer: TextKVLayer | None = None) -> None:
        """Note what a self-attention layer has attended to, and let the policy prune its cache.

        Args:
            view: Of R rows, without drafts.
            layer: Its cache layer, updated, for each row of the batch; None if text is not to be pruned.

        Raises:
            SelectionError: If the policy's selection breaks an invariant.
            PolicyFailedError: If the policy raises an error of its own.
        """
        prefill = self._running()
        image_tokens = prefill.image_tokens.to(view.device)  # [R]
        view = replace(view, image_tokens=image_tokens, cross_layers=len(self.layer_indices))
        if "text" in self.policy.needs:
            prefill.captured = replace(prefill.captured, text=view)
        if layer is None:
            return
        with torch.no_grad(), Stopwatch(view.device) as watch:
            selection = self._calls.select_text(view)
        prefill.text_counts = check_text(selection, view, self.policy.name, prefill.text_counts)
        drafts = layer.held - view.entries
        if selection is not None:
            layer.retain(selection.repeat(prefill.twins.copies))
        tokens = None if layer.slots is None else layer.tokens()[..., : layer.held - drafts]
        self.kept.add_text(view.layer_idx, tokens, layer.seen - drafts)
        available = view.real.sum(-1).clamp(min=1)
        fraction = torch.ones_like(available) if selection is None else prefill.text_counts / available
        prefill.record.pruned_text(view.layer_idx, layer, watch, drafts, fraction)

    def after_layer(
        self,
        rank: int,
        layer: CrossKVLayer,
        *,
        scaling: float,
        captured: Captured | None = None,
        follows_text: bool = True,
    ) -> None:
        """Let the policy decide about a layer that has just attended, and apply the decision.

        Args:
            rank: Of the layer among the cross-attention layers.
            layer: The cache layer, updated.
            scaling: Factor on attention logits.
            captured: What was captured in the layer, for each row of the batch, draft rows included.
            follows_text: Whether a self-attention of the text comes before the layer.

        Raises:
            SelectionError: If the decision breaks an invariant.
            PolicyFailedError: If the policy raises an error of its own.
            UnsupportedCacheError: If there is no cache, but the policy prunes nothing else.
        """
        prefill, policy, received = self._running(), self.policy, self._running().onward
        prefill.record.attended(self.layer_indices[rank], layer)
        view = self._calls.layer_view(
            prefill,
            rank,
            layer,
            received,
            captured or Captured(),
            scaling=scaling,
            follows_text=follows_text,
        )
        before = None if layer.slots is None else attended(layer, received, prefill.first_new)
        asked = Asked(view, layer, layer.width - view.columns, before)
        with torch.no_grad(), Stopwatch(view.device) as watch:
            if isinstance(policy, PrefillPolicy):
                answer = self._calls.observe(policy, view)
            else:
                answer = self._calls.select(view)
        if isinstance(policy, PrefillPolicy):
            asked = replace(asked, view=view.without_captured())
            prefill.observed.append(Observed(asked, answer, watch))
        else:
            self._apply(prefill, asked, answer, watch)

    def end(self, *, completed: bool) -> None:
        """Close a prefill; write its receipt if it came to its end.

        Raises:
            SelectionError, PolicyFailedError, UnsupportedCacheError: As `after_layer`, from a policy that
                decides when all layers have attended.
        """
        prefill, self._prefill = self._prefill, None
        if prefill is None or not completed:
            return
        if prefill.observed and isinstance(self.policy, PrefillPolicy):
            self._conclude(self.policy, prefill)
        if not prefill.record.is_empty:
            prefill.record.write(
                self.report, prefill.visibility.decode, self.policy.exact_budget, self.policy.budget_scope
            )

    def _ask_guide(self, prefill: Prefill, features: Tensor) -> None:
        """Let the guide rank the new columns."""
        if self.guide is None or prefill.prompt is None:
            raise GuideError(
                f"policy {self.policy.spec} needs guidance, but nothing here can give it: "
                f"{'no guide was given' if self.guide is None else 'the adapter passes no prompt on'}"
            )
        with torch.no_grad():
            guidance = self.guide(prefill.prompt(features))
            rows, copies = prefill.visibility.batch, prefill.twins.copies
            scores = to_rows(guidance, rows, copies, prefill.new_columns)  # [R, S]
        self.report.add_guide(guidance.receipt)
        prefill.captured = replace(prefill.captured, guidance=scores.to(features.device))
        prefill.prompt = None  # it holds the whole input

    def _choose(self, policy: FeaturePolicy, prefill: Prefill, features: Tensor) -> None:
        """Let the policy decide what all layers receive."""
        view = self._calls.feature_view(prefill, features)
        with torch.no_grad(), Stopwatch(features.device) as watch:
            decision = self._calls.choose(policy, view)
        check_decision(decision, view, policy.name)
        assert isinstance(decision, Decision)
        prefill.record.chosen(watch)
        if decision.note:
            self.report.warn(decision.note)
        if decision.onward is not None:
            prefill.onward = compose(None, decision.onward)

    def _conclude(self, policy: PrefillPolicy, prefill: Prefill) -> None:
        """Let the policy decide about all layers that it has observed."""
        observed = prefill.observed
        prefill.record.waited()
        with torch.no_grad(), Stopwatch(observed[-1].asked.view.device) as watch:
            decisions = self._calls.conclude(policy, observed)
        for number, (layer, decision) in enumerate(zip(observed, decisions, strict=True)):
            watches = (layer.watch, watch) if number == 0 else (layer.watch,)
            self._apply(prefill, layer.asked, decision, *watches)

    def _apply(self, prefill: Prefill, asked: Asked, decision: object, *watches: Stopwatch) -> None:
        """Check a decision about one layer and carry it out."""
        view, layer = asked.view, asked.layer
        layer_idx = view.layer_idx
        check_decision(decision, view, self.policy.name)
        assert isinstance(decision, Decision)
        if decision.note:
            self.report.warn(decision.note)
        merge = None
        with torch.no_grad():
            if not prefill.cached:
                require_onward(decision, self.policy, layer_idx)
            elif decision.cache is not None or not self.policy.keeps_invisible:
                if decision.cache is not None and decision.cache.quantizes and layer.keys.requires_grad:
                    self.report.warn(
                        "quantized entries carry no gradient: nothing is learned from what reads them"
                    )
                merge = retain(prefill, decision, asked)
            if decision.onward is not None:
                prefill.onward = compose(prefill.onward, decision.onward)
        kept = layer.selection()
        merge = carrying(merge, layer, kept.indices, kept.valid, prefill.first_new)
        kept = Selection.trusted(kept.indices, kept.valid, layer.columns, merge, kept.bits)
        self.kept.add(layer_idx, asked.attended, kept, layer.copies)
        prefill.record.decided(layer_idx, layer, watches, visible=prefill.visibility.decode)

    def _running(self) -> Prefill:
        if self._prefill is None:
            raise UnsupportedCacheError(
                "a cross-attention layer received encoder states outside the model's own forward call; "
                "call the model that was given to compress()"
            )
        return self._prefill
