"""The figures of the page: one row for each policy, one panel for each set, one mark for each budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evidence.numbers import EvidenceSet, Row
from evidence.wording import names, order, share
from kvprune.comparison.display.curves import REFERENCE_STYLE, add_legend, figure, png, rate_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = (("o", "#56B4E9"), ("s", "#0072B2"), ("D", "#E69F00"), ("^", "#D55E00"), ("v", "#000000"))
"""Mark and colour of each budget, the largest first: from the palette of Okabe and Ito."""

_SPREAD = 0.4
"""Marks of one policy are spread over so much of its row, so that equal ones are seen."""

_HIGHEST = 10.0
"""Error rates above this are drawn at the border."""


def figures(sets: Mapping[str, EvidenceSet]) -> dict[str, bytes]:
    """Return the PNG of each figure by the name of its file."""
    found: dict[str, list[EvidenceSet]] = {}
    for one in sets.values():
        found.setdefault(one.figure, []).append(one)
    return {f"evidence_{name}.png": render(panels) for name, panels in found.items()}


def render(panels: Sequence[EvidenceSet]) -> bytes:
    """Draw sets beside one another; policies stand in the order of the first, the best on top."""
    from matplotlib.lines import Line2D

    labels = list(dict.fromkeys(label for one in panels for label in order(one)))
    references = list(dict.fromkeys(row.label for one in panels for row in one.rows if row.reference))
    shown = names([*labels, *references])
    rows = [row for one in panels for row in one.rows]
    stepping = {row.label for row in rows if row.steps}
    reading = {row.label for row in rows if row.reads_prompt and not row.reference} - stepping
    ratios = sorted({ratio for one in panels for ratio in one.ratios}, reverse=True)
    looks = {ratio: _LOOKS[number % len(_LOOKS)] for number, ratio in enumerate(ratios)}
    places = {label: -float(number) for number, label in enumerate(labels)}
    places |= {label: -len(labels) - 0.6 - number for number, label in enumerate(references)}
    made = figure((2.2 + 3.9 * len(panels), 1.6 + 0.23 * len(places)))
    axes = made.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, one in zip(axes, panels, strict=True):
        alike = [other for other in panels if other.speech == one.speech]
        _panel(axis, one, places, looks, _reach(alike))
    axes[0].set_yticks(list(places.values()), [shown[label] for label in places], fontsize=8.5)
    axes[0].set_ylim(min(places.values()) - 0.7, 0.7)
    for label, text in zip(places, axes[0].get_yticklabels(), strict=True):
        text.set_parse_math(False)
        text.set_fontweight("bold" if label in reading else "normal")
        text.set_fontstyle("italic" if label in stepping else "normal")
    handles = [
        Line2D([], [], color=colour, marker=mark, linestyle="", markersize=6, label=f"{share(ratio)} kept")
        for ratio, (mark, colour) in looks.items()
    ]
    full = Line2D([], [], color="0.35", linestyle="-.", label="full (nothing dropped)")
    hollow = Line2D(
        [], [], color="0.35", marker="o", markerfacecolor="white", linestyle="", label="kept another share"
    )
    handles += [full, hollow]
    if any(one.chance for one in panels):
        handles.append(Line2D([], [], color="0.6", linestyle=":", label="most frequent answer of each task"))
    if references:
        star = {**REFERENCE_STYLE, "linestyle": "", "label": "sees the answer"}
        handles.append(Line2D([], [], **star))
    if reading:
        handles.append(Line2D([], [], linestyle="", label="bold name: reads the prompt"))
    if stepping:
        handles.append(Line2D([], [], linestyle="", label="italic name: chooses in each step; share read"))
    add_legend(made, handles, beside=False)
    return png(made)


def _panel(
    axis: Axes,
    one: EvidenceSet,
    places: Mapping[str, float],
    looks: Mapping[float, tuple[str, str]],
    reach: tuple[float, float],
) -> None:
    """Draw one set: for each policy a mark for each budget, on a thin line."""
    by_label: dict[str, list[Row]] = {}
    for row in one.rows:
        if row.keep_ratio is not None:
            by_label.setdefault(row.label, []).append(row)
    for label, rows in by_label.items():
        values = [_drawn(one, row) for row in rows]
        axis.plot([min(values), max(values)], [places[label]] * 2, color="0.8", linewidth=1.2, zorder=1)
        for row, value in zip(rows, values, strict=True):
            mark, colour = looks[row.keep_ratio or 0]
            shift = _SPREAD * (list(looks).index(row.keep_ratio or 0) / max(1, len(looks) - 1) - 0.5)
            axis.plot(
                value,
                places[label] - shift,
                marker="*" if row.reference else mark,
                markeredgecolor=colour if row.misses_budget else "white",
                markerfacecolor="white" if row.misses_budget else colour,
                markeredgewidth=1.2 if row.misses_budget else 0.4,
                markersize=8 if row.reference else 5.5,
                zorder=3,
            )
    axis.axvline(one.full.rate.value, color="0.35", linestyle="-.", linewidth=1.2, zorder=0)
    if one.chance:
        constant = sum(one.chance[task] * count for task, count in one.tasks.items()) / one.examples
        axis.axvline(constant, color="0.6", linestyle=":", linewidth=1.2, zorder=0)
    rate_scale(axis, *reach, shares=not one.speech, along="x")
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)
    unit = "utterances" if one.speech else "questions"
    axis.set_title(f"{one.title} ({one.examples} {unit})", fontsize=9, parse_math=False)
    metric = "word error rate (log scale, lower is better)" if one.speech else "right answers"
    axis.set_xlabel(metric, fontsize=9)


def _reach(panels: Sequence[EvidenceSet]) -> tuple[float, float]:
    """Return the lowest and highest rate of an axis that panels of one metric share."""
    if not panels[0].speech:
        return 0.0, 1.0
    every = [_drawn(one, row) for one in panels for row in one.rows]
    return min(every), max(every)


def _drawn(one: EvidenceSet, row: Row) -> float:
    return min(row.rate.value, _HIGHEST) if one.speech else row.rate.value
