"""`contrast`: at each token, compare what a model says with what it says when its cache is pruned.

A model that reads everything and the same model that reads a few encoder tokens differ where these tokens
matter. A rule combines both answers token by token (contrastive decoding). It saves nothing: a second branch
runs beside the first one, with a text cache of its own and a pruned cross-attention cache. Both share the
encoder's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from torch import nn

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.second_branch import CallRecorder
from kvprune.engine.kept import KeptSelections
from kvprune.errors import CompressionStateError, ContrastError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.moments import FeaturePolicy
from kvprune.policy.spec import PolicySpec
from kvprune.session.compression import Compression, compress, require_uncompressed
from kvprune.session.contrast_processor import ContrastProcessor, require_options
from kvprune.session.contrast_report import ContrastReport
from kvprune.session.contrast_rules import CombineRule
from kvprune.session.rules import get_rule
from kvprune.tokens.selection import Selection

__all__ = ["Contrast", "contrast"]


def contrast(
    model: nn.Module,
    against: str | PolicySpec | CrossKVPolicy,
    combine: str | CombineRule,
    *,
    seed: int = 0,
) -> Contrast:
    """Contrast a model with itself under a pruning policy, inside a ``with`` block.

    Every ``generate`` inside the block asks two branches for each token: the model as it is, and the model
    with a cache that the policy prunes. A logits processor, the first in the list, combines what they say.
    Greedy decoding, sampling, beams and return sequences work as always. The second branch answers from the
    pruned cache from its first token on: unless the policy decides from features, before the first
    cross-attention layer, the last prompt token is read again (``reread`` of `kvprune.compress`).

    Args:
        model: A supported transformers model that can generate (``kvprune doctor`` lists them).
        against: The policy of the second branch, a spec such as ``"divprune:keep_ratio=0.1"``. It must drop
            something.
        combine: The rule that combines both branches: a spec such as ``"mint:alpha=0.5"`` or ``"mod"``, or a
            `CombineRule`.
        seed: Seed of policies that draw random numbers.

    Returns:
        The contrast, not yet attached to the model.

    Raises:
        ContrastError: If there is no such rule, its options are out of range, or the model cannot generate.
        UnsupportedModelError, IncompatibleTransformersError, PolicyFailedError, SpecError,
        UnknownPolicyError, PolicyOptionError, PluginError: As `kvprune.compress` raises them.

    Example:
        >>> with kvprune.contrast(model, "snapkv:keep_ratio=0.2", "mod") as run:  # doctest: +SKIP
        ...     out = model.generate(**inputs, max_new_tokens=32)
        >>> print(run.report)  # doctest: +SKIP
    """
    rule = get_rule(combine)
    if not any(getattr(part, "can_generate", lambda: False)() for part in model.modules()):
        raise ContrastError(
            f"contrast works in generate, and {type(model).__name__} cannot generate; pass the model with "
            "its language head"
        )
    second = compress(model, against, seed=seed)
    if not isinstance(second.policy, FeaturePolicy):
        _require_rereading(second)
        second = compress(model, second.policy, seed=seed, reread=True)
    return Contrast(second, rule)


def _require_rereading(second: Compression) -> None:
    """Raise if the second branch cannot read the last prompt token from its pruned cache."""
    adapter: ModelAdapter = second._adapter
    if not adapter.rereads:
        raise ContrastError(
            f"policy {second.policy.spec} decides when the prompt has been read, so the second branch must "
            f"read its last token again, which {adapter.family} cannot do; choose a policy that decides from "
            "features, such as against='divprune:keep_ratio=0.1'"
        )


class Contrast:
    """Two branches of one model and the rule that combines them: attach, generate, read, detach.

    Attributes:
        against: The policy of the second branch.
        combine: The rule.
    """

    def __init__(self, second: Compression, rule: CombineRule) -> None:
        self._second = second
        adapter: ModelAdapter = second._adapter
        self._adapter = adapter
        self.against = second.policy
        self.combine = rule
        self._report = ContrastReport(rule.spec, second.report)
        if "class_attention" in second.policy.needs:
            raise ContrastError(
                f"policy {second.policy.spec} needs view.class_attention, which the vision encoder computes, "
                "but the second branch does not run it again; choose another policy, such as "
                "against='divprune:keep_ratio=0.1'"
            )
        label = f"contrast with {second.policy.spec}"
        self._recorder = CallRecorder(adapter.model, label, adapter.encoding, self._processor)

    @property
    def report(self) -> ContrastReport:
        """What it cost, and what the second branch kept so far and read in decode steps.

        Raises:
            SelectionError: If a policy that decides in decode steps gave an answer that breaks an invariant.
        """
        self._report.against = self._second.report  # counts what decode steps have read
        return self._report

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that the second branch reads after the latest prefill, by layer index."""
        return self._second.selections

    @property
    def prefill_selections(self) -> Mapping[int, Selection | None]:
        """Columns that each layer of the second branch attended to in its latest prefill; None means all."""
        return self._second.prefill_selections

    def recording(self) -> AbstractContextManager[Sequence[KeptSelections]]:
        """Keep what each prefill of the second branch decides; see `Compression.recording`."""
        return self._second.recording()

    @property
    def rereads(self) -> bool:
        """Whether the second branch reads the last prompt token again from its pruned cache."""
        return self._second.reread

    @property
    def is_attached(self) -> bool:
        """Whether the model is contrasted now."""
        return self._second.is_attached

    def attach(self) -> Self:
        """Contrast the model until `detach` is called.

        Raises:
            CompressionStateError: If this contrast is already attached.
            NestedCompressionError: If the model, or a part of it, is being compressed or contrasted.
        """
        if self.is_attached:
            raise CompressionStateError(f"this {self._recorder.label} is attached already")
        require_uncompressed(self._adapter.model)
        try:
            self._recorder.attach()  # first, because both replace the method that asks for drafts
            with self._recorder.paused():
                self._second.attach()
            self._adapter.wait()
        except BaseException:
            self.detach()
            raise
        self._seen, self._made = self._recorder.seen, 0
        return self

    def detach(self) -> None:
        """Restore every hook and attribute of the model (KV12). Does nothing if already detached."""
        self._recorder.detach()
        self._second.detach()

    def _processor(self, module: nn.Module, options: Any) -> ContrastProcessor:
        self._made += 1
        require_options(options)
        return ContrastProcessor(
            self._adapter,
            self._second._manager,
            self._recorder,
            self.combine,
            self._report,
            options.num_beams or 1,
        )

    def _check_ran(self) -> None:
        """Raise if the model was called, but not by ``generate``.

        Raises:
            ContrastError: Says what would be right.
        """
        if self._recorder.seen > self._seen and not self._made:
            raise ContrastError(
                f"{type(self._adapter.model).__name__} was called inside the block, but no token was "
                "contrasted: contrast works in model.generate, and not in a forward call"
            )

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if error is None:
            self._check_ran()
            self._second.check_steps()
