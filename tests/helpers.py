"""Hand-built visibilities and views, and slow references written with plain loops."""

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st

from kvprune import LayerView
from kvprune.visibility import Visibility


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
    return LayerView(**(defaults | fields))


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
        captured_queries=None if view.captured_queries is None else view.captured_queries[one],
        captured_raw_keys=cut(view.captured_raw_keys),
    )


def kept_sets(selection):
    """Kept columns as a list of samples, each a list of heads, each a set."""
    return [
        [
            {column for column, is_valid in zip(row, flags, strict=True) if is_valid}
            for row, flags in zip(heads, valid, strict=True)
        ]
        for heads, valid in zip(selection.indices.tolist(), selection.valid.tolist(), strict=True)
    ]


def exact_budget(ratio, count):
    """The smallest whole number that is no less than the written decimal times the count."""
    return math.ceil(Fraction(str(ratio)) * count)


def seen_by_row(visibility, sample, row):
    """Columns that one row may attend, live or not."""
    rows = visibility.rows[sample].tolist()
    units = visibility.units[0 if len(visibility.units) == 1 else sample].tolist()
    wanted = rows[0 if len(rows) == 1 else row]
    return {
        column
        for column, unit in enumerate(units)
        if wanted[unit] and (visibility.exists is None or bool(visibility.exists[sample, column]))
    }


def live_rows(visibility, sample):
    return [row for row, flag in enumerate(visibility.live[sample].tolist()) if flag]


def slow_prefill(visibility, sample):
    return set().union(*(seen_by_row(visibility, sample, row) for row in live_rows(visibility, sample)))


def slow_decode(visibility, sample):
    rows = live_rows(visibility, sample)
    return seen_by_row(visibility, sample, rows[-1]) if rows else set()


def slow_groups(visibility, sample):
    """Sets of columns of one image that exactly the same live rows see."""
    units = visibility.units[0 if len(visibility.units) == 1 else sample].tolist()
    watchers = {}
    for row in live_rows(visibility, sample):
        for column in seen_by_row(visibility, sample, row):
            watchers.setdefault(column, []).append(row)
    groups = {}
    for column, rows in sorted(watchers.items()):
        key = (int(visibility.images[units[column]]), tuple(rows))
        groups.setdefault(key, set()).add(column)
    return list(groups.values())


def slow_strata(visibility, sample):
    """Sets of columns over which one budget is counted; the one that decoding sees comes first."""
    if not live_rows(visibility, sample):
        return [
            {
                column
                for column in range(visibility.columns)
                if visibility.exists is None or bool(visibility.exists[sample, column])
            }
        ]
    decode = slow_decode(visibility, sample)
    return [decode, *(group for group in slow_groups(visibility, sample) if not group & decode)]


def slow_attention(view, sample, head, counted=None):
    """Attention mass of one head by column, in plain Python floats; 0 for unseen columns."""
    visibility = view.visibility
    kv_head = head // (view.captured_queries.shape[1] // view.keys.shape[1])
    keys = view.keys[sample, kv_head].double().tolist()
    mass = [0.0] * len(keys)
    for row in live_rows(visibility, sample):
        if counted is not None and not counted[sample][row]:
            continue
        query = view.captured_queries[sample, head, row].double().tolist()
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


@st.composite
def visibilities(draw, max_batch=3, max_rows=5, max_units=4, max_columns=3, broadcast=False):
    """Any rows, live flags, images and missing columns; every visible unit has a column that exists."""
    batch = draw(st.integers(1, max_batch))
    text_rows = draw(st.integers(1, max_rows))
    unit_count = draw(st.integers(1, max_units))
    sizes = draw(st.lists(st.integers(1, max_columns), min_size=unit_count, max_size=unit_count))
    images = draw(st.lists(st.integers(0, 2), min_size=unit_count, max_size=unit_count))
    columns = sum(sizes)

    def bits(*shape):
        count = math.prod(shape)
        drawn = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.bool).reshape(shape)

    rows = bits(batch, 1 if broadcast else text_rows, unit_count)
    live = bits(batch, text_rows) & rows.any(-1)
    exists = None
    if draw(st.booleans()):
        exists = bits(batch, columns)
        firsts = [sum(sizes[:unit]) for unit in range(unit_count)]
        exists[:, firsts] = True
    units = torch.arange(unit_count).repeat_interleave(torch.tensor(sizes))[None]
    if draw(st.booleans()):
        units = units.repeat(batch, 1)
    return Visibility(rows, units, torch.tensor(sorted(images)), live, exists)


@st.composite
def conversations(draw, max_images=3, max_batch=3, max_rows=5, tiles=2, patches=3):
    """Chats in which each row sees the tiles of the latest image: one visibility group to a stratum.

    Rows before the first image see nothing; a sample may have no image at all.
    """
    batch = draw(st.integers(1, max_batch))
    images = draw(st.integers(1, max_images))
    text_rows = draw(st.integers(1, max_rows))
    rows = torch.zeros(batch, text_rows, images * tiles, dtype=torch.bool)
    live = torch.zeros(batch, text_rows, dtype=torch.bool)
    for sample in range(batch):
        filled = draw(st.lists(st.integers(1, tiles), min_size=images, max_size=images))
        latest = draw(st.lists(st.integers(-1, images - 1), min_size=text_rows, max_size=text_rows))
        counts = draw(st.lists(st.booleans(), min_size=text_rows, max_size=text_rows))
        for row, image in enumerate(sorted(latest)):
            if image >= 0:
                rows[sample, row, image * tiles : image * tiles + filled[image]] = True
                live[sample, row] = counts[row]
    units = torch.arange(images * tiles).repeat_interleave(patches)[None]
    return Visibility(rows, units, torch.arange(images * tiles) // tiles, live)
