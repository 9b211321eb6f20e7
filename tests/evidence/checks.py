"""What the demo is meant to show, computed from the numbers: each aim is said to be met or not met."""

from __future__ import annotations

from evidence.numbers import EvidenceSet, Row
from evidence.wording import difference, names, percent, points, share

WHOLE, DROP, LEAD = 0.9, 0.3, 0.1
"""The aims: right answers of the full cache in each task, loss of random at a quarter, lead at a tenth."""

QUARTER, TENTH = 0.25, 0.1

_HOLDS = ", a difference after Holm's correction"


def aims(one: EvidenceSet) -> list[str]:
    """Return a sentence for each aim."""
    return [_whole(one), _random(one), _lead(one), _below_random(one)]


def below_random(one: EvidenceSet, *, published: bool = True) -> list[Row]:
    """Return rows that are worse than random at their budget; of published methods only, or of all."""

    def loss(row: Row) -> float:
        known = row.published or not published
        known = known and not row.reference and row.keep_ratio is not None
        return -one.gain(row.versus_random.value) if known and row.versus_random else 0.0

    worse = [row for row in one.rows if loss(row) > 0]
    return sorted(worse, key=lambda row: (-(row.keep_ratio or 0), -loss(row)))


def _whole(one: EvidenceSet) -> str:
    below = {task: value for task, value in one.full.tasks.items() if value < WHOLE}
    said = ", ".join(f"{task} {percent(value)}" for task, value in one.full.tasks.items())
    missed = f" Below it: {', '.join(below)}." if below else ""
    return f"{_verdict(not below)} The full cache answers at least {WHOLE:.0%} of each task: {said}.{missed}"


def _random(one: EvidenceSet) -> str:
    aim = f"`random` loses at least {100 * DROP:.0f} points at {share(QUARTER)} of the cache"
    row = next((row for row in one.at(QUARTER).values() if row.name == "random"), None)
    if row is None:
        return f"**Not known.** {aim}: it is not in the table."
    loss = one.gain(one.full.rate.value - row.rate.value)
    return f"{_verdict(loss >= DROP)} {aim}: it loses {percent(loss)} ({percent(row.rate.value)} right)."


def _lead(one: EvidenceSet) -> str:
    aim = (
        f"At {share(TENTH)}, the best policy that reads the prompt is at least {100 * LEAD:.0f} points ahead "
    )
    aim += "of the best that does not"
    found = next((contest for contest in one.contests if contest.keep_ratio == TENTH), None)
    if found is None:
        return f"**Not known.** {aim}: the table has not both."
    shown, rows = names(row.label for row in one.rows), one.at(TENTH)
    reading, blind = rows[found.reading].rate.value, rows[found.blind].rate.value
    pair = f"`{shown[found.reading]}` {percent(reading)}, `{shown[found.blind]}` {percent(blind)}"
    met = _verdict(one.gain(found.difference.value) >= LEAD)
    return f"{met} {aim}: {pair}, difference {difference(found.difference)}."


def _below_random(one: EvidenceSet) -> str:
    aim = "No published method is worse than `random` at the same budget"
    if not any(row.versus_random for row in one.rows):
        return f"**Not known.** {aim}: `random` is not in the table."
    shown, found = names(row.label for row in one.rows), below_random(one)
    if not found:
        return f"{_verdict(True)} {aim}."
    said = ", ".join(
        f"`{shown[row.label]}` at {share(row.keep_ratio)} ({points(row.versus_random.value)} points"
        f"{_HOLDS if row.versus_random.holds else ''})"
        for row in found
        if row.keep_ratio is not None and row.versus_random is not None
    )
    return f"{_verdict(False)} {aim}. Worse: {said}."


def _verdict(met: bool) -> str:
    return "**Met.**" if met else "**Not met.**"
