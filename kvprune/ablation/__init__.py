"""Comparing policies: a grid of configurations on questions about pictures, statistics, table, figure."""

from kvprune.ablation.grid import DEFAULT_KEEP_RATIOS, DEFAULT_POLICIES
from kvprune.ablation.runner import compare
from kvprune.ablation.settings import Progress, Settings
from kvprune.ablation.summary import Rate, Row, Summary
from kvprune.ablation.table import notes, table

__all__ = [
    "DEFAULT_KEEP_RATIOS",
    "DEFAULT_POLICIES",
    "Progress",
    "Rate",
    "Row",
    "Settings",
    "Summary",
    "compare",
    "notes",
    "table",
]
