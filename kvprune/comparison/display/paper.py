"""The table of a comparison for papers: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

from kvprune.comparison.display.cells import columns, survives
from kvprune.comparison.display.naming import budget, p_text
from kvprune.comparison.display.notes import notes
from kvprune.comparison.display.records import Provenance
from kvprune.comparison.display.table import groups
from kvprune.comparison.display.table_formats import latex, markdown, pipe_table
from kvprune.comparison.plan.settings import NO_GUIDE
from kvprune.comparison.statistics.contrasts import Contrast
from kvprune.comparison.statistics.paired import PairedDifference
from kvprune.comparison.statistics.rates import Rate
from kvprune.comparison.statistics.summary import Row, Summary

__all__ = ["latex_table", "markdown_table"]


def markdown_table(summary: Summary, made: Provenance) -> str:
    """Return the table with all columns as a pipe table, its notes, and where it comes from."""
    shown = columns(summary, ranked=False)
    rows = [row for group in groups(summary.rows) for row in group]
    cells = [
        [row.label, budget(row, summary.window_seconds), *(column.cell(row) for column in shown)]
        for row in rows
    ]
    headings = ["policy", "budget", *(column.heading for column in shown)]
    text = pipe_table(headings, cells, [False, False, *(True for _ in shown)])
    said = [*notes(summary), _origin(summary, made)]
    return text + "\n" + "".join(f"- {markdown(note)}\n" for note in said)


def latex_table(summary: Summary, made: Provenance) -> str:
    """Return a table environment with booktabs; the best of each budget is bold.

    Its first line names the packages that it needs: booktabs, fontenc (T1) and textcomp. Rows that may look
    at the answer are marked with a dagger and never bold. Equal bests are all bold.
    """
    partner = summary.partner is not None
    main = r"Right (\%)" if summary.higher_is_better else r"WER (\%)"
    headings = ["Policy", "Budget", "Kept", *(["Read"] if summary.reads_less else []), "MiB", main]
    if summary.metric == "word_error_rate":
        headings.append(r"CER (\%)")
    if partner:
        headings += [f"$\\Delta$ {latex(summary.partner or '')}", "$p$", r"$p_{\mathrm{Holm}}$"]
    lines = [
        r"% needs \usepackage{booktabs}, \usepackage[T1]{fontenc} and \usepackage{textcomp}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(summary, made)}}}",
        r"\label{tab:kvprune}",
        rf"\begin{{tabular}}{{ll{'r' * (len(headings) - 2)}}}",
        r"\toprule",
        " & ".join(headings) + r" \\",
    ]
    for group in groups(summary.rows):
        lines.append(r"\midrule")
        best = _best(group)
        lines += [" & ".join(_cells(row, summary, best)) + r" \\" for row in group]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _cells(row: Row, summary: Summary, best: float | None) -> list[str]:
    name = latex(row.label) + (r"$^{\dagger}$" if row.is_reference else "")
    value = _rate(row.main)
    if best is not None and row.competes and row.main.value == best:
        name, value = rf"\textbf{{{name}}}", _rate(row.main, bold=True)
    window = summary.window_seconds
    fractions = [row.kept_fraction, *([row.read] if summary.reads_less else [])]
    shares = [rf"{100 * one:.1f}\,\%" if window is None else rf"{window * one:.1f}\,s" for one in fractions]
    cells = [name, latex(budget(row, window)), *shares, f"{row.bytes_held / 2**20:.3g}", value]
    if row.speech is not None:
        cells.append(_rate(row.speech.character_error_rate))
    if summary.partner is not None:
        cells += _difference(row.versus_baseline)
    return cells


def _best(group: list[Row]) -> float | None:
    """Return the best value of a group with a budget; None where there is nothing to choose from."""
    values = [row.main.value for row in group if row.competes]
    if not group[0].budget or group[0].keep_ratio is None or len(values) < 2:
        return None
    return max(values) if group[0].speech is None else min(values)


def _rate(rate: Rate, *, bold: bool = False) -> str:
    value = f"{100 * rate.value:.1f}"
    shown = rf"\textbf{{{value}}}" if bold else value
    return f"{shown} {{[}}{100 * rate.low:.1f}, {100 * rate.high:.1f}{{]}}"


def _difference(found: Contrast | None) -> list[str]:
    if found is None:
        return ["--", "--", "--"]
    star = "^{*}" if survives(found) else ""
    adjusted = "--" if found.p_adjusted is None else _p(found.p_adjusted)
    return [_signed(found, star), _p(found.p_value), adjusted]


def _signed(found: PairedDifference, star: str) -> str:
    return f"${100 * found.value:+.1f}{star}$ {{[}}${100 * found.low:+.1f}$, ${100 * found.high:+.1f}${{]}}"


def _p(value: float) -> str:
    return f"${p_text(value)}$"


def _caption(summary: Summary, made: Provenance) -> str:
    unit = "utterances" if summary.kind == "speech" else "questions"
    metric = (
        "Right answers in percent with 95\\,\\% Wilson intervals"
        if summary.higher_is_better
        else "Word and character error rates in percent (lower is better) with 95\\,\\% bootstrap intervals"
    )
    draws = max(row.draws for row in summary.rows)
    said = [f"{metric}; $n = {summary.examples}$ {unit}."]
    if draws > 1:
        said.append(
            f"Policies that draw at random: means over up to {draws} draws, intervals over both {unit} and "
            "draws."
        )
    if summary.partner is not None:
        test = "McNemar test" if summary.kind == "pictures" else "sign-flip test"
        said.append(
            f"$\\Delta$: difference to {latex(summary.partner)} in points at the same budget, paired, with "
            f"its 95\\,\\% interval; $p$: exact {test} (t test over draws where there are several); "
            "$p_{\\mathrm{Holm}}$ and $^{*}$ ($p_{\\mathrm{Holm}} \\le 0.05$): corrected for all comparisons "
            "of this table."
        )
    if summary.reads_less:
        said.append(
            "Read: what a decode step reads, on average, which is the budget of policies that choose it."
        )
    if any(row.is_contrast for row in summary.rows):
        said.append("Rows with contrast run two branches: budget and kept share of the second, MiB of both.")
    if any(row.is_reference for row in summary.rows):
        said.append(r"$^{\dagger}$ Looks at the answer before it prunes; no method.")
    said.append(latex(_origin(summary, made)))
    return " ".join(said)


def _origin(summary: Summary, made: Provenance) -> str:
    mode = "last token of the prompt read again from the pruned cache" if summary.reread else "plain generate"
    guide = "" if made.guide == NO_GUIDE else f", guide {made.guide}"
    return (
        f"Model {made.model} ({made.dtype}){guide}, data {made.data}; {mode}; device {made.device}, "
        f"{made.machine}; {made.versions}; {made.created}."
    )
