"""The adapter for Whisper, which maps speech to text. Encoder columns are audio frames.

Whisper reads a recording window by window. Each window, and each repetition of one at another temperature, is
a prefill with a decision of its own; `kvprune.engine.receipts.WindowReceipt` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvprune.adapters.arguments import returned_cache, with_returned_cache, without_cache
from kvprune.adapters.columns.sounds import FRAME, seconds_of_strides
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.families.whisper_windows import (
    ASKS_FOR_SPEECH,
    DETECTS_LANGUAGE,
    ONE_WINDOW,
    REPEATS_INPUTS,
    Windows,
    detectors,
    probe_windows,
    tried_once,
    unpruned,
    with_sequences,
)
from kvprune.adapters.families.whisper_writing import transcribe
from kvprune.adapters.probes import Probe
from kvprune.adapters.reconstruction import Context, Writing, require_generating
from kvprune.adapters.tiny.models import example_whisper
from kvprune.engine.guidance import Prompt
from kvprune.engine.manager import CrossKVManager
from kvprune.policy.reconstruction import Reconstruction

__all__ = ["WhisperAdapter"]


class _ConstantColumns(TorchFunctionMode):
    """Within this context, a standard deviation of 0 is 1.

    Whisper times its words by attention weights: it standardises each column over the text rows. A dropped
    column has weight 0 in every row, and 0 / 0 would make all times NaN. With 1, it is standardised to 0: it
    says nothing.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.std, Tensor.std):
            return torch.where(result == 0, torch.ones_like(result), result)
        return result


def _with_constant_columns(extract: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _ConstantColumns():
        return extract(*args, **kwargs)


class WhisperAdapter(EncoderDecoderAdapter):
    """Whisper, whose encoder columns are audio frames: 1500 for each window of 30 seconds."""

    family = "Whisper"
    model_classes = ("WhisperForConditionalGeneration", "WhisperModel")
    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text", "reconstruction"}
    asking: ClassVar[Mapping[str, object]] = {
        "force_unique_generate_call": True
    }  # a saved cache holds one window

    @property
    def column_seconds(self) -> float | None:
        """0.02: two convolutions over frames of 10 ms."""
        return seconds_of_strides(FRAME, self.encoder, "conv1", "conv2")

    def attach(self, manager: CrossKVManager) -> None:
        """Add the hooks of the family, and time words by the columns that are held."""
        super().attach(manager)
        self.around(self.model, "_extract_token_timestamps", _with_constant_columns)
        self.around(self.model, DETECTS_LANGUAGE, unpruned(self))
        self.around(self.model, ASKS_FOR_SPEECH, detectors(self))
        self.around(self.model, "_postprocess_outputs", self._without_unequal_cache)
        self.around(self.model, "_stack_split_outputs", self._with_cache)
        self.around(self.model, ONE_WINDOW, tried_once)
        self.around(self.model, REPEATS_INPUTS, with_sequences)
        self._windows = Windows(self.model)
        self._current_window = torch.compiler.disable(Windows.current)
        self._returned: Any = None  # a cache that generate returns, from the end of its window on

    def _without_unequal_cache(self, process: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Take the cache out of what ``generate`` copies row by row, unless it holds plain keys and values.

        The copy would not say which entries are padding, how much merged ones weigh, and whose bits are few,
        so continuing from it would be wrong. Where there is one window, the cache itself is returned instead.
        """
        outputs: Any = kwargs.get("seek_outputs")
        if returned_cache(outputs) is None or all(
            not (one.is_ragged or one.merge is not None or one.quantizes)
            for one in self.manager.history.kept.selections.values()
        ):
            return process(*args, **kwargs)
        if kwargs["is_shortform"] and not kwargs["generation_config"].return_timestamps:
            self._returned = returned_cache(outputs)
        elif kwargs["is_shortform"]:  # of long recordings, transformers returns no cache
            self._warn_of_cache()
        rest = type(outputs)(**without_cache(outputs))
        return process(*args, **{**kwargs, "seek_outputs": rest})

    def _with_cache(self, stack: Callable[..., Any], rows: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the cache itself in the place of its copy, if it has the rows that are returned."""
        outputs = stack(rows, *args, **kwargs)
        cache, self._returned = self._returned, None
        if cache is None:
            return outputs
        if cache.self_attention_cache.layers[0].keys.shape[0] != len(rows):  # beams, or rows of another try
            self._warn_of_cache()
            return outputs
        return with_returned_cache(outputs, cache)

    def _warn_of_cache(self) -> None:
        self.manager.report.warn(
            "Whisper's generate returns a copy of the cache that would not say which entries are padding, "
            "merged or quantized, so past_key_values is left out of its output"
        )

    def _begin(self, call: Any, named: dict[str, Any], states: Tensor) -> None:
        """Begin a prefill, and say which window it reads."""
        self._returned = None
        self.manager.history.window = self._current_window(self._windows)
        super()._begin(call, named, states)

    def require_reconstruction(self) -> None:
        """Raise unless the model can write a transcript."""
        require_generating(self.model, self.family)

    def context(self, prompt: Prompt, request: Reconstruction) -> Context:
        """Return the start of the decoder; the model must write the transcript."""
        return Context(self.started(prompt, request))

    def write(self, prompt: Prompt, max_new_tokens: int) -> Writing:
        """Write a transcript."""
        return transcribe(self.model, self._decoder, prompt, max_new_tokens)

    @classmethod
    def probe(cls) -> list[Probe]:
        """Check that transformers has what all families share, and what tells windows apart."""
        return [*super().probe(), probe_windows()]

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny Whisper, and a batch of two sounds."""
        return example_whisper(dtype)
