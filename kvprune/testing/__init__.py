"""Tools for testing policies and adapters: conformance suites, the master oracle, problems, tiny models.

`check_policy` and `strategies` need hypothesis, which is imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvprune.adapters.tiny.models import enliven, mllama_inputs, tiny_bart, tiny_mllama, tiny_whisper
from kvprune.testing.conformance import (
    SUITE_VERSION,
    ConformanceReport,
    Result,
    check_adapter,
    check_policy,
    recheck,
)
from kvprune.testing.oracle import masked_oracle
from kvprune.testing.problems import LayerProblem, ModelProblem

if TYPE_CHECKING:
    from kvprune.testing import strategies

__all__ = [
    "SUITE_VERSION",
    "ConformanceReport",
    "LayerProblem",
    "ModelProblem",
    "Result",
    "check_adapter",
    "check_policy",
    "enliven",
    "masked_oracle",
    "mllama_inputs",
    "recheck",
    "strategies",
    "tiny_bart",
    "tiny_mllama",
    "tiny_whisper",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("kvprune.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
