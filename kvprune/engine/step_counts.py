"""Counts what decode steps read, on the device, and records it for oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.engine.receipts import StepReceipt
from kvprune.policy.step_checks import FLAWS
from kvprune.policy.step_view import StepView
from kvprune.tokens.selection import Selection

__all__ = ["CheckedAnswer", "Readable", "StepCounts", "StepRead", "count_entries", "recorded"]


@dataclass(frozen=True, eq=False)
class StepRead:
    """What one call of a layer read in decoding, for oracles.

    Args:
        layer_idx: Index of the decoder layer.
        columns: bool ``[B, T, H or 1, S]``, the columns that each text row read.
    """

    layer_idx: int
    columns: Tensor


class CheckedAnswer:
    """An answer that was checked: a policy that gives the same tensors again needs no second check.

    Args:
        answer: The policy's selection.
        safe: The same, with places that are safe to read.
    """

    def __init__(self, answer: Selection, safe: Selection) -> None:
        self.safe = safe
        self.read_at: tuple[int, Tensor] | None = None  # copies, and `CrossKVLayer.places` for these
        self._full = answer.is_known_full
        self._tensors = answer.indices, answer.valid
        self._versions = self._now()

    def _now(self) -> tuple[int, ...]:
        tensors = self._tensors[: 1 if self._full else 2]
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def is_of(self, answer: Selection) -> bool:
        """Whether an answer has the same tensors, unchanged."""
        same = self._tensors[0] is answer.indices and (
            answer.is_known_full if self._full else self._tensors[1] is answer.valid
        )
        return same and self.safe.columns == answer.columns and self._versions == self._now()


class StepCounts:
    """Counts of one layer since the latest prefill, without device transfers.

    A compiled graph adds to tensors at fixed addresses. Otherwise what the host knows is counted there.

    Attributes:
        read: Entries read, over all steps, text rows and KV heads; a number, or int64 ``[]`` on the device.
        held: Entries that could have been read.
        rows: Text rows of all steps.
        steps: Steps.
        flaws: bool ``[2, 4]``, which flaws answers of ``attend`` and of ``observe`` had.
        checked: The latest answer that was checked, and what was made of it.
        bytes_staged: Bytes of the largest copy of chosen entries, if the layer lies in host memory.
    """

    def __init__(self, layer: CrossKVLayer) -> None:
        device = layer.place
        self.read: int | Tensor = 0
        self.held: int | Tensor = 0
        self.rows = self.steps = self.bytes_staged = 0
        self.in_graphs = torch.zeros(4, dtype=torch.int64, device=device)  # the same, of compiled steps
        self.flaws = torch.zeros(2, len(FLAWS), dtype=torch.bool, device=device)
        self.checked: CheckedAnswer | None = None
        self._memory = layer.steps
        self.heads = layer.keys.shape[1]
        self.bytes_of_entry = sum(
            side.shape[-1] * side.element_size() for side in (layer.keys, layer.values)
        )  # of one KV head
        self.measure(layer)

    def measure(self, layer: CrossKVLayer) -> None:
        """Measure what the layer holds now."""
        self.width, self.bytes_held = layer.width, layer.bytes_held
        self.bytes_of_bookkeeping = layer.bytes_of_bookkeeping
        self.bytes_of_state = 0 if layer.steps is None else layer.steps.nbytes
        self.bytes_on_host = 0 if layer.host is None else self.bytes_held

    def count(self, read: int | Tensor, held: int | Tensor, rows: int, text_rows: int) -> None:
        """Count a step that reads so many of the entries held, both summed over its rows and KV heads."""
        if torch.compiler.is_compiling():
            for place, number in enumerate((read, held, rows, text_rows)):
                self.in_graphs[place].add_(number)
        else:
            self.read, self.held = self.read + read, self.held + held
            self.rows, self.steps = self.rows + rows, self.steps + text_rows

    def receipt(self, layer_idx: int) -> StepReceipt:
        """Return the counts, with a few device transfers."""
        graphs: list[int] = self.in_graphs.tolist()
        read, held, rows, steps = (
            int(one) + other
            for one, other in zip((self.read, self.held, self.rows, self.steps), graphs, strict=True)
        )
        rejected = 0 if self._memory is None else self._memory.taken_back
        return StepReceipt(
            layer_idx=layer_idx,
            steps=steps - rejected,
            rejected=rejected,
            entries_read=read / (rows * self.heads) if rows else 0.0,
            entries_held=held / (rows * self.heads) if rows else 0.0,
            bytes_read_per_step=round(read * self.bytes_of_entry / steps) if steps else 0,
            width=self.width,
            bytes_held=self.bytes_held,
            bytes_of_bookkeeping=self.bytes_of_bookkeeping,
            bytes_of_state=self.bytes_of_state,
            bytes_on_host=self.bytes_on_host,
            bytes_staged=self.bytes_staged,
        )


def recorded(layer: CrossKVLayer, step: StepView, answer: Selection | None, text_rows: int) -> StepRead:
    """Return what a step reads, by column."""
    heads = layer.entries()[0].shape[1]
    read = step.readable if answer is None else answer.mask & step.readable  # [N, H or 1, K]
    heads = max(heads, read.shape[1])
    slots = step.of_rows(step.slots).expand(-1, heads, -1)  # [N, H, K]
    columns = torch.zeros(step.text_rows, heads, layer.columns + 1, dtype=torch.bool, device=slots.device)
    # Entries that are not read are written to one column beyond the last, which is cut off.
    columns.scatter_(-1, torch.where(read, slots, layer.columns), True)
    return StepRead(step.layer_idx, columns[..., :-1].unflatten(0, (-1, text_rows)))


def count_entries(flags: Tensor, heads: int, *, full: bool = False) -> int | Tensor:
    """Return how many flags ``[N, H or 1, K]`` are set, those of all heads counted for each head."""
    if full:
        return flags.shape[0] * heads * flags.shape[-1]
    found = flags.sum()
    return found if flags.shape[1] == heads else found * heads


class Readable:
    """Which entries the text rows of a call may attend to; layers that hold the same entries share one.

    Args:
        layer: A cache layer.
        allowed: Returns what the model's mask lets through, bool ``[B, Hkv or 1, T or 1, K]``; None for all.
        batch: Rows of the batch B.
        text_rows: Text rows T of the call.

    Attributes:
        unrestricted: Whether each text row may attend to every entry, as far as the host knows.
    """

    def __init__(
        self, layer: CrossKVLayer, allowed: Callable[[], Tensor] | None, batch: int, text_rows: int
    ) -> None:
        self.unrestricted = allowed is None and not layer.ragged
        self._layer, self._allowed, self._shape = layer, allowed, (batch, text_rows, layer.width)
        self._held = layer.valid if layer.ragged else None
        self._flags: Tensor | None = None
        self._count: int | Tensor | None = None

    def is_of(self, layer: CrossKVLayer) -> bool:
        """Whether it holds for a layer under the same mask."""
        return (
            self._held is (layer.valid if layer.ragged else None)
            and self._shape[2] == layer.width
            and self._layer.copies == layer.copies
            and self._layer.keys.shape[1] == layer.keys.shape[1]
        )

    def flags(self) -> Tensor:
        """Return what each text row may attend to, bool ``[N, Hkv or 1, K]``; see `StepView.readable`."""
        if self._flags is None:
            self._flags = self._made()
        return self._flags

    def count(self, heads: int) -> int | Tensor:
        """Return how many entries that are, over all text rows and KV heads."""
        if self._count is None:
            batch, text_rows, width = self._shape
            if self.unrestricted:
                self._count = batch * text_rows * heads * width
            else:
                self._count = count_entries(self.flags(), heads)
        return self._count

    def _made(self) -> Tensor:
        batch, text_rows, width = self._shape
        if self.unrestricted:
            one = torch.ones(1, 1, 1, dtype=torch.bool, device=self._layer.place)
            return one.expand(batch * text_rows, 1, width)
        found = None
        if self._held is not None:
            held = self._held.repeat_interleave(self._layer.copies, dim=0)[:, None]  # [B, 1, H or 1, K]
            found = held.expand(-1, text_rows, -1, -1)
        if self._allowed is not None:
            allowed = self._allowed().transpose(1, 2).expand(batch, text_rows, -1, -1)  # [B, T, Hkv or 1, K]
            found = allowed if found is None else allowed & found
        assert found is not None
        found = found.flatten(0, 1)
        return found | ~found.any(-1, keepdim=True)  # a row from which all is hidden attends to something
