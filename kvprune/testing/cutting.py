"""Cuts one sample out of a generated problem, as if it came alone."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

from kvprune.policy.captured import Captured
from kvprune.policy.text_view import TextView
from kvprune.policy.view import LayerView, View
from kvprune.testing.problems import LayerProblem
from kvprune.tokens.layout import Layout
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["cut_text", "cut_to_sample"]

_View = TypeVar("_View", bound=View)


def cut_to_sample(view: _View, problem: LayerProblem, sample: int) -> _View:
    """Return the view that a sample of a problem has when it comes alone, without the padding of its batch.

    Its left padding goes, and so do the columns at the end that exist only because other samples have more
    images.
    """
    see = view.visibility
    one = slice(sample, sample + 1)
    images = sum(letter.isdigit() for letter in problem.layouts[sample])
    columns = see.columns
    first_row = 0
    if problem.family == "mllama":
        first_row = see.live.shape[1] - len(problem.layouts[sample])
        if images > problem.arrived and problem.received == 1.0:
            columns = (images - problem.arrived) * problem.tiles * problem.patches
    elif problem.received == 1.0:
        columns = int((see.units[sample] == 0).sum())

    def cut(tensor: Tensor) -> Tensor:
        return tensor[one, :, :columns].clone()

    def layout() -> Layout:
        whole, first = view.layout, Selection.all(see.batch, columns)
        every = whole.at(first.indices[:, 0], first.valid[:, 0])
        classes, kinds = every.class_tokens, every.kinds
        return dataclasses.replace(
            every,
            places=every.places[one],
            class_tokens=None if classes is None else classes[one],
            kinds=None if kinds is None else kinds[one],
        )

    rows = see.rows[one]
    cuts: dict[str, Any] = {
        "layout_of": layout,
        "fingerprints": lambda: problem.fingerprints()[one],
        "captured": _cut_captured(view.captured, one, columns, first_row),
        "visibility": Visibility(
            rows=rows if rows.shape[1] == 1 else rows[:, first_row:],
            units=see.units.expand(see.batch, -1)[one, :columns],
            images=see.images,
            live=see.live[one, first_row:],
            exists=None if see.exists is None else see.exists[one, :columns],
        ),
    }
    if isinstance(view, LayerView):
        cuts |= {"keys": cut(view.keys), "values": cut(view.values)}
    return dataclasses.replace(view, **cuts)


def _cut_captured(captured: Captured, sample: slice, columns: int, first_row: int) -> Captured:
    """Return what was captured of a sample: its first ``columns``, from text row ``first_row`` on."""
    queries, text = captured.queries, captured.text
    one = captured.rows(sample).at(Selection.all(1, columns))
    return dataclasses.replace(
        one,
        queries=None if queries is None else queries[sample, :, first_row:],
        text=None if text is None else cut_text(text, sample, first_row),
    )


def cut_text(text: TextView, sample: slice, first: int) -> TextView:
    """Return the text of one sample without the ``first`` rows and entries, which are padding."""
    tensors = {name: getattr(text, name)[sample, :, first:].clone() for name in ("queries", "keys", "values")}
    return dataclasses.replace(
        text, real=text.real[sample, first:], image_tokens=text.image_tokens[sample], **tensors
    )
