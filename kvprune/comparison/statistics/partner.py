"""Which row another one is compared with: the partner at the same budget."""

from __future__ import annotations

from collections.abc import Sequence

from kvprune.comparison.plan.grid import Configuration

__all__ = ["named", "partner_label", "partners", "self_guided"]


def named(label: str) -> str:
    """Return the name of the policy in a label or spec."""
    return label.partition(":")[0]


def partner_label(configurations: Sequence[Configuration], against: str) -> str | None:
    """Return the label of the partner.

    Args:
        configurations: All rows of the table.
        against: A label (spec without budget), or the name of a policy. Where several labels have this name,
            the first is the partner.

    Returns:
        The label; None where no row has it.
    """
    labels = list(dict.fromkeys(one.label for one in configurations))
    if against in labels:
        return against
    return next((label for label in labels if named(label) == against), None)


def partners(configurations: Sequence[Configuration], label: str | None) -> dict[str, str]:
    """Return the spec of the partner of each row, by the spec of the row.

    A partner without a budget, such as ``full``, is compared with at all budgets. Others are compared with at
    the same one (keep_ratio, keep_tokens or k_ratio). Rows of the partner itself have none.

    Args:
        configurations: All rows of the table.
        label: Label of the partner.
    """
    own = {one.budget: one.spec for one in configurations if one.label == label}
    found = {}
    for one in configurations:
        spec = own.get("") or own.get(one.budget)
        if spec is not None and one.label != label:
            found[one.spec] = spec
    return found


def self_guided(configurations: Sequence[Configuration]) -> dict[str, str]:
    """Return for each spec under which a guide guides the spec of the same policy that guides itself."""
    own = {str(one.policy.spec): one.spec for one in configurations if one.guide is None}
    guided = {one.spec: str(one.policy.spec) for one in configurations if one.guide == "guides"}
    return {spec: own[policy] for spec, policy in guided.items() if policy in own}
