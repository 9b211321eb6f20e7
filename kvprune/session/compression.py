"""`compress` and `Compression`: put a model under a policy, and take it back out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers.cache_utils import Cache

from kvprune.adapters.attachment import compressing
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.compiled import compiled_part
from kvprune.adapters.stepping import require_steps
from kvprune.engine.guidance import Guidance
from kvprune.engine.kept import KeptSelections
from kvprune.engine.manager import CrossKVManager
from kvprune.engine.report import CompressionReport
from kvprune.engine.step_counts import StepRead
from kvprune.errors import CompressionStateError, NestedCompressionError, PolicyNeverRanError
from kvprune.policy.base import CrossKVPolicy, require_policy_class
from kvprune.policy.declarations import require_declarations
from kvprune.policy.spec import PolicySpec
from kvprune.session.answer_guide import AnswerGuide
from kvprune.session.binding import bound_guide
from kvprune.session.guide import Guide
from kvprune.session.reconstruction import BoundReconstruction
from kvprune.session.registry import load
from kvprune.session.saved_cache import SavedCache, require_loaded
from kvprune.session.saving import save_cache
from kvprune.session.trained_weights import require_weights, weights_facts
from kvprune.text import shown
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection

__all__ = ["Compression", "compress", "require_uncompressed"]


def compress(
    model: nn.Module,
    policy: str | PolicySpec | CrossKVPolicy | SavedCache,
    *,
    seed: int = 0,
    guide: nn.Module | Guide | Guidance | AnswerGuide | BoundReconstruction | None = None,
    reread: bool = False,
) -> Compression:
    """Compress the cross-attention cache of a model inside a ``with`` block.

    Every ``generate`` or forward call inside the block runs under the policy. To keep a model under a policy
    for longer, call `Compression.attach` and `Compression.detach` instead.

    Args:
        model: A supported transformers model (``kvprune doctor`` lists them).
        policy: A spec such as ``"trim:k_ratio=0.25"``, or a policy; or a cache that `kvprune.load_cache` has
            loaded for this model, which brings its policy and seed: then questions to it can be asked.
        seed: Seed of policies that draw random numbers.
        guide: For policies that need guidance, such as ``guided``: another model with the same vision
            geometry, or a `kvprune.Guide` with options. With None the model guides itself, in an extra pass
            over each prompt. A `kvprune.Guidance` is what a guide found out about one batch; generate from
            that batch only. Policies that read the answer take only a Guidance that
            `kvprune.answer_attention` made, or an `AnswerGuide`. The guide runs inside
            the model's forward call, and its cost is in the report.
        reread: Whether the last prompt token is read again from the pruned cache before the first answer
            token is predicted. Otherwise the first answer token comes from a row that has attended to tokens
            that are dropped, and an answer of one token shows nothing of the pruning (docs/hooks.md).

    Returns:
        The compression, not yet attached to the model.

    Raises:
        UnsupportedModelError: If no adapter supports the model (lists the supported ones), or its adapter
            cannot capture what the policy needs, or cannot read the last token again.
        IncompatibleTransformersError: If transformers lacks something that the adapter relies on.
        GuideError: If the guide cannot guide this model, or the policy does not use a guide.
        PolicyFailedError: If the policy cannot say what it needs or requests, or says something impossible.
        SpecError, UnknownPolicyError, PolicyOptionError, PluginError: If the spec names no usable policy.
        SavedCacheError: If a cache was loaded for another model, or has another seed; or for its path.
        WeightsError: If the policy's weights were trained for a model of another geometry.

    Example:
        >>> with kvprune.compress(model, "trim:keep_ratio=0.25") as run:  # doctest: +SKIP
        ...     out = model.generate(**inputs, max_new_tokens=32)
        >>> print(run.report)  # doctest: +SKIP
    """
    registry = load()
    adapter = registry.adapter_for(model)
    require_loaded(policy)
    saved = policy if isinstance(policy, SavedCache) else None
    if saved is not None:
        saved.require(model, seed)
        seed, reread = saved.seed, reread or saved.reread
    resolved = registry.resolve(policy.policy if isinstance(policy, SavedCache) else policy)
    require_policy_class(resolved.cls)
    adapter.require_probes()
    return Compression(adapter(model), resolved.policy, seed, guide, reread=reread, saved=saved)


class Compression:
    """One policy on one model: attach, generate, read what happened, detach.

    Attributes:
        policy: The policy that runs.
        reread: Whether the last prompt token is read again from the pruned cache.
        report: What was kept and held so far, a `CompressionReport`.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        policy: CrossKVPolicy,
        seed: int,
        guide: nn.Module | Guide | Guidance | AnswerGuide | BoundReconstruction | None = None,
        *,
        reread: bool = False,
        saved: SavedCache | None = None,
    ) -> None:
        require_declarations(policy)
        adapter.require_needs(policy)
        require_steps(adapter, policy)
        if saved is None:  # what was pruned already asks no weights, unless another image arrives
            require_weights(adapter, policy)
        if not isinstance(reread, bool):
            raise CompressionStateError(f"reread is True or False, got {shown(reread)}")
        if reread:
            adapter.require_rereading()
        self.policy = policy
        self.reread = reread
        self._adapter = adapter
        # A loaded cache needs no guide, unless another image arrives: then the manager says so.
        guides = None if saved is not None and guide is None else bound_guide(guide, adapter, policy)
        self._manager = CrossKVManager(policy, seed, adapter.layer_indices, guides, rereads=reread)
        report = self._manager.report
        report.unit, report.seconds_per_column = adapter.column_unit, adapter.column_seconds
        report.weights = weights_facts(policy)
        if saved is not None:
            saved.begin(self._manager)
        self._seed = seed
        self._attached = False
        self._reads: list[StepRead] = []

    @property
    def report(self) -> CompressionReport:
        """What was kept and held so far, and read in decode steps.

        Raises:
            SelectionError: If a policy that decides in decode steps gave an answer that breaks an invariant.
        """
        self._manager.report.set_steps(self._manager.steps.settle())
        return self._manager.report

    @property
    def selections(self) -> Mapping[int, Selection]:
        """Columns that decoding uses after the latest prefill, by layer index."""
        return self._manager.history.kept.selections

    @property
    def prefill_selections(self) -> Mapping[int, Selection | None]:
        """Columns that each layer attended to in its latest prefill, by layer index; None means all."""
        return self._manager.history.kept.prefill_selections

    @property
    def text_selections(self) -> Mapping[int, Selection]:
        """Text tokens that decoding uses after the latest prefill, by layer index.

        Holds only layers whose text a policy pruned. Tokens that came after the prefill are kept as well and
        are not listed.
        """
        return self._manager.history.kept.text_selections

    def recording(self) -> AbstractContextManager[Sequence[KeptSelections]]:
        """Keep what each prefill in a block decides, and not only the latest one.

        A call of ``generate`` has several prefills if a model reads its input window by window, as Whisper
        reads long recordings, and one otherwise. `CompressionReport.windows` says what each one has read.
        Selections take memory on the model's device (about 1 % of the cache of each prefill), so none but
        the latest are kept without this block.

        Returns:
            A context manager that yields what was kept, one entry for each prefill in order; the list grows
            while the model runs. Each entry has `selections`, `prefill_selections` and `text_selections`, as
            the compression has for the latest prefill.

        Example:
            >>> with kvprune.compress(model, "trim") as run, run.recording() as kept:  # doctest: +SKIP
            ...     out = model.generate(**inputs, return_timestamps=True)
            >>> for window, one in zip(run.report.windows, kept, strict=True):  # doctest: +SKIP
            ...     print(window.starts, one.selections[0].counts())
        """
        return self._manager.history.recording()

    def save(
        self,
        cache: Cache,
        path: str | os.PathLike[str],
        inputs: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        """Save the cache of the latest prefill in a file, to ask it later (docs/saved-caches.md).

        The file (safetensors) has what the cache holds, the selections, and a digest of each tensor. Text of
        the prompt is saved with it, except for encoder-decoder models: their decoder reads each prompt anew.

        Args:
            cache: The ``past_key_values`` that ``model(**inputs)`` has returned.
            path: Where.
            inputs: Arguments of that call.
            overwrite: Whether a file that is already there is replaced.

        Raises:
            SavedCacheError: If the cache is not the one that the latest prefill has filled, is static,
                quantized or offloaded, or does not fit to the inputs; or if the file exists already.

        Example:
            >>> with kvprune.compress(model, "keydiff:keep_ratio=0.2") as run:  # doctest: +SKIP
            ...     run.save(model(**inputs).past_key_values, "page.safetensors", inputs)
        """
        save_cache(self._adapter, self._manager, cache, path, inputs, seed=self._seed, overwrite=overwrite)

    @property
    def step_reads(self) -> Sequence[StepRead]:
        """What decode steps have read since `record_steps`, in order; for oracles."""
        return tuple(self._reads)

    def record_steps(self) -> None:
        """Note from now on what each decode step reads, which takes memory for each step."""
        self._reads.clear()
        self._manager.steps.recorder = self._reads.append

    @property
    def replacements(self) -> Mapping[int, Replacement]:
        """New tokens that the latest prefill fed to its layers, by layer index, since `record_replacements`.

        `prefill_selections` says which of them a layer attended to: those in whose places it has columns.
        Layers that received the encoder's own features are left out.

        Raises:
            CompressionStateError: If there were new tokens, and they were not recorded.
        """
        return self._manager.history.kept.replacements

    def record_replacements(self) -> None:
        """Keep from now on the new tokens' features after each prefill, on the model's device; for oracles.

        They take ``[B, K, C]`` numbers. Without this call they are freed when the prefill ends.
        """
        self._manager.history.keeps_features = True

    @property
    def is_attached(self) -> bool:
        """Whether the model runs under the policy now."""
        return self._attached

    def attach(self) -> Self:
        """Put the model under the policy until `detach` is called.

        Raises:
            CompressionStateError: If this compression is already attached.
            NestedCompressionError: If the model, or a part of it, is already being compressed.
        """
        if self._attached:
            raise CompressionStateError(f"this compression ({self.policy.spec}) is attached already")
        require_uncompressed(self._adapter.model)
        try:
            self._adapter.attach(self._manager)
        except BaseException:
            self._adapter.detach()
            raise
        self._attached = True
        return self

    def detach(self) -> None:
        """Restore every hook and attribute of the model (KV12). Does nothing if already detached."""
        self._attached = False
        self._adapter.detach()

    def check_steps(self) -> None:
        """Raise what was wrong in decode steps and was not raised there, because it lay on a device.

        Raises:
            SelectionError: If the policy gave an answer that breaks an invariant.
        """
        self._manager.steps.settle()

    def check_ran(self) -> None:
        """Raise if the policy did not run, although the model did.

        Raises:
            PolicyNeverRanError: If the model received encoder states under the policy, but the policy never
                decided; or if no call reached the hooks of a model that was compiled before. Says what was
                seen.
        """
        report, model = self.report, self._adapter.model  # raises what was wrong in decode steps
        if report.encoder_inputs and not report.prefills:
            raise PolicyNeverRanError(
                f"policy {self.policy.spec} never ran, although encoder states went through the model "
                f"{report.encoder_inputs} times; no cross-attention layer reached its "
                f"decision{_compiled(model)}"
            )
        if not report.prefills and not self._adapter.calls and (hint := _compiled(model)):
            raise PolicyNeverRanError(
                f"policy {self.policy.spec} never ran: no call of {type(model).__name__} reached it{hint}"
            )

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if error is None:
            self.check_ran()


def require_uncompressed(model: nn.Module) -> None:
    """Raise if a model, or a part of it, is being compressed or contrasted.

    Raises:
        NestedCompressionError: Says by what.
    """
    running = compressing(model)
    if running is not None:
        raise NestedCompressionError(
            f"{type(model).__name__} is being compressed already ({running}); "
            "two policies on one model would hide each other: leave the first block, or detach it"
        )


def _compiled(model: nn.Module) -> str:
    """Return the end of a message about a model that was compiled; empty if it was not."""
    part = compiled_part(model)
    if part is None:
        return ""
    return (
        f". Code was compiled from this model ({part}), and compiled code skips what is attached later: "
        "call torch._dynamo.reset() before the block, or the model itself; in the block, let generate "
        "compile decode steps (compile_config)"
    )
