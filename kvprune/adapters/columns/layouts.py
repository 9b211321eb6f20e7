"""What the encoder columns of a model are, and where they lie.

What a column is follows from what the encoder reads: token ids, sound or pixels. Texts and sounds are lines.
Where the patches of a picture lie is known only when the encoder runs, so `EncoderNotes` keeps what its
latest calls were given, until the decoder reads what they returned.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvprune.adapters.arguments import named_arguments
from kvprune.adapters.base import ModelAdapter
from kvprune.tokens.layout import AUDIO_FRAME, ENCODER_TOKEN, IMAGE_PATCH, TEXT_TOKEN, Layout, Unit

__all__ = ["Columns", "EncoderNotes"]

_READ: Mapping[str, Unit] = {
    "input_ids": TEXT_TOKEN,
    "input_features": AUDIO_FRAME,
    "input_values": AUDIO_FRAME,
    "pixel_values": IMAGE_PATCH,
    "flattened_patches": IMAGE_PATCH,
}
"""What the columns of an encoder are that takes an argument of this name."""

_CALLS = 4
"""Calls of the encoder that are remembered."""

_CHANNELS = 4
"""Channels of encoder states by which a call is recognised."""

_ROUNDING = 1e-5
"""How far projected states may be off, relative to the largest; or four times the dtype's precision."""


class EncoderNotes:
    """What the latest calls of an encoder were given, to be found again by the states that they returned.

    Args:
        projection: The layer, if any, that projects states between encoder and decoder.
    """

    def __init__(self, projection: nn.Linear | None = None) -> None:
        self._projection = projection
        self._calls: deque[tuple[Tensor, Any]] = deque(maxlen=_CALLS)

    def add(self, states: Tensor, note: Any) -> None:
        """Remember a call.

        Args:
            states: ``[N, S, C]``, what the encoder returned.
            note: What it was given.
        """
        seen = states.detach()
        if self._projection is None:
            seen = seen[..., :_CHANNELS].clone()
        else:
            weight, bias = self._projection.weight.detach(), self._projection.bias
            offset = None if bias is None else bias.detach()[:_CHANNELS]
            seen = F.linear(seen, weight[:_CHANNELS], offset)
        self._calls.appendleft((seen, note))

    def of(self, states: Tensor) -> tuple[Any, int] | None:
        """Return what the call was given that returned these states, and how often each row was repeated.

        Args:
            states: ``[R, S, C]``, as the decoder receives them; R is a multiple of N (beams).

        Returns:
            None if no call is known. Costs one device transfer.
        """
        rows, columns, _ = states.shape
        for seen, note in self._calls:
            if seen.shape[1] != columns or rows % seen.shape[0]:
                continue
            times = rows // seen.shape[0]
            if self._is(states[::times, :, :_CHANNELS].to(seen), seen):
                return note, times
        return None

    def _is(self, states: Tensor, seen: Tensor) -> bool:
        """Return whether states are those of a call; a projection rounds otherwise for another batch."""
        if self._projection is None:
            return torch.equal(states, seen)
        off = (states - seen).abs().amax()
        return bool(off <= max(_ROUNDING, 4 * torch.finfo(seen.dtype).eps) * seen.abs().amax())

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()


class Columns(ModelAdapter):
    """The part of an encoder-decoder adapter that says what its encoder columns are.

    Class attributes:
        unit: What one column is; None if what the encoder reads says it.
    """

    unit: ClassVar[Unit | None] = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        projection = getattr(model, "enc_to_dec_proj", None)
        self.notes = EncoderNotes(projection if isinstance(projection, nn.Linear) else None)

    @property
    def column_unit(self) -> Unit:
        """What one encoder column is; `ENCODER_TOKEN` if columns are of several kinds, or unknown."""
        if self.unit is not None:
            return self.unit
        if self.encoder is None:
            return ENCODER_TOKEN
        read = {_READ[name] for name in inspect.signature(self.encoder.forward).parameters if name in _READ}
        return read.pop() if len(read) == 1 else ENCODER_TOKEN

    @property
    def column_seconds(self) -> float | None:
        """Seconds of sound that one column adds; None if columns are no sound, or it is unknown."""
        return None

    def layout(self, states: Tensor) -> Layout:
        """Return what the columns are, and where they lie: on a line, if they are sound or text.

        Args:
            states: ``[R, S, C]``, the encoder states of distinct rows.
        """
        unit = self.column_unit
        if unit in (TEXT_TOKEN, AUDIO_FRAME):
            return Layout.line(states.shape[1], states.device, unit=unit, seconds=self.column_seconds)
        return self.unknown_layout(
            states, f"the adapter {type(self).__name__} does not say it; define layout() there"
        )

    def unknown_layout(self, states: Tensor, reason: str, *units: Unit) -> Layout:
        """Return a layout without positions.

        Args:
            states: ``[R, S, C]``.
            reason: Why positions are unknown, as the end of a sentence.
            units: What columns are; by default, what the adapter says.
        """
        return Layout.unknown(states.shape[1], reason, states.device, units=units or (self.column_unit,))

    def note(self, named: Mapping[str, Any]) -> Any:
        """Return what `layout` must know of a call of the encoder; a family with a grid defines it.

        Args:
            named: Arguments of the call by name.

        Returns:
            None if nothing.
        """
        return None

    def watch_encoder(self) -> None:
        """Note each call of the encoder from now on, if `layout` needs it."""
        if type(self).note is not Columns.note and self.encoder is not None:
            self.after(self.encoder, self._note_call, watches=True)

    def detach(self) -> None:
        """Undo `attach`, and forget what the encoder was given."""
        super().detach()
        self.notes.clear()

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        note = self.note(named_arguments(module, args, kwargs))
        if note is not None and isinstance(output[0], Tensor) and output[0].ndim == 3:
            self.notes.add(output[0], note)
