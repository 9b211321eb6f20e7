"""The summary of a results folder, computed from its answers."""

from __future__ import annotations

from kvprune.comparison.plan.grid import partner
from kvprune.comparison.statistics.summary import Summary, summarise
from kvprune.comparison.storage.stored_run import StoredRun
from kvprune.errors import ResultsError

__all__ = ["summary_of"]


def summary_of(stored: StoredRun, against: str | None = None) -> Summary:
    """Summarise a finished comparison.

    Args:
        stored: What `read_run` returned.
        against: Policy that others are compared with; None is the one that the folder records.

    Raises:
        ResultsError: If answers are missing.
        PolicyOptionError: If no row, or more than one of a budget, is called `against`.
    """
    if stored.missing:
        raise ResultsError(
            f"{stored.folder} is unfinished: {stored.missing} answers are missing; run kvprune compare again "
            "with the same options"
        )
    return summarise(
        stored.configurations,
        stored.examples,
        stored.answers,
        stored.laps,
        batch_size=stored.settings.batch_size,
        device=str(stored.grid.context["device"]),
        reread=stored.settings.reread,
        against=partner(against, stored.configurations) if against else stored.settings.against,
    )
