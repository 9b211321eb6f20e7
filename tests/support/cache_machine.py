"""KV11 as a state machine: whatever is done to a cache, tensors and selection move together.

Hypothesis draws any sequence of fill, append, decode, retain (in any precision), merge, reorder, expand,
select, crop, reset, deep copy and moves of dtype and device, and compares two cache layers in a transformers
cache with a model of them made of plain lists after every step: keys, values, columns, precision, validity,
the additive bias over them, and bytes. Vectors have one number each, which quantization leaves as it is.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from transformers import DynamicCache

from kvprune.adapters.mllama.tile_mask import TileMask
from kvprune.adapters.sites import by_query_head
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.shared_rows import SharedRows
from kvprune.tokens.merging import Merge
from kvprune.tokens.selection import Selection

HEADS, PATCHES, LAYERS = 2, 2, 2

# A row of the batch: for each KV head, what is held as (column, key, bits, tokens it counts for), by column.
Row = list[list[tuple[int, float, int, int]]]


class CacheMachine(RuleBasedStateMachine):
    """A transformers cache of two of our layers beside its model made of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = DynamicCache()
        self.plain: list[list[Row]] = []
        self.columns = 0
        self.serial = 0.0

    @initialize(batch=st.integers(1, 3), copies=st.integers(1, 3))
    def start(self, batch: int, copies: int) -> None:
        self._open(batch, copies)

    def _open(self, batch: int, copies: int) -> None:
        self.cache = DynamicCache()
        self.cache.layers = [CrossKVLayer() for _ in range(LAYERS)]
        self.batch, self.first_copies = batch * copies, copies
        self.plain = [[[[] for _ in range(HEADS)] for _ in range(self.batch)] for _ in range(LAYERS)]
        self.columns = 0

    @property
    def layers(self) -> list[CrossKVLayer]:
        return self.cache.layers

    filled = precondition(lambda self: self.columns > 0)

    @rule(tiles=st.integers(1, 2), data=st.data())
    def append(self, tiles: int, data: st.DataObject) -> None:
        """Fill the cache, or add a new image; some of its columns may not arrive."""
        columns = tiles * PATCHES
        shared_rows = SharedRows(self.first_copies if self.columns == 0 else 1)
        for layer, plain in zip(self.layers, self.plain, strict=True):
            layer.separate()
            rows = self.batch // shared_rows.copies
            arriving = None
            if data.draw(st.booleans(), "some columns stay away"):
                kept = torch.tensor(data.draw(st.lists(_bits(columns), min_size=rows, max_size=rows)))
                kept[:, 0] |= ~kept.any(-1)
                arriving = Selection.from_mask(kept[:, None])
            layer.expect(arriving, columns, shared_rows)
            width = columns if arriving is None else arriving.indices.shape[-1]
            keys = torch.empty(self.batch, HEADS, width, 1)
            for row in range(self.batch):
                for head in range(HEADS):
                    for entry in range(width):
                        if row % shared_rows.copies:  # copies of a sample hold the same
                            keys[row, head, entry] = keys[row - 1, head, entry]
                        else:
                            self.serial += 1
                            keys[row, head, entry] = self.serial
                        column = entry
                        if arriving is not None:
                            if not arriving.valid[row // shared_rows.copies, 0, entry]:
                                continue
                            column = int(arriving.indices[row // shared_rows.copies, 0, entry])
                        plain[row][head].append((self.columns + column, float(keys[row, head, entry]), 16, 1))
            attended_keys, attended_values = layer.update(
                *(side.to(layer_dtype(layer)) for side in (keys, -keys))
            )
            assert attended_keys.shape[0] == self.batch == attended_values.shape[0]
        self.columns += columns

    @filled
    @rule(
        heads=st.sampled_from([1, HEADS]),
        seed=st.integers(0, 999),
        which=st.integers(0, LAYERS - 1),
        share=st.sampled_from([0.6, 1.0]),
        precisions=st.lists(st.sampled_from([16, 8, 4, 2]), min_size=1, max_size=3),
    )
    def retain(self, heads: int, seed: int, which: int, share: float, precisions: list[int]) -> None:
        """Drop and quantize entries of one layer, at least one stays in each row and head."""
        layer, plain = self.layers[which], self.plain[which]
        slots, valid = layer.entries()
        rows = slots.shape[0]
        random = torch.rand(rows, heads, layer.width, generator=torch.Generator().manual_seed(seed))
        if heads < slots.shape[1]:
            heads = slots.shape[1]
            random = random.expand(-1, heads, -1)
        valid = valid.expand(-1, heads, -1)
        kept = (random < share) & valid
        # The first valid entry of each row stays; padding of one precision may come before it.
        kept.scatter_(-1, valid.to(torch.uint8).argmax(-1, keepdim=True), True)
        bits = torch.tensor(precisions, dtype=torch.uint8)[(random * 999).long() % len(precisions)]
        for row in range(self.batch):
            held = row // layer.copies
            for head in range(HEADS):
                flags, widths = (every[held, min(head, heads - 1)].tolist() for every in (kept, bits))
                columns = slots[held, min(head, slots.shape[1] - 1)].tolist()
                wanted = {c: width for c, stays, width in zip(columns, flags, widths, strict=True) if stays}
                # What was quantized once stays as it is.
                plain[row][head] = [
                    (column, key, min(before, wanted[column]) if before == 16 else before, size)
                    for column, key, before, size in plain[row][head]
                    if column in wanted
                ]
        stated = bits if precisions != [16] or seed % 2 else None
        layer.retain(Selection.from_mask(kept & valid, stated))

    @filled
    @rule(seed=st.integers(0, 999), which=st.integers(0, LAYERS - 1), biased=st.booleans())
    def merge(self, seed: int, which: int, biased: bool) -> None:
        """Add up entries of one layer in those that stay; entries that take part have no bias yet."""
        layer, plain = self.layers[which], self.plain[which]
        if layer.pools:  # the numbers of sums would not be exact
            return
        slots, valid = layer.entries()
        random = torch.Generator().manual_seed(seed)
        kept = (torch.rand(slots.shape, generator=random) < 0.5) & valid
        kept[..., 0] = True
        fresh = valid if layer.bias is None else valid & (layer.bias == 0)
        own = torch.where(kept, kept.cumsum(-1) - 1, -1)
        into = own.clone()
        takers: dict[tuple[int, int, int], int] = {}
        for row, head, entry in (fresh & ~kept).nonzero().tolist():
            able = (kept & fresh)[row, head].nonzero().flatten().tolist()
            if able:
                chosen = able[(seed + entry) % len(able)]
                takers[row, head, entry] = chosen
                into[row, head, entry] = own[row, head, chosen]
        for row in range(self.batch):
            held = row // layer.copies
            for head in range(HEADS):
                h = min(head, slots.shape[1] - 1)
                entries = valid[held, h].nonzero().flatten().tolist()
                sums = dict(zip(entries, plain[row][head], strict=True))
                for entry in entries:
                    taker = takers.get((held, h, entry))
                    if taker is not None:
                        column, key, bits, size = sums[taker]
                        sums[taker] = column, key + sums[entry][1], bits, size + 1 if biased else size
                plain[row][head] = [sums[entry] for entry in entries if kept[held, h, entry]]
        places = Selection.from_mask(kept)
        merge = Merge(into, torch.ones(into.shape), size_bias=biased)
        layer.retain(places.with_merge(merge))

    @filled
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        """Any order of rows, as generate may ask for in beam search."""
        indices = st.integers(0, self.batch - 1)
        order = data.draw(st.lists(indices, min_size=self.batch, max_size=self.batch))
        self.cache.reorder_cache(torch.tensor(order))
        self._take(order)

    @filled
    @rule(data=st.data())
    def reorder_beams(self, data: st.DataObject) -> None:
        """An order that beam search asks for, within each sample: nothing that is held may move."""
        copies = self.layers[0].copies
        order = [
            data.draw(st.integers(first, first + copies - 1))
            for first in range(0, self.batch, copies)
            for _ in range(copies)
        ]
        before = [layer.keys.data_ptr() for layer in self.layers]
        self.cache.reorder_cache(torch.tensor(order))
        if copies > 1 and all(layer.copies == copies for layer in self.layers):
            assert [layer.keys.data_ptr() for layer in self.layers] == before
        self._take(order)

    @filled
    @precondition(lambda self: self.batch <= 6)
    @rule(repeats=st.integers(1, 2))
    def expand(self, repeats: int) -> None:
        before = [layer.bytes_held for layer in self.layers]
        self.cache.batch_repeat_interleave(repeats)
        assert [layer.bytes_held for layer in self.layers] == before
        self._take([row for row in range(self.batch) for _ in range(repeats)])

    @filled
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4))
        self.cache.batch_select_indices(torch.tensor(chosen))
        self._take(chosen)

    def _take(self, order: list[int]) -> None:
        self.plain = [[copy.deepcopy(plain[row]) for row in order] for plain in self.plain]
        self.batch = len(order)

    @filled
    @rule(tokens=st.integers(1, 3))
    def decode_and_crop(self, tokens: int) -> None:
        """A decode step reads; crop takes back text only."""
        for layer in self.layers:
            keys, values = layer.spread()
            assert keys.shape == values.shape == (self.batch, HEADS, layer.width, 1)
        self.cache.crop(-tokens)

    @rule()
    def deep_copy(self) -> None:
        """The copy goes on; what happens to the original does not reach it."""
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        original.reset()

    @filled
    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move_dtype(self, dtype: torch.dtype) -> None:
        for layer in self.layers:
            layer.to("cpu", dtype)
            assert layer.keys.dtype == layer.dtype == dtype

    @rule(batch=st.integers(1, 3), copies=st.integers(1, 3))
    def reset(self, batch: int, copies: int) -> None:
        layers = self.layers
        self.cache.reset()
        assert all(layer.get_seq_length() == layer.bytes_held == 0 for layer in layers)
        reused = self.cache
        self._open(batch, copies)
        self.cache = reused

    @invariant()
    def agrees_with_lists(self) -> None:
        for layer, plain in zip(self.layers, self.plain, strict=True):
            assert layer.columns == layer.get_seq_length() == self.columns
            if not self.columns:
                continue
            slots, valid = layer.entries()
            assert layer.ragged or valid.all()
            assert slots.shape[0] * layer.copies == self.batch
            keys, values = layer.spread()
            for row, heads in enumerate(plain):
                held = row // layer.copies
                for head, expected in enumerate(heads):
                    own = valid[held, min(head, valid.shape[1] - 1)]
                    columns = slots[held, min(head, slots.shape[1] - 1)][own].tolist()
                    found = keys[row, head, :, 0][own].tolist()
                    assert sorted(zip(columns, found, strict=True)) == [entry[:2] for entry in expected]
                    sizes = [1] * len(expected)
                    if layer.bias is not None:
                        bias = layer.bias[held, min(head, layer.bias.shape[1] - 1)]
                        sizes = bias[own].exp().round().long().tolist()
                    by_column = [size for _, size in sorted(zip(columns, sizes, strict=True))]
                    assert by_column == [entry[3] for entry in expected]
                    assert values[row, head, :, 0][own].tolist() == [-value for value in found]
                    assert layer.pools or columns == sorted(set(columns))
            self._agrees_about_precision(layer, plain)
            assert layer.bytes_behind <= layer.bytes_held
            assert layer.keys.numel() > 0  # Mllama skips a layer whose keys are empty
            assert layer.bytes_full == self.batch * HEADS * self.columns * 2 * layer.keys.element_size()

    def _agrees_about_precision(self, layer: CrossKVLayer, plain: list[Row]) -> None:
        """The selection names columns in order, each in its precision; each pool has its own entries only."""
        chosen = layer.selection()
        chosen = Selection(chosen.indices, chosen.valid, chosen.columns, bits=chosen.bits)  # checked now
        for row, heads in enumerate(plain):
            held, most = row // layer.copies, chosen.indices.shape[1] - 1
            for head, expected in enumerate(heads):
                own = chosen.valid[held, min(head, most)]
                columns = chosen.indices[held, min(head, most)][own]
                bits = chosen.bits_by_column()[held, min(head, most)][columns]
                found = list(zip(columns.tolist(), bits.tolist(), strict=True))
                assert found == [(column, width) for column, _, width, _ in expected]
        for bits, width in layer.widths.items():
            counts = [sum(one[2] == bits for one in entries) for heads in plain for entries in heads]
            assert width >= max(counts)
        assert sum(layer.widths.values()) == layer.width == layer.entries()[0].shape[-1]
        assert layer.bytes_held == sum(
            layer.keys.shape[0] * HEADS * 2 * width * (1 + 2 * size if bits < 16 else size)
            for size in [layer.keys.element_size()]
            for bits, width in layer.widths.items()
        )

    @invariant()
    def bias_covers_what_is_held(self) -> None:
        """The additive mask is as wide as what is held, open where an entry is valid and its tile is seen."""
        if not self.columns:
            return
        tiles = self.columns // PATCHES
        seen = torch.arange(tiles) % 2 == 0  # every other tile
        rows = seen.expand(self.batch, 1, tiles)
        mask = TileMask(rows, PATCHES, torch.float32, layers=1)
        site: Any = SimpleNamespace(fit_mask=lambda mask, rows: by_query_head(mask, HEADS))
        for layer, plain in zip(self.layers, self.plain, strict=True):
            bias = mask.over(layer.contents, site)
            assert bias is not None
            assert bias.shape[0] == self.batch
            assert bias.shape[-1] == layer.width
            for row, heads in enumerate(plain):
                for head, expected in enumerate(heads):
                    row_of_mask = bias[row, min(head, bias.shape[1] - 1), 0]
                    open_sizes = row_of_mask[row_of_mask > -1].exp().round().long().tolist()
                    visible = [size for column, _, _, size in expected if (column // PATCHES) % 2 == 0]
                    assert sorted(open_sizes) == sorted(visible)


def layer_dtype(layer: CrossKVLayer) -> torch.dtype:
    return layer.keys.dtype if layer.is_filled else torch.float32


def _bits(columns: int) -> st.SearchStrategy[list[bool]]:
    return st.lists(st.booleans(), min_size=columns, max_size=columns)
