"""The table of a study: data sets as rows, policies and budgets as columns, the full cache first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from kvprune.comparison.display.cells import survives
from kvprune.comparison.display.naming import budget, times
from kvprune.comparison.display.records import Record
from kvprune.comparison.display.table_formats import markdown, pipe_table, to_csv
from kvprune.comparison.statistics.summary import Row, Summary
from kvprune.comparison.studies.plan import Part, Plan, model_name
from kvprune.text import printable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["StudyTable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyTable:
    """The results of a study.

    Attributes:
        plan: what was run.
        summaries: the summaries of the finished data sets, which are the first ones of the plan.
    """

    plan: Plan
    summaries: tuple[Summary, ...]

    def rich(self, *, intervals: bool = True) -> Table:
        """Return the table, ready to print with rich: several lines for each data set.

        Args:
            intervals: Whether to show the interval of each rate; without them, the table is narrower.
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
        shown.add_column("data set", overflow="fold")
        shown.add_column("", no_wrap=True)
        for label, limit in self._headings():
            heading = label.replace(":", "\n").replace(",", "\n") + f"\n{limit}"
            shown.add_column(Text(heading), justify="right", overflow="fold")
        for part, summary in self._finished():
            beside = chain((part.data.title, f"n = {summary.examples}"), repeat(""))
            for first, (name, cells) in zip(beside, self._lines(summary, intervals), strict=False):
                shown.add_row(*(Text(printable(cell)) for cell in (first, name, *cells)))
            shown.add_section()
        return shown

    def markdown(self) -> str:
        """Return title, table and notes as Markdown."""
        headings = ["data set", "", *(f"{label} {limit}".strip() for label, limit in self._headings())]
        rows = [
            [part.data.title, name, *cells]
            for part, summary in self._finished()
            for name, cells in self._lines(summary, intervals=True)
        ]
        right = [False, False, *(True for _ in headings[2:])]
        notes = "".join(f"- {markdown(note)}\n" for note in self.notes())
        return f"# {markdown(self.plan.study.title)}\n\n{pipe_table(headings, rows, right)}\n{notes}"

    def csv(self) -> str:
        """Return one line for each data set and configuration, with all digits, as CSV."""
        return to_csv(self.records())

    def records(self) -> list[Record]:
        """Return one record for each data set and configuration; rates are fractions."""
        return [
            _record(part, summary, row) for part, summary in self._finished() for row in self._rows(summary)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: what study.json holds."""
        plan = self.plan
        return {
            "study": plan.study.title,
            "file": str(plan.study.path),
            "file_sha256": plan.study.sha256,
            "overrides": asdict(plan.overrides),
            "configurations": [one.spec for one in plan.configurations],
            "data": [
                {
                    "title": part.data.title,
                    "metric": part.data.metric,
                    "file": str(part.settings.data),
                    "results": part.data.folder,
                    "finished": number < len(self.summaries),
                }
                for number, part in enumerate(plan.parts)
            ],
            "rows": self.records(),
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """Return the sentences under the table, printable."""
        said = [
            *self._unfinished(),
            *self._what_was_run(),
            *self.plan.study.notes,
            *self._what_is_shown(),
            *(note for part, summary in self._finished() for note in _data_set_notes(part, summary)),
            f"Everything else is in the results folder of each data set: "
            f"{', '.join(str(self.plan.output / part.data.folder) for part in self.plan.parts)}.",
        ]
        return [printable(note) for note in said]

    def _finished(self) -> list[tuple[Part, Summary]]:
        return list(zip(self.plan.parts, self.summaries, strict=False))

    def _rows(self, summary: Summary) -> list[Row]:
        """Return the rows of the study; a results folder may hold more."""
        by_spec = {row.spec: row for row in summary.rows}
        return [by_spec[one.spec] for one in self.plan.configurations]

    def _headings(self) -> list[tuple[str, str]]:
        """Return policy and budget of each column."""
        if not self.summaries:
            return []
        return [
            (printable(row.label), printable(budget(row, self.summaries[0].window_seconds)))
            for row in self._rows(self.summaries[0])
        ]

    def _lines(self, summary: Summary, intervals: bool) -> list[tuple[str, list[str]]]:
        """Return the lines of a data set: metric, tokens kept, bytes held, and times if they were taken."""
        rows = self._rows(summary)
        main = "right %" if summary.higher_is_better else "WER %"
        found = [
            (f"{main} [95 %]" if intervals else main, [_metric(row, intervals) for row in rows]),
            ("kept %", [f"{100 * row.kept_fraction:.1f}" for row in rows]),
            *([("read %", [f"{100 * row.read:.1f}" for row in rows])] if summary.reads_less else []),
            ("MiB", [f"{row.bytes_held / 2**20:.4g}" for row in rows]),
        ]
        if summary.stock is not None:
            speeds = [row.speed for row in rows]
            found += [
                ("prefill", [times(speed.prefill_ratio) if speed else "" for speed in speeds]),
                ("token", [times(speed.token_ratio) if speed else "" for speed in speeds]),
            ]
        return found

    def _unfinished(self) -> list[str]:
        left = [part.data.title for part in self.plan.parts[len(self.summaries) :]]
        return [f"Not finished: {', '.join(left)}. The same command goes on."] if left else []

    def _what_was_run(self) -> list[str]:
        """Say which model ran, and what the command line stated in place of the study file."""
        own, used, stated = self.plan.study.settings, self.plan.parts[0].settings, self.plan.overrides
        metric = self.plan.parts[0].data.metric
        changed = []
        if stated.model is not None:
            changed.append(f"model {stated.model} and not {model_name(own, metric)}")
        if stated.limit is not None:
            changed.append(f"at most {stated.limit} examples of each task")
        if stated.batch_size is not None:
            changed.append(f"batches of {stated.batch_size} and not {own.batch_size}")
        if len(self.plan.parts) < len(self.plan.study.data):
            changed.append(f"{len(self.plan.parts)} of {len(self.plan.study.data)} data sets")
        device = self.summaries[0].device if self.summaries else used.device
        return [
            f"Model {model_name(used, metric)} ({used.dtype}) on {device}, seed {used.seed}, "
            f"batches of {used.batch_size}.",
            *([f"Careful: not as the study file states: {', '.join(changed)}."] if changed else []),
        ]

    def _what_is_shown(self) -> list[str]:
        if not self.summaries:
            return []
        first = self.summaries[0]
        what = (
            "Right answers with 95 % Wilson intervals: an answer counts if it equals one of those that the "
            "data set lists."
            if first.higher_is_better
            else "Word error rates (lower is better) with 95 % bootstrap intervals over utterances."
        )
        mode = (
            "The last token of each prompt was read again from the pruned cache."
            if first.reread
            else "Plain generate: no token of the prompt was read again from the pruned cache."
        )
        references = [row.spec for row in self._rows(first) if row.is_reference]
        seen = [f"{', '.join(references)} may look at the answer, and is no method."] if references else []
        timed = [
            "prefill is the time until the first token, token that per later token, both relative to full."
        ] * (first.stock is not None)
        return [
            f"{what} * marks differences to the full cache that hold after Holm's correction for all "
            "configurations in the results folder of the data set. kept % is the share of visible tokens "
            "kept, and MiB the cross-attention cache of one example, both measured."
            + (" read % is the share that a decode step reads." if first.reads_less else ""),
            mode,
            *timed,
            *seen,
            *_draws_note(self._rows(first)),
        ]


def _draws_note(rows: Sequence[Row]) -> list[str]:
    """Say which policies drew at random, how often, and whether their luck is in the intervals."""
    drawn = [row for row in rows if row.seeds]
    if not drawn:
        return []
    names = ", ".join(dict.fromkeys(row.label for row in drawn))
    draws = len(drawn[0].seeds)
    if draws > 1:
        return [f"{names} drew {draws} times; intervals count the luck of questions and of draws."]
    return [
        f"Careful: {names} drew once, and the luck of that draw is not in the intervals; draws = 5 in the "
        "study file counts it."
    ]


def _metric(row: Row, intervals: bool) -> str:
    rate = row.main
    interval = f" [{100 * rate.low:.0f}, {100 * rate.high:.0f}]" if intervals else ""
    return f"{100 * rate.value:.1f}{interval}{'*' if survives(row.versus_full) else ''}"


def _data_set_notes(part: Part, summary: Summary) -> list[str]:
    """Return how many examples there were, what a constant answer gives, and how many answers were cut."""
    title, said = part.data.title, ""
    if summary.constant_answer:
        sizes: Mapping[str, int] = summary.task_sizes
        constant = sum(share * sizes[task] for task, share in summary.constant_answer.items())
        said = (
            "; always giving the most frequent answer of each task would be right in "
            f"{100 * constant / summary.examples:.1f} %"
        )
    what = "utterances" if summary.kind == "speech" else "questions"
    found = [f"{title}: {summary.examples} {what}{said}."]
    worst = max(summary.rows, key=lambda row: row.unfinished)
    if worst.unfinished:
        found.append(
            f"Careful, {title}: {summary.reference.unfinished} answers of full and {worst.unfinished} of "
            f"{worst.spec} were cut at the limit on new tokens, and cut answers are hardly ever right."
        )
    return found


def _record(part: Part, summary: Summary, row: Row) -> Record:
    versus = row.versus_full
    return {
        "data_set": part.data.title,
        "metric": summary.metric,
        "examples": summary.examples,
        "spec": row.spec,
        "policy": row.label,
        "budget": row.budget,
        "reference": row.is_reference,
        "draws": row.draws,
        "value": row.main.value,
        "low": row.main.low,
        "high": row.main.high,
        "kept_fraction": row.kept_fraction,
        "read_fraction": row.read,
        "bytes_held": row.bytes_held,
        "bytes_full": row.bytes_full,
        "agreement": row.agreement.value,
        "versus_full": None if versus is None else versus.value,
        "versus_full_low": None if versus is None else versus.low,
        "versus_full_high": None if versus is None else versus.high,
        "versus_full_p_value": None if versus is None else versus.p_value,
        "versus_full_p_adjusted": None if versus is None else versus.p_adjusted,
        "cut": row.unfinished,
    }
