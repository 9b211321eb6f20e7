"""The adapter for Whisper, which maps speech to text. Encoder columns are audio frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvprune.adapters.call import Call
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.layouts_sounds import FRAME, seconds_of_strides
from kvprune.adapters.tiny.models import example_whisper
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import UnsupportedCacheError

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
    """Whisper, whose encoder columns are audio frames."""

    family = "Whisper"
    model_classes = ("WhisperForConditionalGeneration", "WhisperModel")
    self_attention = "self_attn"
    provides = EncoderDecoderAdapter.provides | {"text"}

    @property
    def column_seconds(self) -> float | None:
        """0.02: two convolutions over frames of 10 ms."""
        return seconds_of_strides(FRAME, self.encoder, "conv1", "conv2")

    def attach(self, manager: CrossKVManager) -> None:
        """Add the hooks of the family, and time words by the columns that are held."""
        super().attach(manager)
        self.around(self.model, "_extract_token_timestamps", _with_constant_columns)

    def prepare_reread(self, call: Call, named: Mapping[str, Any], **known: Any) -> None:
        """Prepare to read the last token of a prefill again; the language is detected without a cache."""
        try:
            super().prepare_reread(call, named, **known)
        except UnsupportedCacheError as error:
            if known["cached"]:
                raise
            raise UnsupportedCacheError(
                f"{error}. If Whisper called itself, then to detect the language: pass language= to generate"
            ) from error

    @classmethod
    def example(cls, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
        """Return a tiny Whisper, and a batch of two sounds."""
        return example_whisper(dtype)
