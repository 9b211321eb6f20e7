"""What the doctor finds, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvprune.text import printable

__all__ = ["Check", "print_checks", "printable_checks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was checked.

    Attributes:
        section: Heading under which it is printed, such as "versions".
        name: What was checked.
        ok: Whether it is as it should be; None for information only.
        detail: What was found.
        remedy: What to do if `ok` is False.
    """

    section: str
    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def printable_checks(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Return the checks with texts that a terminal can show, of bounded length."""
    return tuple(
        Check(
            section=printable(check.section, 80),
            name=printable(check.name, 200),
            ok=check.ok,
            detail=printable(check.detail, 1000),
            remedy=printable(check.remedy, 400),
        )
        for check in checks
    )


def print_checks(checks: Iterable[Check]) -> int:
    """Print the checks below the headings of their sections; return how many failed."""
    section, failed = "", 0
    for check in checks:
        if check.section != section:
            section = check.section
            print(section)
        mark = {True: "ok", False: "FAIL", None: "-"}[check.ok]
        print(f"  {mark:<5} {check.name}: {check.detail}")
        if check.ok is False:
            failed += 1
            print(f"        to do: {check.remedy}")
    return failed
