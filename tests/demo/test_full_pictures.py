"""Pictures: where glyphs lie, which pixels are theirs, and that the splits share no drawing."""

import numpy as np
import pytest

from kvprune.demo.glyphs import BOX, DIGITS, GLYPHS, KINDS, LETTERS, SHAPES, Drawings, drawings, kind_of
from kvprune.demo.grounds import ground, photographs
from kvprune.demo.handwriting import digit_rows
from kvprune.demo.pictures import CELLS, COLOURS, FILLED, GRID, PICTURE, draw, place
from kvprune.demo.strokes import FINE
from kvprune.demo.typefaces import TYPEFACES

SIDE = 224 / 6
NOMINAL = {
    "red": (210, 25, 30),
    "green": (20, 150, 45),
    "blue": (30, 60, 215),
    "yellow": (245, 215, 25),
    "pink": (240, 70, 190),
    "white": (245, 245, 245),
}


@pytest.fixture(scope="module")
def drawn():
    """Forty pictures, and for each the opacity of its glyphs' ink, [N, BOX, BOX]."""
    opacities, write = [], Drawings.write

    def keep(self, rng, source, sizes):
        opacities.append(write(self, rng, source, sizes))
        return opacities[-1]

    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawings, "write", keep)
        pictures = [draw(rng, ("train", "held-out")[number % 2]) for number in range(40)]
    return list(zip(pictures, opacities, strict=True))


def box(glyph):
    """Return the left and the upper edge of a glyph's square of BOX pixels."""
    return round(glyph.x - BOX / 2), round(glyph.y - BOX / 2)


def test_the_names_are_what_the_documents_say():
    assert (len(DIGITS), len(LETTERS), len(SHAPES), len(COLOURS)) == (10, 12, 6, 6)
    assert len(set(GLYPHS)) == 28
    assert not set("0123456789ABDGIJOQSZ") & set(LETTERS), "letters that look like digits"
    assert [kind_of(name) for name in ("7", "K", "heart")] == list(KINDS)
    assert (CELLS[0], CELLS[5], CELLS[6], CELLS[35]) == ("a1", "f1", "a2", "f6")


def test_every_glyph_lies_in_its_cell_and_wholly_in_the_picture(drawn):
    for picture, opacity in drawn:
        assert FILLED[0] <= len(picture.glyphs) <= FILLED[1]
        assert len({glyph.cell for glyph in picture.glyphs}) == len(picture.glyphs)
        for glyph, ink in zip(picture.glyphs, opacity, strict=True):
            assert (glyph.column, glyph.row) == (int(glyph.x // SIDE), int(glyph.y // SIDE))
            assert all(0 <= edge <= PICTURE - BOX for edge in box(glyph))
            inner = ink[1:-1, 1:-1]
            assert (ink > 0.4).sum() == (inner > 0.4).sum() >= 30, "the square cuts ink off"


def test_no_two_glyphs_share_a_pixel_and_each_owns_all_of_its_ink(drawn):
    for picture, opacity in drawn:
        owners = np.zeros((PICTURE, PICTURE), dtype=int)
        covered = np.zeros((PICTURE, PICTURE), dtype=int)
        for number, (glyph, ink) in enumerate(zip(picture.glyphs, opacity, strict=True), start=1):
            left, top = box(glyph)
            covered[top : top + BOX, left : left + BOX] += ink > 0.4
            owners[top : top + BOX, left : left + BOX] += number * (ink > 0.4)
        assert covered.max() == 1
        assert (owners == picture.owner).all()


def test_ink_has_the_colour_that_the_glyph_is_said_to_have(drawn):
    table = np.array([NOMINAL[colour] for colour in COLOURS], dtype=float)
    right = total = 0
    for picture, _ in drawn:
        for number, glyph in enumerate(picture.glyphs, start=1):
            mean = picture.pixels[picture.owner == number].mean(0)
            right += COLOURS[int(((table - mean) ** 2).sum(1).argmin())] == glyph.colour
            total += 1
    assert right / total > 0.97


def test_pictures_are_full_coloured_and_not_flat(drawn):
    for picture, _ in drawn:
        assert picture.pixels.shape == (224, 224, 3)
        assert picture.image().mode == "RGB"
        assert picture.pixels[picture.owner == 0].std() > 5
    names = {glyph.name for picture, _ in drawn for glyph in picture.glyphs}
    colours = {glyph.colour for picture, _ in drawn for glyph in picture.glyphs}
    assert (names, colours) == (set(GLYPHS), set(COLOURS))


def test_the_same_seed_draws_the_same_picture():
    one, two, other = (draw(np.random.default_rng(seed), "held-out") for seed in (5, 5, 6))
    assert one.glyphs == two.glyphs != other.glyphs
    assert (one.pixels == two.pixels).all()
    assert (one.owner == two.owner).all()


def test_where_glyphs_lie_does_not_depend_on_the_split():
    train, held_out = (draw(np.random.default_rng(7), split) for split in ("train", "held-out"))
    assert train.glyphs == held_out.glyphs == place(np.random.default_rng(7))
    assert (train.pixels != held_out.pixels).any()


def test_a_picture_can_have_more_or_fewer_glyphs():
    assert len(place(np.random.default_rng(0), (3, 3))) == 3
    assert {glyph.cell for glyph in place(np.random.default_rng(0), (GRID**2, GRID**2))} == set(CELLS)


def test_digits_of_the_splits_are_other_rows_and_each_value_is_well_represented():
    train, held_out = digit_rows("train"), digit_rows("held-out")
    assert not set(np.concatenate(train)) & set(np.concatenate(held_out))
    for split, share in ((train, 0.8), (held_out, 0.2)):
        sizes = [len(rows) for rows in split]
        assert sum(sizes) == pytest.approx(1724 * share, abs=5)
        assert min(sizes) > 0.07 * sum(sizes)


def test_letters_of_the_splits_are_in_other_typefaces():
    assert not set(TYPEFACES["train"]) & set(TYPEFACES["held-out"])
    for split in ("train", "held-out"):
        bank = drawings(split)
        assert bank.strokes.shape[1:] == (FINE, FINE)
        assert sorted(np.concatenate(bank.sources)) == list(range(len(bank.strokes)))
        for name, rows in zip(GLYPHS, bank.sources, strict=True):
            if name in LETTERS:
                assert len(rows) == len(TYPEFACES[split])
            if name in SHAPES:
                assert len(rows) == 1


def test_no_drawing_of_a_digit_or_letter_is_in_both_splits():
    written = len(DIGITS) + len(LETTERS)
    both = {
        split: {
            drawings(split).strokes[row].tobytes()
            for rows in drawings(split).sources[:written]
            for row in rows
        }
        for split in ("train", "held-out")
    }
    assert not both["train"] & both["held-out"]


def test_photographs_of_the_splits_are_other_columns():
    from sklearn.datasets import load_sample_images

    parts = (photographs("train"), photographs("held-out"))
    for whole, train, held_out in zip(load_sample_images().images, *parts, strict=True):
        assert (np.concatenate([train, held_out], axis=1) == whole).all()
        assert min(train.shape[:2] + held_out.shape[:2]) >= PICTURE


def test_grounds_are_photographs_and_textures_that_leave_room_for_ink():
    rng = np.random.default_rng(3)
    grounds = [ground(rng, PICTURE, "held-out") for _ in range(20)]
    assert all(made.shape == (PICTURE, PICTURE, 3) for made in grounds)
    assert min(made.min() for made in grounds) > 20
    assert max(made.max() for made in grounds) < 210


@pytest.mark.parametrize("reads", [digit_rows, photographs, drawings])
def test_unknown_splits_are_refused(reads):
    with pytest.raises(ValueError, match="split must be 'train' or 'held-out', not 'test'"):
        reads("test")
