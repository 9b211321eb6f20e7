"""Measures how much memory one decision needs besides its inputs, and how long it takes."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kvprune.errors import KVPruneError
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.cost.dimensions import LLAMA_11B, Dimensions, ask, make_problem

__all__ = ["Measurement", "PeakMemory", "measure", "peak_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One decision of one policy.

    Attributes:
        spec: Canonical spec of the policy.
        dtype: Dtype of the model's tensors, such as ``bfloat16``.
        peak_bytes: Most bytes that the decision held at once besides its inputs, its result included.
        seconds: Median over the repetitions; None if nothing was timed.
    """

    spec: str
    dtype: str
    peak_bytes: int
    seconds: float | None


class PeakMemory(TorchDispatchMode):
    """Context manager that counts bytes of storages that are created in it and alive at once, on any device.

    It does not see scratch memory inside a kernel.

    Attributes:
        alive: Bytes that are alive now.
        peak: Most bytes that were alive at once.
        largest: Bytes of the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it returns, unless that is a view of a known storage."""
        known = {one.untyped_storage().data_ptr() for one in tree_iter(args) if isinstance(one, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known | self._seen:
                    self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        size, pointer = storage.nbytes(), storage.data_ptr()
        self._seen.add(pointer)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)

        def leave() -> None:
            self._seen.discard(pointer)
            self.alive -= size

        weakref.finalize(storage, leave)


def peak_memory(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the most bytes that a call allocates at once.

    On CUDA, this is what PyTorch's allocator handed out, with blocks rounded up and kernels' scratch memory
    included. On other devices, it is the storages of all tensors that the call creates (`PeakMemory`).

    Args:
        call: What to measure.
        device: Device on which the call works.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with PeakMemory() as memory:
            call()
        return int(memory.peak)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def measure(
    policy: CrossKVPolicy,
    dimensions: Dimensions = LLAMA_11B,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    repetitions: int = 3,
) -> Measurement:
    """Measure one decision of a policy: first its memory, which also warms up, then its time.

    Args:
        policy: Any policy.
        dimensions: Shapes of the decision; by default those of Llama-3.2-11B-Vision.
        dtype: Dtype of the model's tensors.
        device: Device of these tensors.
        repetitions: Number of repetitions to time; 0 times nothing.

    Raises:
        KVPruneError: If `repetitions` is negative.
    """
    if repetitions < 0:
        raise KVPruneError(f"repetitions is {repetitions}; it must be at least 0")
    problem = make_problem(policy, dimensions, dtype=dtype, device=device)
    peak = peak_memory(lambda: ask(policy, problem), device)
    times = [_seconds(policy, problem, device) for _ in range(repetitions)]
    seconds = statistics.median(times) if times else None
    name = str(dtype).removeprefix("torch.")
    return Measurement(spec=str(policy.spec), dtype=name, peak_bytes=peak, seconds=seconds)


def _seconds(policy: CrossKVPolicy, problem: Any, device: torch.device | str) -> float:
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    ask(policy, problem)
    if on_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
