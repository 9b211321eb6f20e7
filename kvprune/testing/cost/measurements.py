"""Measures several policies and reports the results with machine, versions and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kvprune.errors import KVPruneError, PolicyFailedError
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.cost.dimensions import LLAMA_11B, Dimensions
from kvprune.testing.cost.memory import Measurement, measure
from kvprune.text import error_line

__all__ = ["DTYPES", "MemoryReport", "machine", "measure_all", "versions"]

DTYPES = ("bfloat16", "float32")
"""Dtypes of model tensors that are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Measurements of several policies.

    Attributes:
        measurements: One for each policy and dtype.
        dimensions: Shapes of the decisions.
        repetitions: Number of repetitions that were timed.
        device: Device on which they ran.
        machine: Processor or GPU, and threads.
        versions: Versions of Python, torch and kvprune.
        date: Date of the run.
    """

    measurements: tuple[Measurement, ...]
    dimensions: Dimensions
    repetitions: int
    device: str
    machine: str
    versions: Mapping[str, str]
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)


def measure_all(
    policies: Sequence[CrossKVPolicy],
    *,
    device: str = "cpu",
    repetitions: int = 3,
    dimensions: Dimensions = LLAMA_11B,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MemoryReport:
    """Measure one decision of each policy in each of `DTYPES`.

    Args:
        policies: What to measure.
        device: ``cpu`` or ``cuda``.
        repetitions: Number of repetitions to time; 0 times nothing.
        dimensions: Shapes of the decisions.
        on_progress: Called with the number of measurements done and in total, at the start and after each.

    Raises:
        KVPruneError: If there is no such device, or `repetitions` is negative.
        PolicyFailedError: If a policy raises an error of its own.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise KVPruneError(f"device is {device!r}, but PyTorch sees no CUDA device; use cpu")
    jobs = [(policy, name) for policy in policies for name in DTYPES]
    found: list[Measurement] = []
    on_progress(0, len(jobs))
    for policy, name in jobs:
        try:
            dtype = getattr(torch, name)
            found.append(measure(policy, dimensions, dtype=dtype, device=device, repetitions=repetitions))
        except (KVPruneError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PolicyFailedError(f"policy {policy.spec} cannot decide: {error_line(error)}") from error
        on_progress(len(found), len(jobs))
    return MemoryReport(
        measurements=tuple(found),
        dimensions=dimensions,
        repetitions=repetitions,
        device=device,
        machine=machine(device),
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def machine(device: str) -> str:
    """Return the name of the GPU; or the kind of processor, its cores, and the threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} CPU cores, threads: {torch.get_num_threads()}"


def versions() -> dict[str, str]:
    """Return the versions of Python, kvprune and torch."""
    packages = {name: importlib.metadata.version(name) for name in ("kvprune", "torch")}
    return {"python": platform.python_version(), **packages}
