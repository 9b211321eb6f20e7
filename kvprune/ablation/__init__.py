"""Comparing policies: a grid of configurations on questions about pictures, statistics, table, figure."""

from kvprune.ablation.everything import Everything, every_policy
from kvprune.ablation.grid import DEFAULT_KEEP_RATIOS, DEFAULT_POLICIES
from kvprune.ablation.notes import notes
from kvprune.ablation.paired import PairedDifference
from kvprune.ablation.rates import Rate
from kvprune.ablation.recheck import Difference
from kvprune.ablation.runner import compare
from kvprune.ablation.settings import Progress, Settings
from kvprune.ablation.summary import Row, Summary
from kvprune.ablation.table import table
from kvprune.ablation.verification import Verification, verify

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
