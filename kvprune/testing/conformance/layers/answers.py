"""Asks a policy about one layer, and checks the shape and order of its answer (KV01).

Nothing here relies on the checks of `Selection` or of the engine, which a selection can avoid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.moments import FeaturePolicy
from kvprune.policy.view import FeatureView, LayerView
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.problems import LayerProblem
from kvprune.testing.reference import kept_sets, slow_decode, slow_prefill
from kvprune.tokens.decision import Decision
from kvprune.tokens.layout import Layout
from kvprune.tokens.replacement import Replacement
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = [
    "KeptRow",
    "answer",
    "check_shape",
    "decides_nothing",
    "kept_rows",
    "pose",
    "require_well_formed",
    "selections_of",
]


def pose(policy: CrossKVPolicy, problem: LayerProblem) -> FeatureView | LayerView:
    """Return the view of a problem, with only the captured tensors that the policy declares in `needs`."""
    by_features = isinstance(policy, FeaturePolicy)
    view = problem.features(policy.name) if by_features else problem.view(policy.name)
    given = policy.needs | {"features"} if by_features else policy.needs  # such a policy always sees features
    view = dataclasses.replace(view, captured=view.captured.only(given))
    if "grid" in policy.needs and view.layout.geometry == "line":  # a model without a grid would be refused
        return dataclasses.replace(view, layout_of=lambda: _three_across(problem.layout()))
    return view


def _three_across(line: Layout) -> Layout:
    """Return the layout of the same columns as patches of a picture that is three patches wide."""
    column = line.places[..., 1]
    places = torch.stack([column // 3, column % 3], dim=-1).masked_fill(column[..., None] < 0, -1)
    return dataclasses.replace(line, places=places, geometry="grid")


def answer(policy: CrossKVPolicy, view: FeatureView | LayerView) -> Decision:
    """Return the policy's decision; raise `Violation` if it is malformed (KV01)."""
    with torch.no_grad():
        if isinstance(view, FeatureView):
            assert isinstance(policy, FeaturePolicy)
            decision = policy.choose(view)
        else:
            decision = policy.select(view)
    require_well_formed(decision, view)
    return decision


def decides_nothing(policy: CrossKVPolicy, problem: LayerProblem) -> bool:
    """Return whether the policy keeps everything in this problem."""
    return answer(policy, pose(policy, problem)) == Decision()


def selections_of(decision: Decision) -> Iterator[tuple[str, Selection]]:
    """Yield the selections of a decision with their names, "cache" and "onward"."""
    for part, selection in (("cache", decision.cache), ("onward", decision.received)):
        if selection is not None:
            yield part, selection


@dataclass(frozen=True)
class KeptRow:
    """The columns that one sample keeps in one head.

    Attributes:
        part: "cache" (what decoding reads) or "onward" (what later layers receive).
        see: What the text rows may attend.
        sample: Index of the sample.
        head: Index of the KV head.
        kept: The columns.
    """

    part: str
    see: Visibility
    sample: int
    head: int
    kept: set[int]

    @property
    def where(self) -> str:
        """Names part, sample and head in messages."""
        return f"{self.part}, sample {self.sample}, head {self.head}"

    @property
    def visible(self) -> set[int]:
        """Columns that are visible: in decode for "cache", in prefill for "onward"."""
        visible_to = slow_decode if self.part == "cache" else slow_prefill
        return visible_to(self.see, self.sample)


def kept_rows(policy: CrossKVPolicy, problem: LayerProblem) -> Iterator[KeptRow]:
    """Yield what the policy keeps, by selection, sample and head."""
    view = pose(policy, problem)
    for part, selection in selections_of(answer(policy, view)):
        for sample, heads in enumerate(kept_sets(selection)):
            for head, kept in enumerate(heads):
                yield KeptRow(part, view.visibility, sample, head, kept)


def check_shape(policy: CrossKVPolicy, problem: LayerProblem) -> None:
    """KV01: the answer is well formed."""
    answer(policy, pose(policy, problem))


def require_well_formed(decision: object, view: FeatureView | LayerView) -> None:
    """Raise `Violation` unless a decision has the shape and order that KV01 asks for."""
    if not isinstance(decision, Decision):
        raise Violation("a Decision(cache=..., onward=...) from select (KV01)", repr(decision)[:200])
    if isinstance(decision.onward, Replacement):
        _require_features(decision.onward, view)
    for part, selection in selections_of(decision):
        _require_tensors(part, selection, view)
        for sample, by_head in enumerate(selection.indices.tolist()):
            for head, row in enumerate(by_head):
                where = f"{part}, sample {sample}, head {head}: "
                _require_order(where, row, selection.valid[sample, head].tolist(), view.columns)


def _require_tensors(part: str, selection: Selection, view: FeatureView | LayerView) -> None:
    """Raise unless a selection has tensors of the right dtype and shape, for the columns of the view."""
    if not isinstance(selection, Selection):
        raise Violation(f"a Selection or None as {part} (KV01)", type(selection).__name__)
    heads = (1, view.heads) if part == "cache" else (1,)
    indices, valid = selection.indices, selection.valid
    for name, tensor, dtype in (("indices", indices, torch.int64), ("valid", valid, torch.bool)):
        wanted = f"{part}.{name} of {dtype} [{view.batch}, {' or '.join(map(str, heads))}, K] (KV01)"
        if not isinstance(tensor, torch.Tensor):
            raise Violation(wanted, type(tensor).__name__)
        shape = list(tensor.shape)
        if tensor.dtype != dtype or len(shape) != 3 or shape[0] != view.batch or shape[1] not in heads:
            raise Violation(wanted, f"{tensor.dtype} {shape}")
    if indices.shape != valid.shape:
        raise Violation(
            f"{part}.valid of the shape of indices, {list(indices.shape)} (KV01)", str(list(valid.shape))
        )
    if selection.columns != view.columns:
        raise Violation(
            f"{part} to select from the {view.columns} columns of the view (KV01)", f"{selection.columns}"
        )


def _require_features(replacement: Replacement, view: FeatureView | LayerView) -> None:
    """Raise unless new tokens have finite features of the right dtype and shape."""
    features, shown, places = replacement.features, view.captured.features, replacement.places
    if shown is None:
        raise Violation('needs = frozenset({"features"}) in a policy that makes new tokens (KV01)', "none")
    wanted = [*places.indices.shape[::2], shown.shape[-1]]
    if features.dtype != shown.dtype or list(features.shape) != wanted:
        raise Violation(
            f"new tokens of {shown.dtype} {wanted} (KV01)", f"{features.dtype} {list(features.shape)}"
        )
    if not features[places.valid[:, 0]].isfinite().all():
        raise Violation("finite features of new tokens (KV01)", "NaN or infinite ones")


def _require_order(where: str, row: list[int], flags: list[bool], columns: int) -> None:
    """Raise unless one row holds increasing columns followed by padding. It may be empty: that is KV03."""
    count = sum(flags)
    if not all(0 <= index < columns for index in row):
        raise Violation(f"{where}columns in [0, {columns}) (KV01)", f"{row}")
    if flags != sorted(flags, reverse=True):
        raise Violation(f"{where}valid entries before padding (KV01)", f"valid {flags}")
    if row[:count] != sorted(set(row[:count])):
        raise Violation(f"{where}strictly increasing columns (KV01)", f"{row[:count]}")
    if count and any(index != row[count - 1] for index in row[count:]):
        raise Violation(f"{where}padding that repeats the last column (KV01)", f"{row}")
