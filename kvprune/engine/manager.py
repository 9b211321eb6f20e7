"""The cross-attention cache manager: asks the policy, checks its decision, and prunes the cache layers.

The manager works on tensors, selections and visibility, and knows no model family. An adapter
(`kvprune.adapters.base`) calls it during each prefill, a forward call that brings encoder states:

    begin(visibility, ...)          the forward call starts: open a `Prefill`
    before_layer(rank, layer, ...)  a cross-attention layer is about to run: return the columns that arrive.
                                    Before the first one, ask the guide and let a `FeaturePolicy` decide.
    after_text(view, ...)           a self-attention layer has attended: show it to policies that need text,
                                    and prune its cache if the policy does
    after_layer(rank, layer, ...)   the cross-attention layer has attended: the policy decides and the cache
                                    is pruned (`kvprune.engine.application`); a `PrefillPolicy` only observes
    end()                           the forward call ends: a `PrefillPolicy` decides about all layers, and
                                    the report is written

Decode steps read the pruned cache layers, and ask a `DecodePolicy` (`kvprune.engine.stepping`).
A new moment takes a view, a base class (`kvprune.policy.moments`), and a method of `PolicyCalls` and of this.
Copies of one sample in the batch (beams, return sequences) get one decision and are held once. Here and in
views, R counts distinct rows; what users read counts the whole batch B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvprune.cache.contents import Arrival
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.shared_rows import SharedRows
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.application import apply, attended_selection
from kvprune.engine.guidance import Guidance, Prompt
from kvprune.engine.history import History
from kvprune.engine.measurement import PrefillRecord, Stopwatch
from kvprune.engine.policy_calls import PolicyCalls
from kvprune.engine.prefill import DecisionContext, ObservedLayer, Prefill
from kvprune.engine.report import CompressionReport
from kvprune.engine.stepping import Stepping
from kvprune.errors import CompressionStateError, GuideError, UnsupportedCacheError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.captured import Captured
from kvprune.policy.checks import check_decision, check_text
from kvprune.policy.geometry import layout_from, require_grid
from kvprune.policy.moments import FeaturePolicy, PrefillPolicy
from kvprune.policy.text_view import TextView
from kvprune.tokens.decision import Decision
from kvprune.tokens.layout import Layout
from kvprune.tokens.visibility import Visibility

__all__ = ["CrossKVManager"]


class CrossKVManager:
    """Applies one policy to the cache layers of one model.

    Args:
        policy: The policy that decides.
        seed: Seed for policies that draw random numbers.
        layer_indices: The model's cross-attention layers in order; their positions are the ranks.
        guide: Ranks encoder tokens for policies that need "guidance" or "reconstruction", in each prefill.
        rereads: Whether the last token of each prompt is read again from the pruned cache, see `decide`.
    """

    def __init__(
        self,
        policy: CrossKVPolicy,
        seed: int,
        layer_indices: Sequence[int],
        guide: Callable[[Prompt], Guidance] | None = None,
        *,
        rereads: bool = False,
    ) -> None:
        self.policy = policy
        self.guide = guide
        self.rereads = rereads
        self.layer_indices = tuple(layer_indices)
        self.report = CompressionReport(policy=policy.spec, seed=seed, requested=dict(policy.requested))
        self._calls = PolicyCalls(policy, seed, self.layer_indices, self.report.note_draw)
        self.history = History(self.report)
        self.steps = Stepping(policy, self.layer_indices, self._calls.held)
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
        shared_rows: SharedRows | None = None,
        cached: bool = True,
        layout: Callable[[], Layout] | None = None,
        prompt: Callable[[Tensor], Prompt] | None = None,
        capture: Callable[[], Captured] | None = None,
        before: Stopwatch | None = None,
    ) -> None:
        """Open a prefill.

        Args:
            visibility: Which text rows may attend which columns, for R rows and all columns, those of earlier
                images included.
            new_columns: Number of columns that arrive in this call; they are the last ones.
            fingerprints: Returns int64 ``[R]``, digests of the inputs that seed random policies
                (`kvprune.tokens.randomness`).
            shared_rows: Number of consecutive rows of the batch that are copies of one sample; 1 by default.
            cached: Whether there is a cache. Without one, only what later layers receive can be pruned.
            layout: Returns the positions of the new columns in their images, for R rows; None if unknown.
            prompt: Returns the input of a guide for R rows, given the features of the new columns,
                ``[R, S, C]``; None if the adapter supports no guide.
            capture: Returns what the adapter captured of all new columns, for R rows, once the encoder has
                run; None if it captured nothing.
            before: Around what has run for the policy so far; the report counts it.

        Raises:
            UnsupportedModelError: If the policy needs a grid, and the columns have none.
        """
        self.report.set_steps(self.steps.restart())
        first_new, rows = visibility.columns - new_columns, shared_rows or SharedRows()
        record = PrefillRecord(cached=cached, before=before)
        self._prefill = Prefill(
            visibility, first_new, fingerprints, rows, cached, record, layout, prompt, capture
        )
        if "grid" in self.policy.needs:
            require_grid(layout_from(self._prefill.layout, self.policy.name), self.policy.name)

    def before_layer(self, rank: int, layer: CrossKVLayer, features: Tensor) -> Arrival:
        """Prepare a cache layer for the columns that arrive, and return them for R rows.

        Before the first layer, a `FeaturePolicy` decides.

        Args:
            rank: Index among the cross-attention layers.
            layer: Its cache layer.
            features: ``[B, S, C]``, all new columns as they would enter the layer's projections.

        Raises:
            UnsupportedCacheError: If the mask covers other columns than the cache has seen.
            SelectionError: If the decision of a `FeaturePolicy` breaks an invariant.
            PolicyFailedError: If the policy raises an error of its own.
            GuideError: If the policy needs guidance and there is none.
        """
        prefill = self._running()
        if layer.columns != prefill.first_new:
            raise UnsupportedCacheError(
                f"the mask covers {prefill.visibility.columns} columns, {prefill.new_columns} of them new, "
                f"but layer {self.layer_indices[rank]} has seen {layer.columns} before; pass a "
                "cross-attention mask over all images of the conversation, and features of the new ones only"
            )
        if not prefill.is_prepared:
            self._prepare(prefill, features[:: prefill.shared_rows.copies])
        layer.separate()
        prefill.record.note_arrival(self.layer_indices[rank], layer)
        arrival = layer.expect(prefill.onward, prefill.new_columns, prefill.shared_rows)
        return replace(arrival, replaced=prefill.replaced)

    def _prepare(self, prefill: Prefill, features: Tensor) -> None:
        """Run once before the first layer: collect captures, ask the guide, let a `FeaturePolicy` decide."""
        prefill.is_prepared = True
        if prefill.capture is not None:
            prefill.captured = prefill.captured.joined(prefill.capture())
        if {"guidance", "reconstruction"} & self.policy.needs:
            self._ask_guide(prefill, features)
        if isinstance(self.policy, FeaturePolicy):
            self._choose(self.policy, prefill, features)

    def after_text(self, view: TextView, layer: TextKVLayer | None = None) -> None:
        """Show a self-attention layer to the policy after its attention, and let the policy prune its cache.

        Args:
            view: The layer's attention, for R rows.
            layer: Its cache layer, updated, for each row of the batch; None if text is not pruned.

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
        if selection is not None:
            layer.retain(selection.repeat(prefill.shared_rows.copies))
        tokens = None if layer.slots is None else layer.tokens()
        prefill.kept.add_text(view.layer_idx, tokens, layer.seen)
        available = view.real.sum(-1).clamp(min=1)  # [R], text entries that are no padding
        fraction = torch.ones_like(available) if selection is None else prefill.text_counts / available
        prefill.record.note_text_decision(view.layer_idx, layer, watch, fraction)

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

        A `PrefillPolicy` only observes the layer here, and decides in `end`.

        Args:
            rank: Index among the cross-attention layers.
            layer: The cache layer, updated.
            scaling: Factor on attention logits.
            captured: What the adapter captured in the layer, for each row of the batch.
            follows_text: Whether a self-attention layer comes before this layer.

        Raises:
            SelectionError: If the decision breaks an invariant.
            PolicyFailedError: If the policy raises an error of its own.
            UnsupportedCacheError: If there is no cache, and the policy prunes nothing but the cache.
        """
        prefill, policy = self._running(), self.policy
        received, replaced = prefill.onward, prefill.replaced
        prefill.record.note_attention(self.layer_indices[rank], layer)
        view = self._calls.layer_view(
            prefill,
            rank,
            layer,
            received,
            captured or Captured(),
            scaling=scaling,
            follows_text=follows_text,
        )
        before = None if layer.slots is None else attended_selection(layer, received, prefill.first_new)
        context = DecisionContext(view, layer, layer.width - view.columns, before, replaced, received)
        with torch.no_grad(), Stopwatch(view.device) as watch:
            if isinstance(policy, PrefillPolicy):
                answer = self._calls.observe(policy, view)
            else:
                answer = self._calls.select(view)
        if isinstance(policy, PrefillPolicy):
            context = replace(context, view=view.without_captured())
            prefill.observed.append(ObservedLayer(context, answer, watch))
        else:
            self._apply(prefill, context, answer, watch)

    def decide(self) -> None:
        """Let a `PrefillPolicy` decide before `end`, so that the last token can be read again.

        Raises:
            SelectionError, PolicyFailedError, UnsupportedCacheError: As in `after_layer`.
        """
        self._conclude(self._running())

    def end(self, *, completed: bool, reread: bool = False) -> None:
        """Close a prefill. If it was completed, let a `PrefillPolicy` decide and write the receipts.

        A prefill that raised or was interrupted leaves no trace in the report.

        Args:
            completed: Whether the forward call returned; false if it raised an error.
            reread: Whether the last token was read again.

        Raises:
            SelectionError, PolicyFailedError, UnsupportedCacheError: As in `after_layer`.
            CompressionStateError: If the last token should have been read again, and was not.
        """
        prefill, self._prefill = self._prefill, None
        if prefill is None or not completed:
            return
        self._conclude(prefill)
        self.steps.begin()
        if self.rereads and not reread:
            raise CompressionStateError("the adapter did not read the last token again, as reread=True asks")
        self.report.count_encoder_input(reread=reread)
        if prefill.guide is not None:
            self.report.add_guide(prefill.guide)
        if not prefill.record.is_empty:
            exact, scope = self.policy.exact_budget, self.policy.budget_scope
            prefill.record.write(self.report, prefill.visibility.decode, exact, scope)
            self.history.add(prefill.kept)

    def _ask_guide(self, prefill: Prefill, features: Tensor) -> None:
        """Let the guide rank the new columns, whose features are ``[R, S, C]``."""
        if self.guide is None or prefill.prompt is None:
            raise GuideError(
                f"policy {self.policy.spec} needs guidance, but there is none: "
                f"{'no guide was given' if self.guide is None else 'the adapter provides no prompt'}"
            )
        with torch.no_grad():
            guidance = self.guide(prefill.prompt(features))
            prefill.take(guidance, features.device)
        if guidance.note:
            self.report.warn(guidance.note)

    def _choose(self, policy: FeaturePolicy, prefill: Prefill, features: Tensor) -> None:
        """Let the policy decide which columns all layers receive, from features ``[R, S, C]``."""
        view = self._calls.feature_view(prefill, features)
        with torch.no_grad(), Stopwatch(features.device) as watch:
            decision = self._calls.choose(policy, view)
        check_decision(decision, view, policy.name)
        assert isinstance(decision, Decision)
        prefill.record.note_feature_decision(watch)
        if decision.note:
            self.report.warn(decision.note)
        if decision.onward is not None:
            prefill.pass_on(decision.onward)

    def _conclude(self, prefill: Prefill) -> None:
        """Let a `PrefillPolicy` decide, once, about all layers that it observed, and apply the decisions."""
        policy, observed = self.policy, prefill.observed
        if not observed or not isinstance(policy, PrefillPolicy):
            return
        prefill.record.note_deferral()
        with torch.no_grad(), Stopwatch(observed[-1].context.view.device) as watch:
            decisions = self._calls.conclude(policy, observed)
        for number, (layer, decision) in enumerate(zip(observed, decisions, strict=True)):
            # The time of the common decision counts for the first layer.
            watches = (layer.watch, watch) if number == 0 else (layer.watch,)
            self._apply(prefill, layer.context, decision, *watches)
        observed.clear()

    def _apply(
        self, prefill: Prefill, context: DecisionContext, decision: object, *watches: Stopwatch
    ) -> None:
        """Check a decision about one layer, apply it, and record the result."""
        view, layer = context.view, context.layer
        check_decision(decision, view, self.policy.name)
        assert isinstance(decision, Decision)
        if decision.note:
            self.report.warn(decision.note)
        apply(self.policy, prefill, context, decision, self.report.warn)
        prefill.record.note_decision(view.layer_idx, layer, watches, visible=prefill.visibility.decode)
        self.steps.prepare(context, cached=prefill.cached, warn=self.report.warn)

    def _running(self) -> Prefill:
        if self._prefill is None:
            raise UnsupportedCacheError(
                "a cross-attention layer received encoder states outside the model's own forward call; "
                "call the model that was given to compress()"
            )
        return self._prefill
