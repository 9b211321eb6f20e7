"""The conformance suite for authors of policies: `check_policy`, its report, and single checks again."""

from __future__ import annotations

from kvprune.testing.conformance.report import SUITE_VERSION, ConformanceReport, Result
from kvprune.testing.conformance.suite import check_policy, recheck
from kvprune.testing.conformance.table import INVARIANTS

__all__ = ["INVARIANTS", "SUITE_VERSION", "ConformanceReport", "Result", "check_policy", "recheck"]
