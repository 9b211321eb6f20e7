"""Which tokens a policy must keep in one layer.

One of each visibility group (KV03), visible ones before others (KV04), one for each text row (KV05).
"""

from __future__ import annotations

from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.layers.answers import kept_rows
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import existing, live_rows, seen_by_row, slow_groups

__all__ = ["check_groups", "check_rows", "check_visible"]


def check_groups(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV03: each sample keeps a token, and so does each visibility group."""
    for row in kept_rows(policy, problem):
        if not row.kept:
            raise Violation(f"{row.where} to keep at least one token", "none kept")
        for group in slow_groups(row.see, row.sample):
            if (group := group & row.visible) and not group & row.kept:
                raise Violation(
                    f"{row.where} to keep a token of each visibility group",
                    f"none of {sorted(group)} among the kept columns {sorted(row.kept)}",
                )


def check_visible(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV04: no unseen column is kept while a visible one is dropped."""
    for row in kept_rows(policy, problem):
        visible = row.visible
        if not visible and not live_rows(row.see, row.sample):
            visible = existing(row.see, row.sample)  # a sample without an image attends to all columns
        if (unseen := row.kept - visible) and (dropped := visible - row.kept):
            raise Violation(
                f"{row.where} to drop unseen columns before visible ones",
                f"unseen columns {sorted(unseen)} kept, visible columns {sorted(dropped)} dropped",
            )


def check_rows(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV05: a text row that saw a token still sees one; in decode, this is the last row."""
    for row in kept_rows(policy, problem):
        text_rows = live_rows(row.see, row.sample)
        for text_row in text_rows[-1:] if row.part == "cache" else text_rows:
            if (seen := seen_by_row(row.see, row.sample, text_row)) and not seen & row.kept:
                raise Violation(
                    f"{row.where} to keep one of the columns that text row {text_row} sees, {sorted(seen)}",
                    f"kept columns {sorted(row.kept)}",
                )
