"""How names, rates and differences are written on the page and in the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evidence.numbers import Estimate, EvidenceSet, Row
from kvprune.comparison.display.naming import p_text
from kvprune.comparison.statistics.rank_agreement import RankAgreement
from kvprune.policy.spec import PolicySpec

__all__ = [
    "code_list",
    "difference",
    "names",
    "order",
    "p_text",
    "percent",
    "points",
    "rate",
    "share",
    "table",
    "tau",
]


_BASELINES = ("random", "uniform")


def names(labels: Iterable[str]) -> dict[str, str]:
    """Return how each label is shown: baselines without ``reach=onward`` and weights without their digest.

    Two that would look alike are shown whole.
    """
    labels = list(dict.fromkeys(labels))
    short = {label: _short(label) for label in labels}
    looks = list(short.values())
    return {label: name if looks.count(name) == 1 else label for label, name in short.items()}


def _short(label: str) -> str:
    spec = PolicySpec.parse(label)
    if spec.name not in _BASELINES:
        rest = {option: value for option, value in spec.options.items() if option != "digest"}
        return str(PolicySpec(spec.name, rest))
    rest = {option: value for option, value in spec.options.items() if (option, value) != ("reach", "onward")}
    return str(PolicySpec(spec.name, rest))


def order(one: EvidenceSet) -> list[str]:
    """Return the labels of policies with a budget by mean rank, the best first; unranked ones come last."""
    places: dict[str, list[int]] = {row.label: [] for row in one.rows if row.keep_ratio and not row.reference}
    for ratio in one.ratios:
        for label, rank in one.ranks(ratio).items():
            places[label].append(rank)
    return sorted(
        places, key=lambda label: (not places[label], sum(places[label]) / max(1, len(places[label])), label)
    )


def share(fraction: float) -> str:
    """Return a budget: 25 %."""
    return f"{100 * fraction:.4g} %"


def percent(value: float) -> str:
    """Return a rate in per cent, without the sign."""
    return f"{100 * value:.1f}"


def points(value: float, digits: int = 1) -> str:
    """Return a difference in points; what rounds to zero has no sign."""
    text = f"{100 * value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def rate(found: Estimate) -> str:
    """Return a rate with its interval, in per cent."""
    return f"{percent(found.value)} [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def difference(found: Estimate) -> str:
    """Return a difference with its interval, in points."""
    return f"{points(found.value)} [{points(found.low, 0)}, {points(found.high, 0)}]"


def tau(found: RankAgreement) -> str:
    """Return Kendall's tau-b with its number of policies and p-value."""
    if found.tau is None or found.p_value is None:
        return f"- (n {len(found.policies)})"
    p_value = p_text(found.p_value)
    return f"{found.tau:+.2f} (n {len(found.policies)}, p {'' if p_value.startswith('<') else '= '}{p_value})"


def code_list(found: Iterable[str]) -> str:
    """Return names as code, separated by commas."""
    return ", ".join(f"`{one}`" for one in found)


def cell(one: EvidenceSet, row: Row | None, rank: int | None) -> str:
    """Return a cell of the main table: rate, interval, and rank or the share kept instead."""
    if row is None:
        return ""
    if row.misses_budget:
        return f"{rate(row.rate)} {'read' if row.steps else 'kept'} {100 * row.kept:.0f} %"
    return rate(row.rate) + ("" if rank is None else f" ({rank})")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Return the lines of a pipe table; all but its first columns are aligned to the right."""
    marks = ["---" if number < left else "---:" for number in range(len(headings))]
    return [f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows)]
