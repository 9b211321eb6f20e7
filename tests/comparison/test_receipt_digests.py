"""A receipt says what was kept for one example, and nothing about its neighbours, its device or its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from generation import mllama
from hypothesis import given
from hypothesis import strategies as st

import kvprune
from kvprune.comparison.storage.digests import receipts
from kvprune.engine.receipts import LayerReceipt
from kvprune.testing import mllama_inputs
from kvprune.tokens.selection import Selection

Masks = list[list[list[bool]]]


def layer(index: int, selection: Selection, bytes_per_column: int = 64) -> LayerReceipt:
    batch, _, width = selection.indices.shape
    return LayerReceipt(
        layer_idx=index,
        columns=selection.columns,
        width=width,
        bytes_held=batch * width * bytes_per_column,
        bytes_full=batch * selection.columns * bytes_per_column,
        bytes_of_bookkeeping=0,
    )


def made(masks: Sequence[Masks], spec: str = "trim", seed: int = 0, order: int = 1) -> list[str]:
    """Receipts of layers 1, 4, 7, ... with these kept columns ``[layer][B][H][S]``."""
    chosen = {1 + 3 * n: Selection.from_mask(torch.tensor(mask)) for n, mask in enumerate(masks)}
    layers = [layer(index, selection) for index, selection in chosen.items()]
    return receipts(spec, seed, layers[::order], dict(list(chosen.items())[::order]))


MASKS = [[[[True, False, True, True]], [[False, True, False, False]]] for _ in range(2)]


def test_the_digest_is_fixed() -> None:
    assert made(MASKS) == [
        "68f28a3fb919a4d201d500ecb0078e0554b118742e47826694dcd280fa8ee6f8",
        "12bd5018ba8dc88dfe2d6c6699ce39da63717bf1884fbe52b042be44f65af3f3",
    ], "changing what a receipt covers makes old results unverifiable: raise FORMAT"


def test_order_of_layers_does_not_matter() -> None:
    assert made(MASKS, order=-1) == made(MASKS)


def test_everything_it_covers_matters() -> None:
    plain = made(MASKS)[0]
    moved = [[[[True, True, False, True]], MASKS[0][1]], MASKS[1]]
    wider = [[[[*head, False] for head in sample] for sample in mask] for mask in MASKS]
    by_head = [[sample * 2 for sample in mask] for mask in MASKS]
    others = {
        made(MASKS, spec="norm")[0],
        made(MASKS, seed=1)[0],
        made(moved)[0],
        made(wider)[0],
        made(by_head)[0],
        made(MASKS[:1])[0],
        made(MASKS)[1],
    }
    assert len(others | {plain}) == 8
    one = Selection.from_mask(torch.tensor(MASKS[0]))
    held = {receipts("trim", 0, [layer(1, one, size)], {1: one})[0] for size in (64, 128)}
    assert len(held) == 2, "bytes matter"
    assert receipts("trim", 0, [layer(1, one)], {1: one}) != receipts("trim", 0, [layer(2, one)], {2: one})


@given(
    own=st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=2, max_size=2),
    others=st.lists(
        st.lists(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), min_size=2, max_size=2),
        max_size=3,
    ),
)
def test_neighbours_and_their_padding_do_not_matter(own: list[list[bool]], others: Masks) -> None:
    alone = made([[own]])[0]
    together = made([[own, *others]])
    assert together[0] == alone
    ragged = Selection.from_mask(torch.tensor([own, *others]))
    assert receipts("trim", 0, [layer(1, ragged)], {1: ragged})[0] == alone
    pad = torch.cat([ragged.indices, ragged.indices[..., -1:].repeat(1, 1, 3)], -1)
    valid = torch.cat([ragged.valid, torch.zeros_like(pad[..., :3], dtype=torch.bool)], -1)
    padded = Selection(pad, valid, ragged.columns)
    assert receipts("trim", 0, [replace(layer(1, padded))], {1: padded}) == together


def test_a_real_run_gives_each_sample_the_receipt_it_has_alone() -> None:
    batch = mllama_inputs(["tt4ttt", "1tt"])

    def run(rows: int) -> list[str]:
        with kvprune.compress(mllama(), "trim:keep_ratio=0.3", seed=2) as compression:
            inputs = {name: tensor[:rows] for name, tensor in batch.items()}
            mllama().generate(**inputs, max_new_tokens=2, do_sample=False)
        return receipts("trim", 2, compression.report.layers, compression.selections)

    ragged = run(2)
    assert ragged == run(2)
    assert ragged[0] == run(1)[0]
    assert ragged[0] != ragged[1]
