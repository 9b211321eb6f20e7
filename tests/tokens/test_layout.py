"""Where encoder tokens lie in their image, against the processor's own tiling and plain loops."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import kvprune
from kvprune import Layout, demo
from kvprune.errors import UnsupportedModelError
from kvprune.testing import mllama_inputs, tiny_mllama
from kvprune.tokens.layout import AUDIO_FRAME, ENCODER_TOKEN, IMAGE_PATCH, IMAGE_TOKEN, TEXT_TOKEN, Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed(kvprune.FeatureScoringPolicy):
    """Keeps what lies furthest down."""

    name = "placed"

    def score(self, view):
        return view.places[..., 0][:, None].expand(view.batch, -1, -1).double()


def slow_tiles(grid, widths, tiles, class_token, exists):
    """Places and class tokens of one sample, one column after the other."""
    places, classes = [], []
    for image, across in enumerate(widths):
        for tile in range(tiles):
            there = across > 0 and exists[image][tile]
            if class_token:
                places.append((-1, -1))
                classes.append(there)
            for row in range(grid):
                for column in range(grid):
                    corner = divmod(tile, max(across, 1))
                    place = (corner[0] * grid + row, corner[1] * grid + column)
                    places.append(place if there else (-1, -1))
                    classes.append(False)
    return places, classes


@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_tiles_lie_in_reading_order(data, grid, tiles, class_token):
    widths = data.draw(
        st.lists(st.lists(st.integers(0, tiles), min_size=2, max_size=2), min_size=1, max_size=3)
    )
    flags = st.lists(st.booleans(), min_size=tiles, max_size=tiles)
    exists = [[data.draw(flags) for _ in images] for images in widths]
    layout = Layout.tiles(
        grid, torch.tensor(widths), tiles, class_token=class_token, exists=torch.tensor(exists)
    )
    for sample, images in enumerate(widths):
        places, classes = slow_tiles(grid, images, tiles, class_token, exists[sample])
        assert [tuple(place) for place in layout.places[sample].tolist()] == places
        if class_token:
            assert layout.class_tokens[sample].tolist() == classes
        else:
            assert layout.class_tokens is None


def test_a_sequence_lies_in_one_row():
    assert Layout.line(3).places.tolist() == [[[0, 0], [0, 1], [0, 2]]]
    assert Layout.line(3).class_tokens is None


def test_chosen_columns_keep_their_places_and_padding_has_none():
    layout = Layout.tiles(2, torch.tensor([[1], [1]]), 1, class_token=True)
    chosen = layout.at(torch.tensor([[0, 3], [4, 4]]), torch.tensor([[True, True], [True, False]]))
    assert chosen.places.tolist() == [[[-1, -1], [1, 0]], [[1, 1], [-1, -1]]]
    assert chosen.class_tokens.tolist() == [[True, False], [False, False]]


def colours_that_tell_where(height, width):
    """A picture: red grows downwards, green to the right, both from 0 to 255."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([down * 255 // height, right * 255 // width, 0 * down], dim=-1)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.mark.parametrize(("high", "wide"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (4, 1)])
def test_places_are_those_at_which_the_processor_cut_the_picture(high, wide):
    model, processor = demo.load()
    vision = model.config.vision_config
    size, patch = vision.image_size, vision.patch_size
    picture = colours_that_tell_where(high * size, wide * size)
    cut = processor.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert vision.supported_aspect_ratios[int(cut["aspect_ratio_ids"]) - 1] == [high, wide]
    layouts = []

    class Look(kvprune.FeaturePolicy):
        name = "look"

        def choose(self, view):
            layouts.append(view.layout)
            return kvprune.Decision()

    look = dataclasses.dataclass(frozen=True, kw_only=True)(Look)()
    text = {"input_ids": torch.tensor([[1, 2]]), "cross_attention_mask": torch.ones(1, 2, 1, 4).long()}
    with kvprune.compress(model, look), torch.no_grad():
        model(**text, **cut)
    (layout,) = layouts
    grid = size // patch
    tiles = cut["pixel_values"][0, 0].float()  # [tiles, 3, size, size]
    places = layout.places.reshape(4, 1 + grid * grid, 2)
    assert bool((places[:, 0] == -1).all())
    assert layout.class_tokens.reshape(4, -1)[:, 0].tolist() == [tile < high * wide for tile in range(4)]
    assert bool((places[high * wide :] == -1).all())
    for tile in range(high * wide):
        for number in range(grid * grid):
            down, right = (number // grid) * patch, (number % grid) * patch
            found = tiles[tile, :2, down : down + patch, right : right + patch].mean((1, 2))
            row, column = places[tile, 1 + number].tolist()
            wanted = torch.tensor([(row + 0.5) / (high * grid), (column + 0.5) / (wide * grid)]) * 255
            assert (found - wanted).abs().max() < 2


def test_without_aspect_ratios_nobody_knows_where_tokens_lie():
    model, inputs = tiny_mllama(), mllama_inputs(["t1t"])
    states = torch.randn(1, 4 * model.model.vision_model.num_patches, model.config.text_config.hidden_size)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "cross_attention_mask")}
    with (
        pytest.raises(UnsupportedModelError, match="pass pixel_values and aspect_ratio_ids"),
        kvprune.compress(model, Placed()),
        torch.no_grad(),
    ):
        model(**text, cross_attention_states=states.to(model.dtype))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2), st.integers(0, 3))
def test_a_picture_lies_in_reading_order_behind_what_has_no_place(rows, across, classes, others):
    layout = Layout.grid(rows, across, class_tokens=classes, others=others)
    places = [(-1, -1)] * (classes + others)
    for row in range(rows):
        places += [(row, column) for column in range(across)]
    assert [tuple(place) for place in layout.places[0].tolist()] == places
    marked = [[True] * classes + [False] * (others + rows * across)]
    assert layout.class_tokens is None if not classes else layout.class_tokens.tolist() == marked
    assert (layout.geometry, layout.unit) == ("grid", IMAGE_PATCH)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=1))
def test_runs_are_numbered_in_order(kinds):
    layout = dataclasses.replace(Layout.line(len(kinds[0])), kinds=torch.tensor(kinds))
    number, expected = 0, []
    for column, kind in enumerate(kinds[0]):
        number += column > 0 and kind != kinds[0][column - 1]
        expected.append(number)
    assert layout.runs.tolist() == [expected]


@given(st.data(), st.integers(1, 8), st.integers(1, 3))
def test_chosen_columns_keep_what_they_are(data, columns, batch):
    pick = st.lists(st.integers(0, columns - 1), min_size=columns, max_size=columns)
    flags = st.lists(st.booleans(), min_size=columns, max_size=columns)
    indices = [data.draw(pick) for _ in range(batch)]
    valid = [data.draw(flags) for _ in range(batch)]
    kinds, marked = torch.tensor([data.draw(pick)]), torch.tensor([data.draw(flags)])
    line = Layout.line(columns, unit=AUDIO_FRAME, seconds=0.02)
    whole = dataclasses.replace(line, kinds=kinds, class_tokens=marked, reason="why")
    chosen = whole.at(torch.tensor(indices), torch.tensor(valid))
    for sample in range(batch):
        for place, column in enumerate(indices[sample]):
            there = valid[sample][place]
            assert chosen.places[sample, place].tolist() == ([0, column] if there else [-1, -1])
            assert chosen.class_tokens[sample, place] == (there and bool(marked[0, column]))
            assert chosen.kinds[sample, place] == kinds[0, column]
    same = ("geometry", "units", "seconds", "reason")
    assert all(getattr(chosen, name) == getattr(whole, name) for name in same)


def test_units_have_a_plural():
    assert [u.many for u in (IMAGE_TOKEN, IMAGE_PATCH, AUDIO_FRAME, TEXT_TOKEN, ENCODER_TOKEN)] == [
        "image tokens",
        "image patches",
        "audio frames",
        "text tokens",
        "encoder tokens",
    ]
    assert Unit("residue") == Unit("residue", "residues")
    assert Layout.tiles(1, torch.tensor([[1]]), 1, class_token=True).unit == IMAGE_TOKEN
    two = dataclasses.replace(Layout.line(2), units=(TEXT_TOKEN, IMAGE_PATCH))
    assert two.unit == ENCODER_TOKEN
