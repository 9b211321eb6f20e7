"""Which window of which recording Whisper reads, and the calls in which it looks at a window beforehand.

Whisper's ``generate`` reads a recording window by window, and each window is a prefill with a decision of its
own. It also calls the model in two ways that write no text: to detect the language, and to find out whether
anybody speaks (``no_speech_threshold``). Both ask about the sound and begin no decoding, so they read all
columns, as in stock, and no policy is asked.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch import nn

from kvprune.adapters.attachment import Attachment
from kvprune.adapters.generation import callers
from kvprune.adapters.probes import Probe
from kvprune.adapters.questions import is_absent
from kvprune.engine.receipts import Window
from kvprune.errors import SavedCacheError
from kvprune.text import shown

__all__ = [
    "ASKS_FOR_SPEECH",
    "DETECTS_LANGUAGE",
    "ONE_WINDOW",
    "REPEATS_INPUTS",
    "Windows",
    "detectors",
    "probe_windows",
    "tried_once",
    "unpruned",
    "with_sequences",
]

DETECTS_LANGUAGE, ASKS_FOR_SPEECH = "detect_language", "_retrieve_logit_processors"
"""Methods of Whisper: one calls the model by itself, the other makes what calls the model during decoding."""

ONE_WINDOW = "generate_with_fallback"
"""Method of Whisper that generates from one window, and again at other temperatures."""

REPEATS_INPUTS = "_expand_variables_for_generation"
"""Method of Whisper that repeats its inputs for each return sequence."""

_READ = (
    *("self", "generation_config", "batch_size", "seek"),
    *("batch_idx_map", "fallback_index_map", "fallback_idx"),
)
"""Local variables of ``generate_with_fallback``, which generates from one window, that are read."""


class Windows:
    """Tells which windows a model reads, prefill by prefill.

    Args:
        model: A Whisper.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._generation: weakref.ref[Any] | None = None  # options of the latest call of generate

    def current(self) -> Window | None:
        """Return what the prefill that begins now reads; None if no ``generate`` of the model is running.

        ``generate`` passes none of it on, but it is still running while the model is called, so its local
        variables are read. Where a call runs inside another one, the outer one counts: drafts of
        self-speculation belong to the window that they are for. What torch.compile may trace calls it through
        `torch.compiler.disable`; see `running_generation`.
        """
        code, found = _code(), None
        for frame in callers():
            if frame.f_code is code and frame.f_locals.get("self") is self._model:
                found = frame.f_locals
        if found is None:
            return None
        options, seek, recordings = (found[name] for name in ("generation_config", "seek", "batch_idx_map"))
        is_first = self._generation is None or self._generation() is not options
        self._generation = weakref.ref(options)
        rows = [recordings[row] for row in found["fallback_index_map"]]
        starts = [int(seek[row]) for row in rows]  # whole numbers on the CPU
        if options.cache_implementation == "static":  # then transformers pads the batch to its first size
            padding = found["batch_size"] - len(rows)
            rows, starts = rows + [-1] * padding, starts + [0] * padding
        return Window(
            rows=tuple(rows),
            starts=tuple(starts),
            attempt=found.get("fallback_idx", 0),
            is_first=is_first,
        )


class _Unpruned:
    """Stands for a model in a logits processor, and calls it as if nothing were attached."""

    def __init__(self, attachment: Attachment, model: Any) -> None:
        self._attachment, self._model = attachment, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._attachment.paused():
            return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def unpruned(attachment: Attachment) -> Callable[..., Any]:
    """Return a function that calls a method of the model as if nothing were attached."""

    def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with attachment.paused():
            return method(*args, **kwargs)

    return call


def detectors(attachment: Attachment) -> Callable[..., Any]:
    """Return a function that makes logits processors; those that call the model read all columns."""

    def call(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers.generation.logits_process import WhisperNoSpeechDetection  # slow to import

        processors = make(*args, **kwargs)
        for processor in processors or []:
            if isinstance(processor, WhisperNoSpeechDetection) and processor.model is attachment.model:
                processor.set_model(_Unpruned(attachment, processor.model))
        return processors

    return call


def with_sequences(expand: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Repeat the inputs for each return sequence; refuse it without features, where transformers fails.

    Raises:
        SavedCacheError: Says what would be right.
    """
    sequences = kwargs["generation_config"].num_return_sequences
    if kwargs["input_features"] is None and sequences > 1:
        raise SavedCacheError(
            f"Whisper's generate returns several sequences only from input_features, and not from a saved "
            f"cache, got num_return_sequences={sequences}; ask once for each sequence"
        )
    return expand(*args, **kwargs)


def tried_once(generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Generate from one window; from a saved cache, refuse what would read it again.

    Raises:
        SavedCacheError: Names the option.
    """
    if is_absent(kwargs.get("kwargs", {}).get("encoder_outputs")):
        temperatures, threshold = kwargs["temperatures"], kwargs["generation_config"].no_speech_threshold
        if len(temperatures) > 1 or threshold is not None:
            raise SavedCacheError(
                "a saved cache answers one question once, but generate would read it again (temperature="
                f"{shown(temperatures)}, no_speech_threshold={threshold}); pass one temperature and "
                "no_speech_threshold=None"
            )
    return generate(*args, **kwargs)


def probe_windows() -> Probe:
    """Check that transformers has the methods of Whisper and the local variables that are read."""
    code, mixin = _code(), _mixin()
    missing = [name for name in _READ if name not in code.co_varnames + code.co_cellvars]
    missing += [
        name for name in (DETECTS_LANGUAGE, ASKS_FOR_SPEECH, REPEATS_INPUTS) if not hasattr(mixin, name)
    ]
    detail = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(_READ)}"
    return Probe("WhisperGenerationMixin", not missing, detail)


def _mixin() -> Any:
    from transformers.models.whisper.generation_whisper import WhisperGenerationMixin  # slow to import

    return WhisperGenerationMixin


def _code() -> CodeType:
    """Return the code of the method that generates from one window."""
    code: CodeType = inspect.unwrap(getattr(_mixin(), ONE_WINDOW)).__code__
    return code
