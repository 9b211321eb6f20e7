"""The cells of the table: what each column of a row says, as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvprune.comparison.display.naming import named, times
from kvprune.comparison.plan.grid import ANSWER_ATTENTION
from kvprune.comparison.statistics.paired import PairedDifference
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.text import printable

__all__ = ["Column", "columns", "partner_name", "survives"]

_LONGEST_PARTNER = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the table.

    Attributes:
        group: columns of one group are left out together; "" is never left out.
        heading: its heading.
        cell: the text of a row.
        narrow: what narrow terminals lose of this column, and heading and text without it; None for nothing.
    """

    group: str
    heading: str
    cell: Callable[[Row], str]
    narrow: tuple[str, str, Callable[[Row], str]] | None = None


def columns(summary: Summary, *, ranked: bool) -> list[Column]:
    """Return all columns after policy and budget, from left to right.

    Args:
        summary: The results to show.
        ranked: Whether the table is ranked, and so shows no memory of stock transformers.
    """
    return [
        _share(summary, "kept", lambda row: row.kept_fraction),
        *([_share(summary, "read", lambda row: row.read)] if summary.reads_less else []),
        _memory(ranked),
        *_metric(summary),
        *_versus(summary),
        *_tasks(summary),
        Column(group="= full %", heading="= full %", cell=lambda row: f"{100 * row.agreement.value:.1f}"),
        *_counts(summary),
        *_times(summary),
    ]


def partner_name(summary: Summary) -> str:
    """Return the name of the partner for headings: short, and printable."""
    return printable(summary.partner or summary.against, _LONGEST_PARTNER)


def survives(difference: PairedDifference | None) -> bool:
    """Whether a difference is one after Holm's correction for the whole table."""
    adjusted = getattr(difference, "p_adjusted", None)
    return adjusted is not None and adjusted <= 0.05


def _share(summary: Summary, what: str, fraction: Callable[[Row], float]) -> Column:
    """Return a column with a fraction of the visible tokens: in percent, or in seconds of sound."""
    window = summary.window_seconds
    if window is None:
        return Column(group="", heading=f"{what} %", cell=lambda row: f"{100 * fraction(row):.1f}")
    return Column(group="", heading=f"{what} s", cell=lambda row: f"{window * fraction(row):.1f}")


def _memory(ranked: bool) -> Column:
    if ranked:
        return Column(group="MiB", heading="MiB", cell=lambda row: _mebibytes(row.bytes_held))
    return Column(
        group="MiB",
        heading="MiB/stock",
        cell=lambda row: f"{_mebibytes(row.bytes_held)}/{_mebibytes(row.bytes_full)}",
        narrow=("stock", "MiB", lambda row: _mebibytes(row.bytes_held)),
    )


def _metric(summary: Summary) -> list[Column]:
    main = "right %" if summary.higher_is_better else "WER %"
    found = [
        Column(
            group="",
            heading=f"{main} [95 %]",
            cell=lambda row: _interval(row.main),
            narrow=("intervals", main, lambda row: f"{100 * row.main.value:.1f}"),
        )
    ]
    if summary.metric == "word_error_rate":

        def character_error_rate(row: Row) -> str:
            return f"{100 * row.speech.character_error_rate.value:.1f}" if row.speech else ""

        found.append(Column(group="CER", heading="CER %", cell=character_error_rate))
    return found


def _versus(summary: Summary) -> list[Column]:
    found = []
    if summary.partner is not None:
        name = partner_name(summary)

        def difference(row: Row, interval: bool) -> str:
            if row.versus_baseline is None:
                return "0" if row.label == summary.partner and row.budget else ""
            return _difference(row.versus_baseline, interval)

        found.append(
            Column(
                group="",
                heading=f"- {name} [95 %]",
                cell=lambda row: difference(row, True),
                narrow=("intervals", f"- {name}", lambda row: difference(row, False)),
            )
        )
    if any(row.versus_answer_attention for row in summary.rows):

        def to_best(row: Row) -> str:
            found = row.versus_answer_attention
            return "" if found is None else f"{100 * found.value:+.1f}"

        found.append(Column(group=ANSWER_ATTENTION, heading="- answer", cell=to_best))
    return found


def _tasks(summary: Summary) -> list[Column]:
    def of(task: str) -> Callable[[Row], str]:
        return lambda row: f"{100 * row.tasks[task].value:.1f}"

    if len(summary.tasks) < 2:
        return []
    return [Column(group="tasks", heading=named(task), cell=of(task)) for task in summary.tasks]


def _counts(summary: Summary) -> list[Column]:
    if summary.metric != "word_error_rate":
        return []
    return [
        Column(group="loops", heading="loops", cell=lambda row: str(row.speech.loops if row.speech else "")),
        Column(group="capped", heading="capped", cell=lambda row: str(row.unfinished)),
    ]


def _times(summary: Summary) -> list[Column]:
    if summary.stock is None:
        return []
    return [
        Column(
            group="times",
            heading="prefill",
            cell=lambda row: times(row.speed.prefill_ratio if row.speed else None),
        ),
        Column(
            group="times",
            heading="token",
            cell=lambda row: times(row.speed.token_ratio if row.speed else None),
        ),
    ]


def _interval(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _difference(found: PairedDifference, interval: bool) -> str:
    text = f"{100 * found.value:+.1f}"
    if interval:
        text += f" [{100 * found.low:+.0f}, {100 * found.high:+.0f}]"
    return text + ("*" if survives(found) else "")


def _mebibytes(count: float) -> str:
    size = count / 2**20
    return f"{size:.3f}" if size < 1 else f"{size:.4g}"
