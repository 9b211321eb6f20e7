"""Views before the first layer with class attention, and what both policies that read it have in common."""

from __future__ import annotations

import torch
from helpers import make_features, make_visibility

from kvprune import Layout


def make_paid(visibility, seed=0, ties=False):
    """Class attention that adds up to 1 in each unit, 0 where no live row sees it."""
    random = torch.Generator().manual_seed(seed)
    shape = (visibility.batch, visibility.columns)
    drawn = torch.rand(shape, generator=random, dtype=torch.float64) ** 4 + 1e-3
    if ties:
        drawn = torch.randint(1, 4, shape, generator=random).double()
    drawn = drawn.masked_fill(~visibility.prefill, 0)
    units = visibility.units.expand(visibility.batch, -1)
    total = torch.zeros(visibility.batch, visibility.rows.shape[-1], dtype=torch.float64)
    total.scatter_add_(-1, units, drawn)
    return drawn / total.gather(-1, units).clamp(min=1e-30)


def make_seen(visibility, *, seed=0, ties=False, classes=False, **fields):
    """A view with class attention; with ``classes``, each unit begins with a class token."""
    paid = make_paid(visibility, seed, ties)
    if classes:
        units = visibility.units.expand(visibility.batch, -1)
        first = torch.ones_like(paid, dtype=torch.bool)
        first[:, 1:] = units.diff(dim=-1) != 0
        paid = paid.masked_fill(first, 0)
        layout = Layout(Layout.line(visibility.columns).places, first)
        fields = {"layout_of": lambda: layout} | fields
    return make_features(visibility, seed=seed, **({"captured_class_attention": paid} | fields))


def large():
    """A chat of three images with more tokens than random conversations have: two samples, padding tiles."""
    rows = [[[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]]
    return make_visibility(rows, 25, images=[0, 1, 1, 2])


def class_tokens(view, sample):
    """Columns that are class tokens."""
    marked = view.layout.class_tokens
    return (
        set() if marked is None else set(marked.expand(view.batch, -1)[sample].nonzero().flatten().tolist())
    )


def members_of(selection, sample):
    """Members of each kept column and their weights, by kept column."""
    kept = selection.indices[sample, 0][selection.valid[sample, 0]].tolist()
    members = {anchor: {} for anchor in kept}
    if selection.merge is None:
        return {anchor: {anchor: 1.0} for anchor in kept}
    weights = selection.merge.weights[sample, 0].tolist()
    for column, entry in enumerate(selection.merge.into[sample, 0].tolist()):
        if entry >= 0:
            members[kept[entry]][column] = weights[column]
    return members


def cosines(view, sample, column, others):
    """Cosine of a column's features with each of the others, with plain sums."""

    def unit(index):
        vector = view.features[sample, index].tolist()
        length = sum(number * number for number in vector) ** 0.5
        return [number / length if length else 0.0 for number in vector]

    own = unit(column)
    return {other: sum(a * b for a, b in zip(own, unit(other), strict=True)) for other in others}


def even_turns(columns):
    """Turn of each column: its position with the bits reversed, in as many bits as there are positions."""
    ordered = sorted(columns)
    bits = (len(ordered) - 1).bit_length()
    return {
        column: int(format(place, f"0{bits}b")[::-1], 2) if bits else 0
        for place, column in enumerate(ordered)
    }


def choose_from(columns, groups, paid, limit, back):
    """Keep the best ``limit - back`` columns and ``back`` even ones; the best of each group comes first.

    Returns:
        What is kept, and what attention alone would keep.
    """
    by_paid = sorted(columns, key=lambda column: (-paid[column], column))
    best = set(by_paid[: limit - back])
    turns = even_turns(columns)
    even = sorted((column for column in columns if column not in best), key=turns.get)[:back]
    chosen = best | set(even)
    first = {min(group & columns, key=by_paid.index) for group in groups if group & columns}
    if len(first) <= 1:
        return chosen | first, best
    others = sorted(columns - first, key=lambda column: (column not in chosen, by_paid.index(column)))
    return first | set(others[: max(0, limit - len(first))]), best


def require_joins(view, sample, members, takers, classes, groups):
    """Each dropped column of a group with takers joined the most alike of them; all else joined nothing."""
    joined = {column: anchor for anchor, bucket in members.items() for column in bucket}
    assert len(joined) == sum(map(len, members.values()))  # in one bucket at most
    assert all(joined[anchor] == anchor for anchor in members)
    for group in groups:
        there = sorted(takers & group)
        for column in group - set(members):
            if column in classes or not there:
                assert column not in joined
                continue
            alike = cosines(view, sample, column, there)
            assert joined[column] in there
            assert alike[joined[column]] >= max(alike.values()) - 1e-9
    inside = set().union(*groups) if groups else set()
    assert set(joined) <= inside | set(members)
