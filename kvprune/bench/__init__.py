"""Measuring policies by themselves: what one decision costs at the dimensions of a large model."""

from kvprune.bench.memory import Measurement, PeakMemory, measure, peak_memory
from kvprune.bench.problems import LLAMA_11B, Dimensions, ask, make_problem
from kvprune.bench.report import MemoryReport, measure_all

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
