"""Tiles of training pictures equal the processor's, and labels of patches say whose ink lies in them."""

import numpy as np
import pytest

from kvprune.demo.architecture import build_processor
from kvprune.demo.glyphs import GLYPHS
from kvprune.demo.pictures import COLOURS, draw
from kvprune.demo.tiles import NOT_SCORED, label_patches, to_tiles


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [draw(rng, split) for split in ("train", "held-out") for _ in range(3)]


def test_tiles_for_training_equal_those_of_the_processor(pictures):
    tiles = to_tiles(pictures)
    images = build_processor().image_processor(
        [[picture.image()] for picture in pictures], return_tensors="pt"
    )
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        ours, theirs = getattr(tiles, name), images[name]
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert (ours == theirs).all(), name
    assert tiles.pixel_values.shape == (len(pictures), 1, 4, 3, 112, 112)


def test_labels_say_whose_ink_lies_in_a_patch(pictures):
    labels = label_patches(pictures)
    for number, picture in enumerate(pictures):
        for down in range(16):
            for across in range(16):
                tile, patch = 2 * (down // 8) + across // 8, 8 * (down % 8) + across % 8
                owner = picture.owner[14 * down : 14 * down + 14, 14 * across : 14 * across + 14]
                ink = np.bincount(owner.ravel(), minlength=len(picture.glyphs) + 1)[1:]
                glyph, colour = len(GLYPHS), len(COLOURS)
                if 0 < ink.max() < 16:
                    glyph = colour = NOT_SCORED
                elif ink.max():
                    shown = picture.glyphs[int(ink.argmax())]
                    glyph, colour = GLYPHS.index(shown.name), COLOURS.index(shown.colour)
                assert labels.glyph[number, tile, patch] == glyph
                assert labels.colour[number, tile, patch] == colour
                assert labels.row[number, tile, patch] == int((14 * down + 7) * 6 / 224)
                assert labels.column[number, tile, patch] == int((14 * across + 7) * 6 / 224)


def test_every_glyph_has_a_patch_of_its_own(pictures):
    for picture, glyphs in zip(pictures, label_patches(pictures).glyph, strict=True):
        shown = set(glyphs.flatten().tolist())
        assert {GLYPHS.index(glyph.name) for glyph in picture.glyphs} <= shown
