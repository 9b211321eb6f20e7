"""Runs a model's encoder once for all policies that answer the same batch.

The encoder (a vision tower, or the encoder of an encoder-decoder model) comes before everything that a policy
can prune, so its output is the same under all of them. It is remembered until other inputs come, which is one
batch: nothing is written to disk, and no more than one output is held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.attachment import Attachment
from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy

__all__ = ["EncoderReuse"]


@dataclass
class EncoderReuse:
    """Remembers the latest output of one encoder.

    Args:
        encoder: The encoder of a model; None if its adapter names none, and then nothing is reused.
        captures: What policies may need that is captured inside the encoder, by the names in
            `CrossKVPolicy.needs`; these policies run it themselves.

    Attributes:
        computed: How often the encoder ran, for policies that could have reused its output.
        reused: How often its output was reused instead.
        own: Policies that ran the encoder themselves, because they look inside it, in order of appearance.
    """

    encoder: nn.Module | None = field(repr=False)
    captures: frozenset[str] = frozenset()
    computed: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    own: list[str] = field(default_factory=list, init=False)
    _inputs: tuple[Any, ...] | None = field(default=None, init=False, repr=False)
    _output: Any = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, adapter: ModelAdapter) -> EncoderReuse:
        """Return what remembers the output of the encoder of an adapter's model."""
        return cls(adapter.encoder, type(adapter).captured_in_encoder)

    def forget(self) -> None:
        """Drop the remembered output; the counts stay."""
        self._inputs = self._output = None

    @contextmanager
    def during(self, policy: CrossKVPolicy) -> Iterator[None]:
        """Let calls of the encoder in this block return the remembered output where their inputs are equal.

        The encoder's ``forward`` is replaced on this instance, and restored at the end of the block, also
        after an exception. Hooks on the encoder still run; hooks on modules inside it would not.

        Args:
            policy: The policy that the block runs; if it looks inside the encoder, nothing is replaced.
        """
        if self.encoder is None:
            yield
            return
        if policy.needs & self.captures:
            spec = str(policy.spec)
            if spec not in self.own:
                self.own.append(spec)
            yield
            return
        forward = self.encoder.forward

        @functools.wraps(forward)  # generate reads the signature
        def remembering(*args: Any, **kwargs: Any) -> Any:
            return self._call(forward, *args, **kwargs)

        attachment = Attachment(self.encoder, "encoder reuse")
        attachment.override(self.encoder, "forward", remembering)
        try:
            yield
        finally:
            attachment.detach()

    def _call(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.encoder is not None
        if torch.is_grad_enabled() or self.encoder.training or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        inputs = (args, kwargs, torch.is_inference_mode_enabled())
        if self._inputs is not None and _same(inputs, self._inputs):
            self.reused += 1
            return _handed_out(self._output)
        self.forget()  # before the new output is made, so that two are never held
        output = forward(*args, **kwargs)
        self.computed += 1
        # Inputs are copied, since the caller may write to them before the next call.
        self._inputs, self._output = _copied(inputs), _handed_out(output)
        return output


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal: tensors by dtype, device and every value, others by type and value."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.dtype == other.dtype and one.device == other.device
        return alike and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if one is None or isinstance(one, bool | int | float | str | torch.dtype | torch.device):
        return bool(one == other)
    return one is other


def _copied(value: Any) -> Any:
    """Return an argument with its tensors copied; what is neither a tensor nor holds any is kept as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {name: _copied(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _handed_out(output: Any) -> Any:
    """Return a shallow copy: ``generate`` puts repeated tensors into the mapping that an encoder returns."""
    if isinstance(output, Mapping):
        return type(output)(**output)
    return list(output) if type(output) is list else output
