"""The cross-attention cache manager: asks the policy, checks the answer, applies it to the cache layers.

It knows tensors, selections and visibility, and no model. An adapter tells it that a prefill begins, that
a layer is about to run, that it has run, and that the prefill is over:

    begin(visibility, ...)                  once per forward call that brings encoder states
    before_layer(rank, cache layer, ...)    -> which columns the layer receives; a policy that looks at
                                               features decides before the first layer
    after_layer(rank, cache layer, ...)     the policy decides and the cache keeps, or the policy observes
    end()                                   a policy that observed decides now; the receipt is written

Decoding never comes here: it reads what the cache layers hold.

Rows of the batch that are copies of one sample (its beams, its return sequences) are decided about once and
held once. Here and in views, R counts the rows that differ; what users read counts the batch B again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from kvprune.cache.copies import Twins
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.text_layer import TextKVLayer
from kvprune.engine.application import attended, carrying, retain
from kvprune.engine.guidance import Guidance, Prompt, to_rows
from kvprune.engine.measurement import PrefillRecord, Stopwatch
from kvprune.engine.prefill import Asked, Observed, Prefill
from kvprune.engine.report import CompressionReport
from kvprune.errors import (
    GuideError,
    KVPruneError,
    PolicyFailedError,
    SelectionError,
    UnsupportedCacheError,
)
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.checks import check_decision, check_text
from kvprune.policy.moments import FeaturePolicy, PrefillPolicy
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, LayerView
from kvprune.tokens.decision import Decision
from kvprune.tokens.layout import Layout
from kvprune.tokens.reindexing import compose
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["CrossKVManager"]

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class _Held:
    """What a layer's latest prefill attended to and left, by R rows."""

    attended: Selection | None
    kept: Selection
    copies: int


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
        self.seed = seed
        self.guide = guide
        self.layer_indices = tuple(layer_indices)
        self.report = CompressionReport(policy=policy.spec, seed=seed, requested=dict(policy.requested))
        self._held: dict[int, _Held] = {}
        self._text: dict[int, tuple[Tensor, int]] = {}  # tokens that entries stand for, out of how many
        self._prefill: Prefill | None = None

    @property
    def in_prefill(self) -> bool:
        """Whether a forward call that brings encoder states is running."""
        return self._prefill is not None

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that decoding uses since the latest prefill, by layer index."""
        return {layer_idx: held.kept.repeat(held.copies) for layer_idx, held in self._held.items()}

    @property
    def prefill_selections(self) -> Mapping[int, Selection | None]:
        """Columns that the latest prefill attended to, by layer index; None for all there were."""
        return {
            layer_idx: None if held.attended is None else held.attended.repeat(held.copies)
            for layer_idx, held in self._held.items()
        }

    @property
    def text_selections(self) -> Mapping[int, Selection]:
        """Tokens of the text that the latest prefill kept, by layer index; without layers that keep all."""
        return {
            layer_idx: Selection.from_mask(
                torch.zeros(*tokens.shape[:2], seen, dtype=torch.bool, device=tokens.device).scatter_(
                    -1, tokens, True
                )
            )
            for layer_idx, (tokens, seen) in self._text.items()
        }

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
        class_attention: Callable[[], Tensor] | None = None,
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
            class_attention: Returns what the encoder's class tokens pay to the new columns, ``[R, new]``,
                once the encoder has run; None unless the policy needs it.
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
            class_attention=class_attention,
        )

    def before_layer(self, rank: int, layer: CrossKVLayer, features: Tensor) -> Selection | None:
        """Announce to a cache layer what arrives, and return it for R rows: None for all new columns.

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
        if not prefill.prepared:
            prefill.prepared = True
            if "guidance" in self.policy.needs:
                self._ask_guide(prefill, features[:: prefill.twins.copies])
            if isinstance(self.policy, FeaturePolicy):
                self._choose(self.policy, prefill, features)
        layer.separate()
        prefill.record.arrives(self.layer_indices[rank], layer)
        layer.announce(prefill.onward, prefill.twins)
        return prefill.onward

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
        tokens = prefill.image_tokens.to(view.device)
        view = replace(view, image_tokens=tokens, cross_layers=len(self.layer_indices))
        prefill.text = view if "text" in self.policy.needs else None
        if layer is None:
            return
        with torch.no_grad(), Stopwatch(view.device) as watch:
            selection = self._ask(view, lambda: self.policy.select_text(view))
        prefill.text_counts = check_text(selection, view, self.policy.name, prefill.text_counts)
        drafts = layer.held - view.entries
        if selection is not None:
            layer.retain(selection.repeat(prefill.twins.copies))
        self._text.pop(view.layer_idx, None)
        if layer.slots is not None:
            self._text[view.layer_idx] = layer.tokens()[..., : layer.held - drafts], layer.seen - drafts
        available = view.real.sum(-1).clamp(min=1)
        fraction = torch.ones_like(available) if selection is None else prefill.text_counts / available
        prefill.record.pruned_text(view.layer_idx, layer, watch, drafts, fraction)

    def after_layer(
        self,
        rank: int,
        layer: CrossKVLayer,
        *,
        scaling: float,
        queries: Tensor | None = None,
        raw_keys: Tensor | None = None,
        features: Tensor | None = None,
        follows_text: bool = True,
    ) -> None:
        """Let the policy decide about a layer that has just attended, and apply the decision.

        Args:
            rank: Of the layer among the cross-attention layers.
            layer: The cache layer, updated.
            scaling: Factor on attention logits.
            queries: ``[B, Hq, T, D]``, if the policy needs them; draft rows included.
            raw_keys: ``[B, Hkv, new, D]``, likewise.
            features: ``[B, new, C]``, likewise, as they entered the layer's projections.
            follows_text: Whether a self-attention of the text comes before the layer.

        Raises:
            SelectionError: If the decision breaks an invariant.
            PolicyFailedError: If the policy raises an error of its own.
            UnsupportedCacheError: If there is no cache, but the policy prunes nothing else.
        """
        prefill = self._running()
        layer_idx, copies = self.layer_indices[rank], layer.copies
        prefill.record.attended(layer_idx, layer)
        received = prefill.onward
        arriving = prefill.arriving(received)
        first = layer.width - arriving.columns
        new = layer.own - arriving.columns  # what is quantized is of earlier images
        view = LayerView(
            keys=layer.keys[..., new:, :],
            values=layer.values[..., new:, :],
            visibility=arriving,
            layer_idx=layer_idx,
            rank=rank,
            num_layers=len(self.layer_indices),
            scaling=scaling,
            seed=self.seed,
            fingerprints=prefill.fingerprints,
            policy_name=self.policy.name,
            layout_of=prefill.layout_of(received),
            # Draft rows come last; visibility does not have them.
            captured_queries=None if queries is None else queries[::copies, :, : arriving.live.shape[1]],
            captured_raw_keys=None if raw_keys is None else raw_keys[::copies],
            captured_features=None if features is None else features[::copies],
            captured_text=prefill.text if follows_text else None,
            captured_class_attention=prefill.class_attention_of(received, layer.keys.device),
            follows_text=follows_text,
            captured_guidance=prefill.guidance_of(received),
        )
        before = None if layer.slots is None else attended(layer, received, prefill.first_new)
        asked = Asked(view, layer, first, before)
        with torch.no_grad(), Stopwatch(layer.keys.device) as watch:
            policy = self.policy
            if isinstance(policy, PrefillPolicy):
                statistics = self._ask(view, lambda: policy.observe(view))
                decision = None
            else:
                decision = self._ask(view, lambda: policy.select(view))
        if decision is None:
            kept_views = replace(
                asked.view,
                captured_queries=None,
                captured_raw_keys=None,
                captured_features=None,
                captured_class_attention=None,
                captured_text=None,
                captured_guidance=None,
            )
            prefill.observed.append(Observed(replace(asked, view=kept_views), statistics, watch))
        else:
            self._apply(prefill, asked, decision, watch)

    def end(self, *, completed: bool) -> None:
        """Close a prefill; write its receipt if it came to its end.

        Raises:
            SelectionError, PolicyFailedError, UnsupportedCacheError: As `after_layer`, from a policy that
                decides when all layers have attended.
        """
        prefill, self._prefill = self._prefill, None
        if prefill is None or not completed:
            return
        if prefill.observed:
            self._conclude(prefill)
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
            scores = to_rows(guidance, rows, copies, prefill.new_columns)
        self.report.add_guide(guidance.receipt)
        prefill.guidance = scores.to(features.device)
        prefill.prompt = None  # it holds the whole input

    def _choose(self, policy: FeaturePolicy, prefill: Prefill, features: Tensor) -> None:
        """Let the policy decide what all layers receive."""
        view = FeatureView(
            visibility=prefill.arriving(None),
            num_layers=len(self.layer_indices),
            seed=self.seed,
            fingerprints=prefill.fingerprints,
            policy_name=self.policy.name,
            layout_of=prefill.layout,
            captured_features=features[:: prefill.twins.copies],
            captured_guidance=prefill.guidance,
            captured_class_attention=prefill.class_attention_of(None, features.device),
        )
        with torch.no_grad(), Stopwatch(features.device) as watch:
            decision = self._ask(view, lambda: policy.choose(view))
        check_decision(decision, view, self.policy.name)
        prefill.record.chosen(watch)
        if decision.note:
            self.report.warn(decision.note)
        if decision.onward is not None:
            prefill.onward = compose(None, decision.onward)

    def _conclude(self, prefill: Prefill) -> None:
        """Let the policy decide about all layers that it has observed."""
        policy, observed = self.policy, prefill.observed
        assert isinstance(policy, PrefillPolicy)
        prefill.record.waited()
        views = [layer.asked.view for layer in observed]
        with torch.no_grad(), Stopwatch(views[-1].device) as watch:
            decisions = self._ask(
                views[-1], lambda: list(policy.conclude(views, [layer.statistics for layer in observed]))
            )
        if len(decisions) != len(views):
            raise SelectionError(
                f"policy {policy.name!r}: conclude returned {len(decisions)} decisions, "
                f"expected one for each of {len(views)} layers"
            )
        for number, (layer, decision) in enumerate(zip(observed, decisions, strict=True)):
            watches = (layer.watch, watch) if number == 0 else (layer.watch,)
            if isinstance(decision, Decision) and decision.onward is not None:
                raise SelectionError(
                    f"policy {policy.name!r} {layer.asked.view.where}: conclude decided what later layers "
                    "receive, but all of them have attended; return Decision(cache=...)"
                )
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
                self._require_onward(decision, layer_idx)
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
        self._held[layer_idx] = _Held(asked.attended, kept, layer.copies)
        prefill.record.decided(layer_idx, layer, watches, visible=prefill.visibility.decode)

    def _ask(self, view: FeatureView | LayerView | TextView, question: Callable[[], _Answer]) -> _Answer:
        """Ask the policy; what it raises is named after it."""
        try:
            return question()
        except (KVPruneError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PolicyFailedError(
                f"policy {self.policy.name!r} raised {type(error).__name__} {view.where}: {str(error)[:500]}"
            ) from error

    def _require_onward(self, decision: Decision, layer_idx: int) -> None:
        if decision.cache is not None and decision.onward is None:
            raise UnsupportedCacheError(
                f"policy {self.policy.spec} prunes the cache of layer {layer_idx} after its attention, but "
                "the model was called without a cache (use_cache=False, or gradient checkpointing), so "
                "nothing would be pruned; call it with use_cache=True, or choose a policy that decides "
                "onward (trim, or reach=onward)"
            )
        if decision.cache is not None and decision.cache.quantizes:
            raise UnsupportedCacheError(
                f"policy {self.policy.spec} quantizes the cache of layer {layer_idx}, but the model was "
                "called without a cache (use_cache=False, or gradient checkpointing), so nothing would be "
                "quantized; call it with use_cache=True"
            )

    def _running(self) -> Prefill:
        if self._prefill is None:
            raise UnsupportedCacheError(
                "a cross-attention layer received encoder states outside the model's own forward call; "
                "call the model that was given to compress()"
            )
        return self._prefill
