"""Comparisons without their figures: drawing takes longer than all else that a small comparison does."""

from __future__ import annotations

import pytest


def leave_out_figures(patch: pytest.MonkeyPatch) -> None:
    """Let `compare` write stand-ins for its figures."""
    from kvprune.comparison.execution import comparison
    from kvprune.comparison.storage.results_folder import COST_PLOT, PLOT

    patch.setattr(comparison, "figures", lambda summary: {PLOT: b"a picture", COST_PLOT: b"another one"})
