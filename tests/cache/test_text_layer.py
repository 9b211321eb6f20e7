"""The cache layer that holds pruned text: what it answers transformers, and what moves with what."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from kvprune import Selection
from kvprune.cache.reader import Reader
from kvprune.cache.text_layer import TextKVLayer
from kvprune.errors import UnsupportedCacheError

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 7, 3


def numbered(tokens=TOKENS, batch=BATCH, heads=HEADS):
    """Keys whose numbers say which sample, head and token they belong to."""
    sample = torch.arange(batch)[:, None, None, None] * 10000
    head = torch.arange(heads)[None, :, None, None] * 1000
    token = torch.arange(tokens)[None, None, :, None]
    return (sample + head + token).double().expand(batch, heads, tokens, WIDTH).clone()


def chosen(*rows, columns=TOKENS):
    """A selection by sample and head, from lists of tokens."""
    kept = torch.zeros(len(rows), len(rows[0]), columns, dtype=torch.bool)
    for sample, heads in enumerate(rows):
        for head, tokens in enumerate(heads):
            kept[sample, head, list(tokens)] = True
    return Selection.from_mask(kept)


KEPT = chosen([(0, 2, 6), (1, 5, 6)], [(5, 6), (3, 6)])  # ragged: three entries and two


def filled():
    layer = DynamicLayer()
    layer.update(numbered(), numbered() + 0.5)
    return TextKVLayer.adopt(layer)


def pruned(selection=KEPT):
    layer = filled()
    layer.retain(selection)
    return layer


def require_aligned(layer, samples=(0, 1)):
    """Each entry is the key and value of the token that it stands for."""
    tokens = layer.tokens().expand(-1, HEADS, -1)
    assert tokens.shape[-1] == layer.held == layer.keys.shape[-2]
    for row, sample in enumerate(samples):
        for head in range(HEADS):
            expected = tokens[row, head] + sample * 10000 + head * 1000
            assert torch.equal(layer.keys[row, head, :, 0], expected.double())
            assert torch.equal(layer.values[row, head, :, 0], expected + 0.5)


def test_it_adopts_what_a_dynamic_layer_holds():
    layer = filled()
    assert (layer.seen, layer.held, layer.kept_width, layer.get_seq_length()) == (7, 7, 0, 7)
    assert layer.get_mask_sizes(2) == (9, 0)
    require_aligned(layer)
    empty = TextKVLayer.adopt(DynamicLayer())
    assert (empty.seen, empty.held, empty.bytes_held, empty.get_mask_sizes(4)) == (0, 0, 0, (4, 0))


def test_it_keeps_what_is_selected_padding_first():
    layer = pruned()
    assert layer.tokens().tolist() == [[[0, 2, 6], [1, 5, 6]], [[5, 5, 6], [3, 3, 6]]]
    assert layer.is_real().tolist() == [[True] * 3, [False, True, True]]
    assert layer.ragged
    assert layer.bytes_held == layer.keys.nbytes + layer.values.nbytes == 2 * 2 * 2 * 3 * 3 * 8
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    require_aligned(layer)
    assert not pruned(chosen([(0, 6)], [(5, 6)])).ragged


def test_positions_go_on_from_what_was_seen():
    layer = pruned()
    assert layer.get_seq_length() == 7
    assert layer.get_mask_sizes(1) == (4, 4)
    layer.announce(Reader())
    new = torch.full((2, 2, 2, 3), 7.0).double()
    new[:, :, 1] = 8
    keys, values = layer.update(new, new + 0.5)
    assert keys is layer.keys
    assert values is layer.values
    assert (layer.seen, layer.held, layer.kept_width) == (9, 5, 3)
    assert layer.get_mask_sizes(1) == (6, 4)
    assert layer.tokens()[0, 0].tolist() == [0, 2, 6, 7, 8]
    assert layer.is_real()[1].tolist() == [False, True, True, True, True]


def test_draft_tokens_stay_and_can_be_taken_back():
    layer = pruned(chosen([(0, 4), (1, 4)], [(2, 4), (3, 4)], columns=5))  # tokens 5 and 6 are drafts
    assert layer.tokens()[0].tolist() == [[0, 4, 5, 6], [1, 4, 5, 6]]
    require_aligned(layer)
    layer.crop(-1)
    assert (layer.seen, layer.held, layer.kept_width) == (6, 3, 2)
    require_aligned(layer)
    layer.crop(5)  # older releases say how many stay
    assert (layer.seen, layer.held) == (5, 2)
    layer.crop(0)
    layer.crop(9)
    require_aligned(layer)
    with pytest.raises(UnsupportedCacheError, match="only 0 of them came after text was pruned"):
        layer.crop(-1)
    whole = filled()
    whole.crop(-6)
    assert (whole.seen, whole.held) == (1, 1)


def test_pruning_again_keeps_the_original_tokens():
    layer = pruned()
    layer.announce(Reader())
    layer.update(numbered(9)[:, :, 7:], numbered(9)[:, :, 7:] + 0.5)
    layer.retain(chosen([(1, 4)], [(2, 4)], columns=5))  # entries, not tokens; shared by heads
    assert layer.tokens().tolist() == [[[2, 8], [5, 8]], [[6, 8], [6, 8]]]
    assert not layer.ragged
    assert layer.get_mask_sizes(1) == (3, 7)
    require_aligned(layer)


def test_rows_move_together():
    layer = pruned()
    layer.batch_repeat_interleave(2)
    require_aligned(layer, (0, 0, 1, 1))
    layer.reorder_cache(torch.tensor([2, 0, 1, 3]))
    require_aligned(layer, (1, 0, 0, 1))
    assert layer.is_real()[:, 0].tolist() == [False, True, True, False]
    other = copy.deepcopy(layer)
    layer.batch_select_indices(torch.tensor([3, 1]))
    require_aligned(layer, (1, 0))
    require_aligned(other, (1, 0, 0, 1))


def test_reset_forgets():
    layer = pruned()
    layer.reset()
    assert (layer.seen, layer.held, layer.slots, layer.valid, layer.ragged) == (0, 0, None, None, False)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.update(numbered(3), numbered(3) + 0.5)
    require_aligned(layer)


def test_pruned_text_is_refused_where_nobody_sees_to_the_mask():
    layer = pruned()
    with pytest.raises(UnsupportedCacheError, match="the model runs without kvprune"):
        layer.update(numbered(1), numbered(1))
    reader = Reader()
    layer.announce(reader)
    layer.update(numbered(1), numbered(1))
    with pytest.raises(UnsupportedCacheError, match="the model runs without kvprune"):
        layer.update(numbered(1), numbered(1))
    layer.announce(reader)  # for a call that an interrupt ended before it came here
    reader.release()
    with pytest.raises(UnsupportedCacheError, match="the model runs without kvprune"):
        layer.update(numbered(1), numbered(1))


@pytest.mark.parametrize("layer", [filled, pruned], ids=["whole", "pruned"])
def test_the_last_token_can_be_removed_and_read_again(layer):
    layer, before = layer(), layer()
    layer.remove_last()
    assert (layer.seen, layer.held) == (before.seen - 1, before.held - 1)
    require_aligned(layer)
    layer.announce(Reader())
    layer.update(numbered()[..., -1:, :], numbered()[..., -1:, :] + 0.5)
    assert (layer.seen, layer.held) == (before.seen, before.held)
    require_aligned(layer)
    assert torch.equal(layer.keys, before.keys)
    assert torch.equal(layer.tokens(), before.tokens())
    assert torch.equal(layer.is_real(), before.is_real())


def test_what_came_after_pruning_is_removed_and_what_was_kept_stays():
    layer = pruned()
    layer.announce(Reader())
    layer.update(numbered(8)[..., -1:, :], numbered(8)[..., -1:, :] + 0.5)
    layer.remove_last()
    require_aligned(layer)
    assert torch.equal(layer.tokens(), pruned().tokens())


def test_a_prompt_of_one_token_can_be_read_again():
    layer = TextKVLayer.adopt(DynamicLayer())
    layer.update(numbered(1), numbered(1) + 0.5)
    layer.retain(chosen([(0,), (0,)], [(0,), (0,)], columns=1))
    layer.remove_last()
    assert (layer.seen, layer.held, layer.kept_width) == (0, 0, 0)
    layer.announce(Reader())
    layer.update(numbered(1), numbered(1) + 0.5)
    require_aligned(layer)
