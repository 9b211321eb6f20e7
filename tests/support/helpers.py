"""Hand-built visibilities and views, beside the public slow references and strategies."""

import dataclasses
import math
from fractions import Fraction

import torch

from kvprune import FeatureView, LayerView, Layout
from kvprune.policy.captured import Captured
from kvprune.testing.reference import (
    kept_sets,
    live_rows,
    seen_by_row,
    slow_decode,
    slow_groups,
    slow_prefill,
    slow_strata,
)
from kvprune.testing.strategies import conversations, visibilities
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = [
    "alone",
    "conversations",
    "exact_budget",
    "kept_sets",
    "live_rows",
    "make_features",
    "make_view",
    "make_visibility",
    "one_of",
    "seen_by_row",
    "slow_attention",
    "slow_decode",
    "slow_groups",
    "slow_prefill",
    "slow_strata",
    "visibilities",
]


def make_visibility(rows, columns_per_unit, images=None, live=None, exists=None):
    """Rows as nested 0/1 lists ``[B][T][U]``; by default all rows that see something are live."""
    rows = torch.tensor(rows, dtype=torch.bool)
    unit_count = rows.shape[-1]
    if isinstance(columns_per_unit, int):
        columns_per_unit = [columns_per_unit] * unit_count
    units = torch.arange(unit_count).repeat_interleave(torch.tensor(columns_per_unit))[None]
    images = torch.zeros(unit_count, dtype=torch.int64) if images is None else torch.tensor(images)
    live = rows.any(-1) if live is None else torch.tensor(live, dtype=torch.bool)
    exists = None if exists is None else torch.tensor(exists, dtype=torch.bool)
    return Visibility(rows, units, images, live, exists)


def with_captured(fields):
    """Fields of a view, in which ``captured_x`` stands for what `Captured` calls ``x``."""
    captured = {name: fields.pop(name) for name in [*fields] if name.startswith("captured_")}
    return fields | {
        "captured": Captured(**{name.removeprefix("captured_"): value for name, value in captured.items()})
    }


def make_view(
    visibility, *, query_heads=4, kv_heads=2, width=4, seed=0, rank=0, dtype=torch.float64, **fields
):
    """A view of random keys, values and queries over a visibility; ``fields`` override the view's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, length):
        shape = (visibility.batch, heads, length, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    text_rows = visibility.live.shape[1]
    defaults = {
        "keys": draw(kv_heads, visibility.columns),
        "values": draw(kv_heads, visibility.columns),
        "captured_queries": draw(query_heads, text_rows),
        "captured_raw_keys": draw(kv_heads, visibility.columns),
        "visibility": visibility,
        "layer_idx": 3 + 5 * rank,
        "rank": rank,
        "num_layers": 3,
        "scaling": width**-0.5,
        "fingerprints": lambda: torch.arange(visibility.batch) * 7919 + 13,
        "policy_name": "test",
    }
    return LayerView(**with_captured(defaults | fields))


def alone(view, sample, columns=None):
    """The same view with one sample only, cut after its first ``columns`` columns."""
    see = view.visibility
    one = slice(sample, sample + 1)
    units = see.units.expand(see.batch, -1)[one, :columns]
    exists = None if see.exists is None else see.exists[one, :columns]

    def cut(tensor):
        return None if tensor is None else tensor[one, :, :columns]

    return LayerView(
        keys=cut(view.keys),
        values=cut(view.values),
        visibility=Visibility(see.rows[one], units, see.images, see.live[one], exists),
        layer_idx=view.layer_idx,
        rank=view.rank,
        num_layers=view.num_layers,
        scaling=view.scaling,
        seed=view.seed,
        fingerprints=lambda: view.fingerprints().expand(see.batch)[one],
        policy_name=view.policy_name,
        captured=view.captured.rows(one).at(Selection.all(1, units.shape[-1])).only(("queries", "raw_keys")),
    )


def exact_budget(ratio, count):
    """The smallest whole number that is no less than the written decimal times the count."""
    return math.ceil(Fraction(str(ratio)) * count)


def slow_attention(view, sample, head, counted=None):
    """Attention mass of one head by column, in plain Python floats; 0 for unseen columns."""
    visibility = view.visibility
    kv_head = head // (view.captured.queries.shape[1] // view.keys.shape[1])
    keys = view.keys[sample, kv_head].double().tolist()
    mass = [0.0] * len(keys)
    for row in live_rows(visibility, sample):
        if counted is not None and not counted[sample][row]:
            continue
        query = view.captured.queries[sample, head, row].double().tolist()
        columns = sorted(seen_by_row(visibility, sample, row))
        logits = [
            view.scaling * math.fsum(q * k for q, k in zip(query, keys[c], strict=True)) for c in columns
        ]
        highest = max(logits)
        weights = [math.exp(logit - highest) for logit in logits]
        total = math.fsum(weights)
        for column, weight in zip(columns, weights, strict=True):
            mass[column] += weight / total
    return mass


def make_features(visibility, *, width=6, seed=0, dtype=torch.float64, grid=None, **fields):
    """A view before the first layer: random features, on a line or on a grid ``grid`` patches wide."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(visibility.batch, visibility.columns, width, generator=random, dtype=torch.float64)
    layout = Layout.line(visibility.columns)
    if grid is not None:
        column = torch.arange(visibility.columns)
        layout = Layout(torch.stack([column // grid, column % grid], dim=-1)[None])
    defaults = {
        "visibility": visibility,
        "num_layers": 3,
        "fingerprints": lambda: torch.arange(visibility.batch) * 7919 + 13,
        "policy_name": "test",
        "layout_of": lambda: layout,
        "captured_features": features.to(dtype),
    }
    return FeatureView(**with_captured(defaults | fields))


def one_of(view, sample):
    """A view before the first layer with one sample only."""
    see = view.visibility
    one = slice(sample, sample + 1)
    places = view.places.expand(see.batch, -1, -1)[one]
    classes, paid = view.layout.class_tokens, view.captured.class_attention
    classes = None if classes is None else classes.expand(see.batch, -1)[one]
    paid = None if paid is None else paid[one]
    return dataclasses.replace(
        view.capturing(features=view.captured.features[one], class_attention=paid),
        visibility=Visibility(
            see.rows[one],
            see.units.expand(see.batch, -1)[one],
            see.images,
            see.live[one],
            None if see.exists is None else see.exists[one],
        ),
        fingerprints=lambda: view.fingerprints().expand(see.batch)[one],
        layout_of=lambda: Layout(places, classes),
    )
