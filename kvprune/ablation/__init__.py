"""Comparing policies: a grid of configurations on questions about pictures, statistics, table, figure."""

from kvprune.ablation.grid import DEFAULT_KEEP_RATIOS, DEFAULT_POLICIES
from kvprune.ablation.recheck import Difference
from kvprune.ablation.runner import compare
from kvprune.ablation.settings import Progress, Settings
from kvprune.ablation.summary import Rate, Row, Summary
from kvprune.ablation.table import notes, table
from kvprune.ablation.verification import Verification, verify

__all__ = [
    "DEFAULT_KEEP_RATIOS",
    "DEFAULT_POLICIES",
    "Difference",
    "Progress",
    "Rate",
    "Row",
    "Settings",
    "Summary",
    "Verification",
    "compare",
    "notes",
    "table",
    "verify",
]
