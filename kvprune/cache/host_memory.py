"""Keeps the entries of a layer in host memory, and copies to its device what the next decode step reads.

A `CrossKVLayer` whose entries lie in host memory has a `HostMemory`. On CUDA, host memory is pinned, and the
copy is made in the background: a thread waits until the device knows which entries are chosen, gathers them
in host memory, and copies them on a stream of its own. Elsewhere the copy is made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kvprune.tokens.selection import Selection

__all__ = ["Courier", "Fetch", "HostMemory", "Staged"]


class Courier:
    """The thread and the streams that copy for all layers of a run; each is made when it is first needed.

    One thread, because each thread that gathers has workers of its own.
    """

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[type[Courier], tuple[()]]:
        return Courier, ()  # a copy of the cache has its own

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Let the thread do some work, after all that it was given before."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvprune-fetch")
        return self._worker.submit(work)

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of copies to a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Fetch:
    """A copy of some entries from host memory to a device; it begins when this is made.

    Args:
        sides: Keys and values in host memory, ``[R, Hkv, K, D]``, contiguous.
        places: int64 ``[B * Hkv * n]`` on the device, `CrossKVLayer.places` of the entries.
        shape: B, Hkv and n.
        device: Where they go.
        courier: Copies them.
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor],
        places: Tensor,
        shape: tuple[int, int, int],
        device: torch.device,
        courier: Courier,
    ) -> None:
        self._device, self._on_cuda, self._courier = device, device.type == "cuda", courier
        # Tensors that are made in inference mode can be written to only there, in each thread.
        self._inference = torch.is_inference_mode_enabled()
        self._copies = tuple(
            torch.empty(*shape, side.shape[-1], dtype=side.dtype, device=device) for side in sides
        )
        if self._on_cuda:
            places = self._begin(places)
        self._work: Future[None] | None = None
        if _in_background(device):
            self._work = courier.submit(lambda: self._run(sides, places))
        else:
            self._run(sides, places.to("cpu"))

    def result(self) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, Hkv, n, D]``; the device waits until they are there.

        The host waits until the thread has found and sent them, but not for the device.
        """
        if self._work is not None:
            self._work.result()
        if self._on_cuda:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)
        keys, values = self._copies
        return keys, values

    def _begin(self, places: Tensor) -> Tensor:
        """Begin to copy the places to host memory, and return them there."""
        side = self._courier.stream(self._device)
        # What is to be copied, and the memory it goes to, are ready when the current stream comes here.
        side.wait_stream(torch.cuda.current_stream(self._device))
        known = torch.empty(places.shape, dtype=places.dtype, pin_memory=True)
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            known.copy_(places, non_blocking=True)
            self._known, self._arrived = torch.cuda.Event(), torch.cuda.Event()
            self._known.record(side)
        for tensor in (places, *self._copies):  # their memory is not used again before the stream is done
            tensor.record_stream(side)
        return known

    def _run(self, sides: tuple[Tensor, Tensor], places: Tensor) -> None:
        """Gather the entries in host memory, and send them."""
        with torch.inference_mode(self._inference), torch.no_grad(), self._stream():
            for side, copy in zip(sides, self._copies, strict=True):
                chosen = torch.empty(copy.shape, dtype=copy.dtype, pin_memory=True) if self._on_cuda else copy
                width = side.shape[-1]
                torch.index_select(side.view(-1, width), 0, places, out=chosen.view(-1, width))
                if chosen is not copy:
                    copy.copy_(chosen, non_blocking=True)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """Work on the stream of copies, once the places are in host memory; nothing but on CUDA."""
        if not self._on_cuda:
            yield
            return
        side = self._courier.stream(self._device)
        self._known.synchronize()
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            yield
            self._arrived.record(side)


def _in_background(device: torch.device) -> bool:
    """Whether copies are made by a thread."""
    return device.type == "cuda"


@dataclass(frozen=True, eq=False)
class Staged:
    """What the next decode step reads, on its way to the device.

    Args:
        answer: What the policy chose, for B rows.
        number: Decode steps before that one.
        readable: What each row might read when the policy was asked, bool ``[B, Hkv or 1, K]``; None for
            everything.
        fetch: Copies the entries.
        rows: int64 ``[B]``, which row of the copies each row reads, since rows were reordered; None for its
            own.
    """

    answer: Selection
    number: int
    readable: Tensor | None
    fetch: Fetch
    rows: Tensor | None = None

    def selected(self, rows: Tensor) -> Staged:
        """Return the same for some rows of the batch; the copies are not moved before they are read."""
        old, readable, rows = self.answer, self.readable, rows.to(self.answer.indices.device)
        places = old.indices.index_select(0, rows)
        if old.is_known_full:
            answer = Selection.full(places, old.columns)
        else:
            answer = Selection.trusted(places, old.valid.index_select(0, rows), old.columns)
        if readable is not None:
            readable = readable.index_select(0, rows)
        composed = rows if self.rows is None else self.rows[rows]
        return Staged(answer, self.number, readable, self.fetch, composed)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, Hkv, n, D]``."""
        keys, values = self.fetch.result()
        if self.rows is None:
            return keys, values
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)


class HostMemory:
    """Where the entries of a layer lie while it decodes.

    Args:
        device: The device that decodes.
        courier: Copies to it.

    Attributes:
        staged: What the next step reads; None if it was not chosen yet.
        bytes_staged: Bytes of the largest choice so far, as copied to the device.
    """

    def __init__(self, device: torch.device, courier: Courier) -> None:
        self.device, self._courier = device, courier
        self.staged: Staged | None = None
        self.bytes_staged = 0

    def __reduce__(self) -> tuple[type[HostMemory], tuple[torch.device, Courier]]:
        return HostMemory, (
            self.device,
            self._courier,
        )  # a copy of the cache chooses and fetches in its next step

    def home(self, tensor: Tensor) -> Tensor:
        """Return a tensor in host memory, contiguous, and pinned for CUDA; waits for the device."""
        if self.device.type != "cuda":
            return tensor.detach().to("cpu").contiguous()
        if tensor.device.type == "cpu" and tensor.is_pinned() and tensor.is_contiguous():
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor.detach())

    def abroad(self, tensor: Tensor) -> Tensor:
        """Return a copy on the device; neither the host nor any other stream waits for it."""
        return tensor.to(self.device, non_blocking=True)

    def fetch(self, sides: tuple[Tensor, Tensor], places: Tensor, shape: tuple[int, int, int]) -> Fetch:
        """Begin to copy some entries to the device; see `Fetch`."""
        entry = sum(side.shape[-1] * side.element_size() for side in sides)
        self.bytes_staged = max(self.bytes_staged, shape[0] * shape[1] * shape[2] * entry)
        return Fetch(sides, places, shape, self.device, self._courier)

    def select(self, rows: Tensor) -> None:
        """Follow the rows of the batch, which are reordered."""
        if self.staged is not None:
            self.staged = self.staged.selected(rows)

    def take(self, answer: Selection) -> tuple[Tensor, Tensor] | None:
        """Return the entries of a choice that is staged, and forget it; None if another one is."""
        staged, self.staged = self.staged, None
        return staged.read() if staged is not None and staged.answer is answer else None
