"""Measures what one decision of a policy costs at the dimensions of a large model: memory and time."""

from kvprune.testing.cost.dimensions import LLAMA_11B, Dimensions, ask, make_problem
from kvprune.testing.cost.measurements import MemoryReport, measure_all
from kvprune.testing.cost.memory import Measurement, PeakMemory, measure, peak_memory

__all__ = [
    "LLAMA_11B",
    "Dimensions",
    "Measurement",
    "MemoryReport",
    "PeakMemory",
    "ask",
    "make_problem",
    "measure",
    "measure_all",
    "peak_memory",
]
