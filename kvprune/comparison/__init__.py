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
from kvprune.comparison.storage.folder_description import FolderDescription, describe_folder
from kvprune.comparison.storage.stored_run import StoredRun, read_run
from kvprune.comparison.studies.plan import Overrides, Plan, plan_study
from kvprune.comparison.studies.run import run_study
from kvprune.comparison.studies.study import Study, find_study
from kvprune.comparison.studies.study_table import StudyTable
from kvprune.comparison.verification.consistency import Difference
from kvprune.comparison.verification.verification import Verification, verify

__all__ = [
    "DEFAULT_KEEP_RATIOS",
    "DEFAULT_POLICIES",
    "Difference",
    "Everything",
    "FolderDescription",
    "Overrides",
    "PairedDifference",
    "Plan",
    "Progress",
    "Rate",
    "Row",
    "Settings",
    "StoredRun",
    "Study",
    "StudyTable",
    "Summary",
    "Verification",
    "compare",
    "describe_folder",
    "every_policy",
    "find_study",
    "notes",
    "plan_study",
    "read_run",
    "run_study",
    "table",
    "verify",
]
