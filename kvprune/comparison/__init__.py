"""Compares policies: asks a model the same questions under each, summarises, shows, verifies."""

from kvprune.comparison.display.notes import notes
from kvprune.comparison.display.table import table
from kvprune.comparison.execution.comparison import compare
from kvprune.comparison.plan.all_policies import Everything, every_policy
from kvprune.comparison.plan.grid import DEFAULT_KEEP_RATIOS, DEFAULT_POLICIES
from kvprune.comparison.plan.settings import Progress, Settings
from kvprune.comparison.statistics.paired import PairedDifference
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.comparison.verification.consistency import Difference
from kvprune.comparison.verification.verification import Verification, verify

__all__ = [
    "DEFAULT_KEEP_RATIOS",
    "DEFAULT_POLICIES",
    "Difference",
    "Everything",
    "PairedDifference",
    "Progress",
    "Rate",
    "Row",
    "Settings",
    "Summary",
    "Verification",
    "compare",
    "every_policy",
    "notes",
    "table",
    "verify",
]
