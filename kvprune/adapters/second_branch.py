"""Calls a model a second time in each step of `generate`, with a cache of its own.

`CallRecorder` keeps the arguments of the latest call that `generate` has made. A second branch repeats this
call: the same new tokens, positions and masks, but another cache, and what the encoder has returned instead
of a picture. Nothing of the first branch is changed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvprune.adapters.arguments import STATES, cache_of, named_arguments, returned_cache
from kvprune.adapters.attachment import Attachment
from kvprune.adapters.generation import CANDIDATES
from kvprune.engine.measurement import Stopwatch
from kvprune.errors import ContrastError, UnsupportedModelError

__all__ = ["CallRecorder", "RecordedCall", "rows_with_prefix"]

PROCESSORS = "_get_logits_processor"
"""Method of ``GenerationMixin`` that makes the list of logits processors, once in each `generate`."""


def _states(named: Mapping[str, Any]) -> Tensor | None:
    """Return the encoder states ``[B, S, C]`` that a call brings; None if it brings none."""
    for name in STATES:
        states = named.get(name)
        states = states if states is None or isinstance(states, Tensor) else states[0]
        if isinstance(states, Tensor):
            return states
    return None


def _mark(named: Mapping[str, Any]) -> int | Tensor | None:
    """Return what tells whether the encoder states of a call are changed in place from now on.

    That is how often they have been changed by now, or a copy of them in inference mode, which does not count
    changes; None if the call brings no states.
    """
    states = _states(named)
    if states is None:
        return None
    return states.clone() if states.is_inference() else states._version


def _is_changed(named: Mapping[str, Any], mark: int | Tensor | None) -> bool:
    """Whether the encoder states of a call were changed since `_mark`."""
    states = _states(named)
    if states is None or mark is None:
        return False
    if isinstance(mark, int):
        return states._version != mark
    return not bool(((states == mark) | mark.isnan()).all())  # one device transfer in each generate


_GUIDANCE = "ClassifierFreeGuidance"
"""In the names of logits processors that contrast with a branch without prompt; MusicGen has its own."""


@dataclass
class RecordedCall:
    """A forward call that `generate` has made.

    Args:
        module: The module that generates.
        arguments: Arguments of the call by name.
        past: Text entries in the cache before the call; None if it had no cache.
        device: Device of its tensors.
        returned: The cache that the call has returned; BLIP makes another one.
        watch: Measures the call.
        mark: Tells whether the encoder states are changed in place; None after the first call.
        is_running: Whether the call has not returned yet.
        encoding: What the adapter's module `encoding` has returned in the call; None if it did not run.
    """

    module: nn.Module
    arguments: dict[str, Any]
    past: int | None
    device: torch.device
    watch: Stopwatch
    mark: int | Tensor | None = None
    is_running: bool = True
    encoding: Any = None
    returned: Any = None

    @property
    def cache(self) -> Any:
        """The cache of the call; None if there is none."""
        return cache_of(self.arguments)

    def require_unchanged_states(self) -> None:
        """Raise if the call has changed the encoder states, which the second branch would read.

        Raises:
            UnsupportedModelError: Names the model.
        """
        if _is_changed(self.arguments, self.mark):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} changes the encoder states in place each time it is called, "
                "as Moonshine Streaming does, so a second branch would read other states; contrast another "
                "model"
            )


class CallRecorder(Attachment):
    """Records the calls that `generate` makes of a model, and adds a logits processor to each `generate`.

    Args:
        model: The model, or a model that contains the one that generates.
        label: What is attached, for messages.
        encoding: Module whose output is kept, for one call; None for no module.
        make: Gets the module that generates and its generation config; returns the processor.

    Attributes:
        seen: Calls so far.
    """

    def __init__(
        self,
        model: nn.Module,
        label: str,
        encoding: nn.Module | None,
        make: Callable[[nn.Module, Any], Any],
    ) -> None:
        super().__init__(model, label)
        self.seen = 0
        self._here = threading.local()  # `call` and `empty` of each thread
        self._encoding = encoding
        self._make = make

    def attach(self) -> None:
        """Hook each module that can generate."""
        for module in self.model.modules():  # BLIP generates with a part of itself
            if not hasattr(type(module), PROCESSORS):
                continue
            if PROCESSORS in module.__dict__:
                raise UnsupportedModelError(
                    f"somebody has replaced {PROCESSORS} of this {type(module).__name__}, so no logits "
                    "processor can be added to its generate; remove the replacement"
                )
            self.before(module, self._before)
            self.after(module, self._after)
            self.around(module, PROCESSORS, self._with_processor)
            self.around(module, CANDIDATES, self._no_drafts)
        if self._encoding is not None:
            self.after(self._encoding, self._keep_encoding)

    def detach(self) -> None:
        """Remove all hooks, and forget the latest call."""
        super().detach()
        self.forget()

    def forget(self) -> None:
        """Forget the latest call and its tensors."""
        self._here = threading.local()

    @property
    def _call(self) -> RecordedCall | None:
        return getattr(self._here, "call", None)

    def take_empty(self) -> Any:
        """Return a copy of the cache before the first call of this `generate`, and forget it.

        None if it was not empty, or there was none.
        """
        return vars(self._here).pop("empty", None)

    def take(self) -> RecordedCall:
        """Return the latest call of this thread, and forget it.

        Raises:
            ContrastError: If there is none.
        """
        call: RecordedCall | None = vars(self._here).pop("call", None)
        if call is None:
            raise ContrastError(
                f"generate of {type(self.model).__name__} reached no hook before it asked for scores, as "
                "compiled code does; contrast works with the model itself, neither compiled nor with a "
                "static cache"
            )
        return call

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is not None and self._call.is_running:
            return  # MusicGen and its decoder can both generate, and one calls the other
        named = dict(named_arguments(module, args, kwargs))
        cache = cache_of(named)
        past = None if cache is None else int(cache.get_seq_length())
        mark = _mark(named) if vars(self._here).pop("is_first", False) else None
        if past == 0 and not hasattr(self._here, "empty"):
            self._here.empty = copy.deepcopy(cache)
        self.seen += 1
        device = next(value.device for value in named.values() if isinstance(value, Tensor))
        watch = Stopwatch(device)
        self._here.call = RecordedCall(module, named, past, device, watch, mark)
        watch.__enter__()

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._call
        if call is not None and call.module is module:
            call.watch.__exit__(None, None, None)
            call.returned, call.is_running = returned_cache(output), False

    def _keep_encoding(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._call is not None:
            self._call.encoding = output

    def _with_processor(self, make: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = make(generation_config, *args, **kwargs)
        vars(self._here).clear()
        self._here.is_first = True
        ours = self._make(make.args[0], generation_config)
        for one in processors:
            if _GUIDANCE in type(one).__name__:
                raise ContrastError(
                    f"{type(one).__name__} is a contrast of its own, with a branch without prompt; use one "
                    "of the two: pass guidance_scale=1"
                )
        # First in the list: it combines what the model says, before others change it.
        processors.insert(0, ours)
        return processors

    def _no_drafts(self, make: Any, *args: Any, **kwargs: Any) -> Any:
        raise ContrastError(
            "assisted decoding verifies several drafted tokens in one call, but contrast combines two "
            "branches token by token; leave out assistant_model, prompt_lookup_num_tokens and the like"
        )


def rows_with_prefix(before: Tensor, now: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return which earlier row has the prefix of each row now, after beams were reordered.

    Rows of a group that have the same prefix have the same cache, so any of them is right.

    Args:
        before: int64 ``[B, T]``, the token ids that the rows of a cache have read or are about to read.
        now: int64 ``[B, T + n]``.
        group: Consecutive rows that belong to one sample.

    Returns:
        Indices of rows, int64 ``[B]``, and whether each row has one, bool ``[B]``.
    """
    old = before.unflatten(0, (-1, group))  # [samples, group, T]
    new = now[:, : before.shape[1]].unflatten(0, (-1, group))
    same = (new[:, :, None] == old[:, None]).all(-1)  # [samples, group now, group before]
    first = torch.arange(0, len(before), group, device=now.device)[:, None]  # [samples, 1]
    return (same.int().argmax(-1) + first).flatten(), same.any(-1).flatten()
