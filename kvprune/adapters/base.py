"""The interface of an adapter, the only code that knows a model family.

An adapter hooks the model's modules and turns its forward calls into calls of the cache manager. One prefill,
from the model's forward call to the pruned cache:

1. The model is called. The adapter's first hook calls `begin_call`, which discards what an interrupted call
   has left and refuses a second thread, and makes a `kvprune.adapters.call.Call`. If the arguments bring
   encoder states, it calls `CrossKVManager.begin` with the visibility of the columns, and adds the hooks that
   capture what the policy needs.
2. Before each cross-attention layer, a hook puts a `CrossKVLayer` in the cache and calls `Call.before_layer`.
   The layer's arguments are replaced: only the features that arrive, and a mask of the same width.
3. The stock layer projects the features, updates the cache and attends.
4. After the layer, a hook calls `Call.after_layer`. The manager asks the policy
   (`kvprune.engine.policy_calls`) and prunes the cache layer (`kvprune.engine.application`).
5. After the model, also if it raised, a hook calls `finish_call`, which discards the `Call` and calls
   `CrossKVManager.end`.

Decode steps read the pruned cache layers; hooks only cut the mask to what each layer holds. A policy that
decides at each decode step, or about logits, takes one more hook that calls the manager (see
`kvprune.engine.manager`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvprune.adapters.attachment import Attachment
from kvprune.adapters.call import Call
from kvprune.adapters.probes import Probe
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import (
    CompressionStateError,
    GuideError,
    IncompatibleTransformersError,
    PluginError,
    UnsupportedModelError,
)
from kvprune.policy.base import CrossKVPolicy

__all__ = ["ModelAdapter", "Site"]

_RETURN_NO_WEIGHTS = ("sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Implementations of attention that return no weights, so that decoding needs no hook for them."""


@dataclass(frozen=True)
class Site:
    """One cross-attention module of a model.

    Attributes:
        layer_idx: Index of the decoder layer.
        module: The cross-attention module.
        states: Name of its argument for encoder states.
        mask: Name of its argument for the attention mask.
    """

    layer_idx: int
    module: Any
    states: str
    mask: str


class ModelAdapter(Attachment, ABC):
    """Translates the forward calls of one model family into calls of the manager.

    An adapter hooks modules of one model, and `detach` restores every attribute (KV12). It makes no decisions
    and keeps no keys or values: policies decide, cache layers hold the state.

    Class attributes:
        family: Name of the family, for messages and tables.
        model_classes: Names of the supported transformers classes.
        provides: What the adapter can capture, by the names that policies use in `CrossKVPolicy.needs`.
        captured_in_encoder: What of it is captured while the encoder runs.
    """

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    provides: ClassVar[frozenset[str]] = frozenset({"queries", "raw_keys", "features"})
    captured_in_encoder: ClassVar[frozenset[str]] = frozenset({"class_attention"})

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, type(self).family)
        self._manager: CrossKVManager | None = None
        self._call: Call | None = None
        self._spreads_weights = False

    @property
    def manager(self) -> CrossKVManager:
        """The manager that the hooks call.

        Raises:
            CompressionStateError: If the adapter is not attached.
        """
        if self._manager is None:
            raise CompressionStateError(f"the {self.family} adapter is not attached to a model")
        return self._manager

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Decide by inheritance alone, so that `isinstance` works on a broken metaclass."""
        return cls in type.__getattribute__(other, "__mro__")

    @classmethod
    def matches(cls, model: object) -> bool:
        """Whether the adapter supports a model: an instance of `model_classes` or of a derived class."""
        return any(base.__name__ in cls.model_classes for base in type(model).__mro__)

    @classmethod
    @abstractmethod
    def probe(cls) -> list[Probe]:
        """Check that the installed transformers has what the adapter relies on; needs no model."""

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny model of the family in eval mode, and a batch for it; `kvprune check` uses them.

        Optional. Without it, call `kvprune.testing.check_adapter` with functions that make both.

        Args:
            dtype: Dtype of the weights and of floating-point inputs.

        Raises:
            PluginError: If the adapter does not define it.
        """
        raise PluginError(
            f"adapter {cls.__name__} does not say how to make a tiny example; give it a classmethod "
            "example(cls, dtype) that returns (model, inputs), or call kvprune.testing.check_adapter("
            f"{cls.__name__}, make_model, make_inputs) in a test"
        )

    @property
    def sites(self) -> Sequence[Site]:
        """The cross-attention modules of the model, in the order of their layers.

        Raises:
            UnsupportedModelError: If the adapter does not define it. Checks against the stock model need it.
        """
        raise UnsupportedModelError(
            f"adapter {type(self).__name__} does not say where {self.family} attends to encoder states; "
            "give it a property `sites` that returns one Site for each cross-attention module"
        )

    @property
    def encoder(self) -> nn.Module | None:
        """The module whose output depends on no policy, such as a vision tower; None if there is none."""
        return None

    @property
    def layer_indices(self) -> Sequence[int]:
        """Indices of the cross-attention layers in the decoder, in order."""
        return tuple(site.layer_idx for site in self.sites)

    @abstractmethod
    def attach(self, manager: CrossKVManager) -> None:
        """Hook the model, so that prefill calls the manager and decoding reads the pruned cache.

        Set ``self._manager`` first: hooks read it as ``self.manager``.
        """

    def detach(self) -> None:
        """Undo `attach`, and forget a forward call that was interrupted."""
        super().detach()
        self._spreads_weights = False
        self._forget_call()

    def begin_call(self) -> None:
        """Start a forward call of the model; the first thing that a hook does.

        Raises:
            CompressionStateError: If another thread is inside a forward call.
        """
        self.open_call()
        self._forget_call()

    def spread_weights(self, config: Any) -> None:
        """Put attention weights that cross-attention returns back to their columns, from now on.

        Call it in each forward call: it adds hooks once, and only if the model's attention returns weights.

        Args:
            config: The config of the decoder.
        """
        if self._spreads_weights or config._attn_implementation in _RETURN_NO_WEIGHTS:
            return
        self._spreads_weights = True
        for site in self.sites:
            self.after(site.module, self._spread, first=True)

    def _spread(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return None if self._call is None else self._call.all_columns(output, module)

    def finish_call(self, *, completed: bool) -> None:
        """End a forward call, and its prefill if it was one.

        Args:
            completed: Whether the model returned; false if it raised.
        """
        if not self.close_call():
            return
        self._call = None
        if self.manager.in_prefill:
            self.manager.end(completed=completed)

    def _forget_call(self) -> None:
        """Discard the state of a forward call that never ended."""
        self._call = None
        if self._manager is not None:
            self._manager.end(completed=False)

    def geometry(self) -> Mapping[str, object] | None:
        """Return the properties that a guide must share with its target; None if unknown.

        Models of the same geometry have the same encoder tokens in the same order, and the same token ids.
        """
        return None

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the model over a prompt and an answer, in one forward call that leaves no cache.

        Optional; without it, the family supports no policy that needs guidance.

        Args:
            prompt: Inputs of the target's forward call.
            answer: int64 ``[R, n]``, tokens after the prompt; the last one is only predicted, not read.
            written: bool ``[R, n]``, which of them belong to the answer; the rest is padding.

        Returns:
            Logits ``[R, n, V]`` of the rows that predict the answer; None without an answer.

        Raises:
            GuideError: If the model cannot read the prompt.
        """
        raise GuideError(f"the adapter for {self.family} cannot run a guide: it does not define replay()")

    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Generate an answer to a prompt greedily.

        Args:
            prompt: Inputs of the target's forward call.
            max_new_tokens: Most tokens to generate.

        Returns:
            New tokens, int64 ``[R, n]``, and which of them belong to the answer, bool ``[R, n]``.

        Raises:
            GuideError: If the model cannot read the prompt, or cannot generate.
        """
        raise GuideError(
            f"a guide of the family {self.family} cannot generate, it only reads the prompt; "
            f"use max_new_tokens=0, got {max_new_tokens}"
        )

    @classmethod
    def require_needs(cls, policy: CrossKVPolicy) -> None:
        """Raise if a policy needs something that this adapter does not provide.

        Raises:
            UnsupportedModelError: Names the policy, the family, and what is missing.
        """
        if missing := policy.needs - cls.provides:
            raise UnsupportedModelError(
                f"policy {policy.name!r} needs {_listed(missing)}, which the {cls.family} adapter does not "
                f"provide (it provides {_listed(cls.provides) or 'nothing'}); "
                "use another policy, or another model"
            )

    @classmethod
    def require_probes(cls) -> None:
        """Raise if the installed transformers lacks something that the adapter relies on.

        Raises:
            IncompatibleTransformersError: Names each probe that failed.
        """
        try:
            failed = [probe for probe in cls.probe() if not probe.ok]
        except Exception as error:  # a third-party adapter whose probe itself breaks
            failed = [Probe("probe", False, f"raised {type(error).__name__}: {str(error)[:200]}")]
        if failed:
            details = "; ".join(f"{probe.name}: {probe.detail}" for probe in failed)
            raise IncompatibleTransformersError(
                f"the installed transformers lacks what the {cls.family} adapter relies on: {details}. "
                "Results could be wrong, so the model is refused; run `kvprune doctor` for details"
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
