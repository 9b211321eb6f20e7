"""Hypothesis strategies for tests of policies and adapters: problems, views, budgets, selections.

Needs hypothesis: ``pip install "kvprune[test]"``. Examples shrink towards one sample, one column, and plain
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.spec import PolicySpec
from kvprune.policy.view import LayerView
from kvprune.testing.conformance.common.budgets import variants
from kvprune.testing.problems import (
    DTYPES,
    Content,
    Family,
    LayerProblem,
    Model,
    ModelProblem,
    Precision,
)
from kvprune.tokens.budget import Budget
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = [
    "budgets",
    "conversations",
    "layer_problems",
    "layer_views",
    "layouts",
    "model_problems",
    "selections",
    "specs",
    "visibilities",
]


def layouts(
    *, max_batch: int = 3, max_turns: int = 2, blind: bool = True
) -> st.SearchStrategy[tuple[str, ...]]:
    """Draw batches of conversations for `kvprune.testing.mllama_inputs`, such as ``("tt4ttt", "1t")``.

    Each batch has at least one image. Samples differ in length, number of images and tiles.

    Args:
        max_batch: Largest number of samples.
        max_turns: Largest number of times that one or two images arrive in a conversation.
        blind: Whether some samples of a batch may have no image.
    """
    seeing = st.from_regex(rf"t{{0,3}}([1-4]{{1,2}}t{{1,3}}){{1,{max_turns}}}", fullmatch=True)
    sample = seeing | st.from_regex(r"t{1,4}", fullmatch=True) if blind else seeing
    return st.lists(sample, min_size=1, max_size=max_batch).map(tuple).filter(_has_image)


def _has_image(batch: Sequence[str]) -> bool:
    return any(letter.isdigit() for letter in "".join(batch))


@st.composite
def layer_problems(
    draw: st.DrawFn,
    *,
    contents: Sequence[Content] = ("random", "ties", "equal", "zero", "huge"),
    dtypes: Sequence[str] = DTYPES,
    max_batch: int = 3,
) -> LayerProblem:
    """Draw one cross-attention layer of either family, in a description that can be pasted.

    Args:
        draw: Given by hypothesis; callers leave it out.
        contents: Kinds of numbers, see `LayerProblem`.
        dtypes: Dtypes of keys, values and queries.
        max_batch: Largest number of samples.
    """
    families: list[Family] = ["mllama", "mllama", "encoder-decoder"]
    family = draw(st.sampled_from(families))
    batch = draw(layouts(max_batch=max_batch))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    rank = draw(st.integers(0, 2))
    # In a later turn, the images of earlier ones are cached already: at least one image is new.
    images = max(sum(map(str.isdigit, text)) for text in batch)
    arrived = draw(st.integers(0, images - 1)) if family == "mllama" else 0
    return LayerProblem(
        layouts=batch,
        seed=draw(st.integers(0, 99)),
        family=family,
        patches=draw(st.sampled_from([1, 2, 3, 10])),
        query_heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        dtype=draw(st.sampled_from(dtypes)),
        content=draw(st.sampled_from(contents)),
        contiguous=draw(st.sampled_from([True, False])),
        rank=rank,
        received=draw(st.sampled_from([1.0, 0.6])) if rank else 1.0,
        arrived=arrived,
    )


def layer_views(
    *,
    contents: Sequence[Content] = ("random", "ties", "equal", "zero", "huge"),
    dtypes: Sequence[str] = DTYPES,
    max_batch: int = 3,
) -> st.SearchStrategy[LayerView]:
    """Draw views of one layer, as a policy reads them; see `layer_problems` for the arguments."""
    problems = layer_problems(contents=contents, dtypes=dtypes, max_batch=max_batch)
    return problems.map(lambda problem: problem.view())


@st.composite
def model_problems(draw: st.DrawFn, *, models: Sequence[Model] = ("mllama", "bart")) -> ModelProblem:
    """Draw a tiny model and a batch for it, in a description that can be pasted.

    Args:
        draw: Given by hypothesis; callers leave it out.
        models: Models to choose from: "mllama", "bart".
    """
    model = draw(st.sampled_from(models))
    dtypes: list[Precision] = ["float64", "float32"]
    return ModelProblem(
        layouts=draw(layouts(blind=model == "mllama")),
        model=model,
        seed=draw(st.integers(0, 9)),
        dtype=draw(st.sampled_from(dtypes)),
        beams=draw(st.sampled_from([1, 2])),
        kv_heads=draw(st.sampled_from([2, 1, 4])) if model == "mllama" else 2,
    )


@st.composite
def visibilities(
    draw: st.DrawFn,
    max_batch: int = 3,
    max_rows: int = 5,
    max_units: int = 4,
    max_columns: int = 3,
    broadcast: bool = False,
) -> Visibility:
    """Draw any rows, live flags, images and missing columns; every visible unit has a column that exists.

    Args:
        draw: Given by hypothesis; callers leave it out.
        max_batch: Largest number of samples.
        max_rows: Largest number of text rows.
        max_units: Largest number of units (tiles).
        max_columns: Largest number of columns in a unit.
        broadcast: Whether all text rows see the same columns.
    """
    batch = draw(st.integers(1, max_batch))
    text_rows = draw(st.integers(1, max_rows))
    unit_count = draw(st.integers(1, max_units))
    sizes = draw(st.lists(st.integers(1, max_columns), min_size=unit_count, max_size=unit_count))
    images = draw(st.lists(st.integers(0, 2), min_size=unit_count, max_size=unit_count))
    columns = sum(sizes)

    def bits(*shape: int) -> Tensor:
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
def conversations(
    draw: st.DrawFn,
    max_images: int = 3,
    max_batch: int = 3,
    max_rows: int = 5,
    tiles: int = 2,
    patches: int = 3,
) -> Visibility:
    """Draw chats in which each row sees the tiles of the latest image: a stratum is one visibility group.

    Rows before the first image see nothing; a sample may have no image at all.

    Args:
        draw: Given by hypothesis; callers leave it out.
        max_images: Largest number of images in a chat.
        max_batch: Largest number of samples.
        max_rows: Largest number of text rows.
        tiles: Number of tiles stored for an image.
        patches: Number of columns in a tile.
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


def budgets(*, max_tokens: int = 40) -> st.SearchStrategy[Budget]:
    """Draw budgets of both kinds, with corner cases and ratios that floats get wrong (0.1 of ten tokens).

    Args:
        max_tokens: The largest ``keep_tokens``.
    """
    ratios = st.sampled_from([1.0, 0.5, 0.3, 0.1, 0.07, 0.01]) | st.floats(1e-6, 1)
    return ratios.map(lambda ratio: Budget(keep_ratio=ratio)) | st.integers(1, max_tokens).map(
        lambda tokens: Budget(keep_tokens=tokens)
    )


@st.composite
def selections(
    draw: st.DrawFn, *, batch: int | None = None, heads: int | None = None, columns: int | None = None
) -> Selection:
    """Draw valid selections, ragged ones included; each row keeps at least one column.

    Args:
        draw: Given by hypothesis; callers leave it out.
        batch: Number of samples; 1 to 3 if None.
        heads: 1, or the number of KV heads; 1 or 2 if None.
        columns: Width S of the unpruned cache; 1 to 8 if None.
    """
    batch = draw(st.integers(1, 3)) if batch is None else batch
    heads = draw(st.integers(1, 2)) if heads is None else heads
    columns = draw(st.integers(1, 8)) if columns is None else columns
    row = st.lists(st.booleans(), min_size=columns, max_size=columns).filter(any)
    rows = draw(st.lists(row, min_size=batch * heads, max_size=batch * heads))
    return Selection.from_mask(torch.tensor(rows).reshape(batch, heads, columns))


def specs(*classes: type[CrossKVPolicy]) -> st.SearchStrategy[PolicySpec]:
    """Draw specs of policies of these classes: default options, several budgets, each choice of an option.

    Args:
        classes: Policy classes.
    """
    made: list[Any] = [policy.spec for cls in classes for policy in variants(cls)]
    return st.sampled_from(made)
