"""What an adapter is: the only code that knows a model family, and how it meets the cache manager."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvprune.adapters.attachment import Attachment
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


@dataclass(frozen=True)
class Site:
    """One place where a model attends to encoder states.

    Attributes:
        layer_idx: Of the decoder layer.
        module: The cross-attention module.
        states: Its argument for encoder states.
        mask: Its argument for the attention mask.
    """

    layer_idx: int
    module: Any
    states: str
    mask: str


class ModelAdapter(Attachment, ABC):
    """Translates the forward calls of one model family into calls of the manager.

    An adapter hooks modules of one model and restores it to the last attribute (KV12). It neither decides
    nor stores: decisions are the policy's, state is the cache layer's.

    Class attributes:
        family: What the family is called, for messages and tables.
        model_classes: Names of the transformers classes that it supports.
        provides: What it can capture, by the names that policies use in `CrossKVPolicy.needs`.
    """

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    provides: ClassVar[frozenset[str]] = frozenset({"queries", "raw_keys", "features"})

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, type(self).family)
        self._manager: CrossKVManager | None = None

    @property
    def manager(self) -> CrossKVManager:
        """The manager that the adapter is attached to.

        Raises:
            CompressionStateError: If it is attached to none.
        """
        if self._manager is None:
            raise CompressionStateError(f"the {self.family} adapter is attached to no model now")
        return self._manager

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Decide by inheritance alone: a class with a broken metaclass must not fail `isinstance`."""
        return cls in type.__getattribute__(other, "__mro__")

    @classmethod
    def matches(cls, model: object) -> bool:
        """Whether this adapter supports a model: one of its classes, or a class derived from one."""
        return any(base.__name__ in cls.model_classes for base in type(model).__mro__)

    @classmethod
    @abstractmethod
    def probe(cls) -> list[Probe]:
        """Check what the adapter relies on in the installed transformers, without a model."""

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny model of the family in eval mode, and a batch for it; `kvprune check` uses them.

        Optional. Without it, call `kvprune.testing.check_adapter` with functions that make both.

        Args:
            dtype: Of the weights, and of inputs that are floating point.

        Raises:
            PluginError: If the adapter has none.
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
            UnsupportedModelError: If the adapter does not say where they are; then no oracle can look there.
        """
        raise UnsupportedModelError(
            f"adapter {type(self).__name__} does not say where {self.family} attends to encoder states; "
            "give it a property `sites` that returns one Site for each cross-attention module"
        )

    @property
    def layer_indices(self) -> Sequence[int]:
        """Indices of the cross-attention layers in the decoder, in order."""
        return tuple(site.layer_idx for site in self.sites)

    @abstractmethod
    def attach(self, manager: CrossKVManager) -> None:
        """Hook the model, so that the manager learns of each prefill and decoding reads what it kept.

        Set ``self._manager`` first: hooks find it as ``self.manager``.
        """

    def geometry(self) -> Mapping[str, object] | None:
        """Return what two models must have in common so that a token means the same to both; None if unknown.

        A guide of the same geometry has the same encoder tokens in the same order, and the same token ids.
        """
        return None

    def replay(
        self, prompt: Prompt, answer: Tensor | None = None, written: Tensor | None = None
    ) -> Tensor | None:
        """Run the model over a prompt and an answer, in one forward call that leaves no cache.

        Optional; without it, the family supports no policy that needs guidance.

        Args:
            prompt: What another forward call was given.
            answer: int64 ``[R, n]``; its last tokens are not read, as in generation.
            written: bool ``[R, n]``, which of them belong to the answer.

        Returns:
            Logits ``[R, n, V]`` of the rows that predict the answer; None without one.

        Raises:
            GuideError: If the model cannot read the prompt.
        """
        raise GuideError(f"the adapter for {self.family} cannot run a guide: it does not define replay()")

    def answer(self, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Generate greedily.

        Args:
            prompt: What another forward call was given.
            max_new_tokens: Limit.

        Returns:
            New tokens, int64 ``[R, n]``; and which of them belong to the answer, bool, the same shape.

        Raises:
            GuideError: If the model cannot read the prompt, or cannot generate.
        """
        raise GuideError(
            f"a guide of the family {self.family} is asked about the prompt only; "
            f"use max_new_tokens=0, got {max_new_tokens}"
        )

    @classmethod
    def require_needs(cls, policy: CrossKVPolicy) -> None:
        """Raise if a policy needs what this adapter does not provide.

        Raises:
            UnsupportedModelError: Naming the policy, the family, and what is missing.
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
            IncompatibleTransformersError: Naming each probe that failed.
        """
        try:
            failed = [probe for probe in cls.probe() if not probe.ok]
        except Exception as error:  # an adapter of a third party: what it could not look at is not there
            failed = [Probe("probe", False, f"raised {type(error).__name__}: {str(error)[:200]}")]
        if failed:
            details = "; ".join(f"{probe.name}: {probe.detail}" for probe in failed)
            raise IncompatibleTransformersError(
                f"the installed transformers lacks what the {cls.family} adapter relies on: {details}. "
                "A wrong number would be worse than none; run `kvprune doctor`"
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
