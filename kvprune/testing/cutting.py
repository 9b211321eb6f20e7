"""Cuts one sample out of a generated problem, as if it came alone."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

from kvprune.policy.text_view import TextView
from kvprune.policy.view import LayerView, View
from kvprune.testing.problems import LayerProblem
from kvprune.tokens.layout import Layout
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

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[one, :, :columns].clone()

    def layout() -> Layout:
        whole = problem.layout()
        return Layout(whole.places.expand(see.batch, -1, -1)[one, :columns])

    rows = see.rows[one]
    cuts: dict[str, Any] = {
        "layout_of": layout,
        "fingerprints": lambda: problem.fingerprints()[one],
        "captured_features": None
        if view.captured_features is None
        else view.captured_features[one, :columns].clone(),
        "captured_guidance": None
        if view.captured_guidance is None
        else view.captured_guidance[one, :columns].clone(),
        "captured_class_attention": None
        if view.captured_class_attention is None
        else view.captured_class_attention[one, :columns].clone(),
        "visibility": Visibility(
            rows=rows if rows.shape[1] == 1 else rows[:, first_row:],
            units=see.units.expand(see.batch, -1)[one, :columns],
            images=see.images,
            live=see.live[one, first_row:],
            exists=None if see.exists is None else see.exists[one, :columns],
        ),
    }
    if isinstance(view, LayerView):
        queries = view.captured_queries
        cuts |= {
            "keys": cut(view.keys),
            "values": cut(view.values),
            "captured_queries": None if queries is None else queries[one, :, first_row:],
            "captured_raw_keys": cut(view.captured_raw_keys),
            "captured_text": None
            if view.captured_text is None
            else cut_text(view.captured_text, one, first_row),
        }
    return dataclasses.replace(view, **cuts)


def cut_text(text: TextView, sample: slice, first: int) -> TextView:
    """Return the text of one sample without the ``first`` rows and entries, which are padding."""
    tensors = {name: getattr(text, name)[sample, :, first:].clone() for name in ("queries", "keys", "values")}
    return dataclasses.replace(
        text, real=text.real[sample, first:], image_tokens=text.image_tokens[sample], **tensors
    )
