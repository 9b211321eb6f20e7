"""The conformance suites: `check_policy`, `check_adapter`, their reports, and `recheck` for one problem."""

from __future__ import annotations

from kvprune.testing.conformance.adapters.invariants import ADAPTER_INVARIANTS
from kvprune.testing.conformance.adapters.suite import check_adapter, installed_adapter
from kvprune.testing.conformance.common.results import SUITE_VERSION, ConformanceReport, Result
from kvprune.testing.conformance.policies.invariants import INVARIANTS
from kvprune.testing.conformance.policies.suite import check_policy, recheck

__all__ = [
    "ADAPTER_INVARIANTS",
    "INVARIANTS",
    "SUITE_VERSION",
    "ConformanceReport",
    "Result",
    "check_adapter",
    "check_policy",
    "installed_adapter",
    "recheck",
]
