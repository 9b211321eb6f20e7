"""What an adapter is: the only code that knows a model family, and how it meets the cache manager."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvprune.adapters.probes import Probe
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import (
    GuideError,
    IncompatibleTransformersError,
    PluginError,
    UnsupportedModelError,
)
from kvprune.policy.base import CrossKVPolicy

__all__ = [
    "ModelAdapter",
    "compressing",
    "has_cache",
    "named_arguments",
]


class _Hook:
    """A hook of an adapter, which does nothing while the adapter stands aside."""

    def __init__(self, adapter: ModelAdapter, hook: Callable[..., Any]) -> None:
        self.adapter = adapter
        self.hook = hook

    def __call__(self, *call: Any) -> Any:
        return None if self.adapter.is_aside else self.hook(*call)


class ModelAdapter(ABC):
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
        self.model = model
        self.is_aside = False
        self._handles: list[RemovableHandle] = []
        self._call_handles: list[RemovableHandle] = []
        self._restore: list[Callable[[], None]] = []

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
    @abstractmethod
    def layer_indices(self) -> Sequence[int]:
        """Indices of the cross-attention layers in the decoder, in order."""

    @abstractmethod
    def attach(self, manager: CrossKVManager) -> None:
        """Hook the model, so that the manager learns of each prefill and decoding reads what it kept."""

    def detach(self) -> None:
        """Undo `attach` completely; harmless if nothing is attached."""
        self.end_of_call()
        while self._handles:
            self._handles.pop().remove()
        while self._restore:
            self._restore.pop()()

    @contextmanager
    def standing_aside(self) -> Iterator[None]:
        """Let the model run as if this adapter were not attached: another one may be, for as long."""
        self.is_aside = True
        try:
            yield
        finally:
            self.is_aside = False

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

    def end_of_call(self) -> None:
        """Remove the hooks that were made for one forward call."""
        while self._call_handles:
            self._call_handles.pop().remove()

    def before(self, module: nn.Module, hook: Callable[..., Any], *, for_one_call: bool = False) -> None:
        """Run ``hook(module, args, kwargs)`` before a module, until `detach` or `end_of_call`."""
        handles = self._call_handles if for_one_call else self._handles
        handles.append(module.register_forward_pre_hook(_Hook(self, hook), with_kwargs=True))

    def after(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        *,
        for_one_call: bool = False,
        always: bool = False,
    ) -> None:
        """Run ``hook(module, args, kwargs, output)`` after a module, with ``always`` also if it raised."""
        handles = self._call_handles if for_one_call else self._handles
        handles.append(module.register_forward_hook(_Hook(self, hook), with_kwargs=True, always_call=always))

    def override(self, module: nn.Module, attribute: str, value: object) -> None:
        """Set an attribute on one module instance until `detach`, which restores what was there."""
        missing = object()
        before = module.__dict__.get(attribute, missing)

        def restore() -> None:
            if before is missing:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = before

        module.__dict__[attribute] = value
        self._restore.append(restore)

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


def compressing(model: nn.Module) -> str | None:
    """Return what compresses a model or a part of it now, found by its hooks; None if nothing does."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Hook) and not hook.adapter.is_aside:
                return hook.adapter.family
    return None


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a forward call by name, those given by position included."""
    if not args:
        return kwargs
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    named: dict[str, Any] = dict(bound.arguments)
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in named:
            named.update(named.pop(name))
    return named


def has_cache(named: Mapping[str, Any], config: Any) -> bool:
    """Whether a forward call has a cache, or transformers will make one for it.

    Args:
        named: Its arguments by name.
        config: Of the model that it calls.
    """
    use_cache = named.get("use_cache")
    return named.get("past_key_values") is not None or bool(
        config.use_cache if use_cache is None else use_cache
    )
