"""The part of the master oracle that knows how Whisper reads a recording: window by window.

Each window is a prefill with its own selections. In two kinds of calls Whisper only looks at a window and
writes nothing: to detect the language, and to find out whether anybody speaks. There, nothing is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvprune.errors import SelectionError

__all__ = ["Turns", "looking"]


class Turns:
    """Counts the prefills of a block.

    Args:
        count: Number of prefills for which there are selections.
        repeats: Whether the selections, of one prefill, hold for all.

    Attributes:
        is_looking: Whether the model only looks at a window now.
    """

    def __init__(self, count: int, *, repeats: bool) -> None:
        self._count, self._repeats = count, repeats
        self._begun = 0
        self.is_looking = False

    @property
    def current(self) -> int:
        """Index of the latest prefill."""
        return 0 if self._repeats else self._begun - 1

    def begin(self) -> None:
        """Count a prefill that begins."""
        self._begun += 1
        if not self._repeats and self._begun > self._count:
            raise SelectionError(f"there are selections for {self._count} prefills, but another one begins")

    def require_all(self) -> None:
        """Raise if fewer prefills ran than there are selections for."""
        if not self._repeats and self._begun < self._count:
            raise SelectionError(f"there are selections for {self._count} prefills, but {self._begun} ran")

    @contextmanager
    def look(self) -> Iterator[None]:
        """Mask nothing and count nothing in this block."""
        self.is_looking = True
        try:
            yield
        finally:
            self.is_looking = False


@contextmanager
def looking(model: Any, turns: Turns) -> Iterator[None]:
    """Let a Whisper look at its windows unmasked, and time words where masked columns have no weight.

    Other models have none of these methods, and nothing happens.
    """
    names = "detect_language", "_retrieve_logit_processors", "_extract_token_timestamps"
    if not all(hasattr(model, name) for name in names):
        yield
        return
    methods: list[Any] = [getattr(model, name) for name in names]
    detect, processors, times = methods

    def unmasked(call: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            with turns.look():
                return call(*args, **kwargs)

        return within

    def with_unmasked(*args: Any, **kwargs: Any) -> Any:
        made = processors(*args, **kwargs)
        for one in made or []:
            if hasattr(one, "set_model"):
                one.set_model(_Looking(model, unmasked(model)))
        return made

    def timed(*args: Any, **kwargs: Any) -> Any:
        with _NoZeroDeviation():
            return times(*args, **kwargs)

    with ExitStack() as stack:
        for name, method in zip(names, (unmasked(detect), with_unmasked, timed), strict=True):
            stack.enter_context(_replaced(model, name, method))
        yield


@contextmanager
def _replaced(model: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one model in this block."""
    before = model.__dict__.get(name)
    model.__dict__[name] = method
    try:
        yield
    finally:
        if before is None:
            del model.__dict__[name]
        else:
            model.__dict__[name] = before


class _Looking:
    """A model whose calls mask nothing, for what Whisper calls while it decodes."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _NoZeroDeviation(TorchFunctionMode):
    """A column that is masked in all rows has the weight 0 in all of them; it must not become 0 / 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.masked_fill(out == 0, 1) if func is torch.std or func is Tensor.std else out
