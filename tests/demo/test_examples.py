"""The generator of examples: seeded, prefix-stable, disjoint handwriting, answers right by construction."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from kvprune.demo import TASKS, examples, write_dataset
from kvprune.demo.architecture import build_processor
from kvprune.demo.handwriting import handwriting
from kvprune.demo.pictures import COLOURS, NoRoomError, place
from kvprune.demo.tasks import compose
from kvprune.demo.tiles import label_patches, to_tiles


def asked_colour(example):
    (colour,) = [colour for colour in COLOURS if colour in example.question]
    return colour


def expected(example):
    """The answer, worked out again from what was placed and from the words of the question."""
    words, colour = example.question.split(), asked_colour(example)
    found = [(digit.x, digit.value) for digit in example.digits if digit.colour == colour]
    if words[0] == "which":
        assert len(found) == 1
        return str(found[0][1])
    if words[0] == "how":
        return str(len(found))
    found.sort()
    assert len(found) == 3
    assert all(right[0] - left[0] >= 12 for left, right in pairwise(found))
    return " ".join(str(value) for _, value in found)


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_what_was_placed(task):
    for example in examples(task, 60, seed=3):
        assert example.answers == (expected(example),)
        assert example.task == task


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_examples_whatever_the_count(task):
    short, long = examples(task, 3, seed=5), examples(task, 7, seed=5)
    for left, right in zip(short, long, strict=False):
        assert left.question == right.question
        assert left.digits == right.digits
        assert left.image.tobytes() == right.image.tobytes()
    other = examples(task, 3, seed=6)
    assert [example.digits for example in other] != [example.digits for example in short]
    trained_on = examples(task, 3, seed=5, split="train")
    assert [example.digits for example in trained_on] != [example.digits for example in short]


def test_handwriting_is_disjoint_and_stratified():
    train, held_out = handwriting("train"), handwriting("held-out")
    assert not set(train.indices) & set(held_out.indices)
    assert len(train.indices) > 1300
    assert len(held_out.indices) > 330
    for split in (train, held_out):
        sizes = [len(rows) for rows in split.by_value]
        assert sum(sizes) == len(split.indices)
        assert min(sizes) > 0.07 * sum(sizes)
    assert not any((held_out.strokes == strokes).all((1, 2)).any() for strokes in train.strokes[::50])


@pytest.mark.parametrize("task", TASKS)
def test_every_shape_is_frequent_and_irrelevant_digits_are_always_there(task):
    drawn = examples(task, 120, seed=1)
    processor = build_processor()
    images = processor.image_processor([[example.image] for example in drawn], return_tensors="pt")
    tiles = Counter(images["aspect_ratio_mask"].sum((1, 2)).tolist())
    assert set(tiles) == {1, 2, 4}
    assert min(tiles[1], tiles[2], tiles[4]) >= 15
    wide = sum(example.image.width > 1.5 * example.image.height for example in drawn)
    tall = sum(example.image.height > 1.5 * example.image.width for example in drawn)
    assert min(wide, tall) >= 10
    for example in drawn:
        assert any(digit.colour != asked_colour(example) for digit in example.digits)


def test_counts_are_balanced():
    answers = Counter(example.answers[0] for example in examples("count", 240, seed=2))
    assert set(answers) == set("012345")
    assert max(answers.values()) < 0.25 * 240


def test_digits_do_not_overlap():
    for example in examples("row", 20, seed=4):
        for number, one in enumerate(example.digits):
            for other in example.digits[:number]:
                apart = max(abs(one.x - other.x), abs(one.y - other.y))
                assert apart >= 0.5 * (one.size + other.size)


def test_tiles_for_training_equal_those_of_the_processor():
    rng = np.random.default_rng(0)
    pictures = [compose(TASKS[number % 3], rng, handwriting("train"))[0] for number in range(24)]
    tiles = to_tiles(pictures)
    images = build_processor().image_processor(
        [[picture.image()] for picture in pictures], return_tensors="pt"
    )
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert (getattr(tiles, name) == images[name]).all(), name


def test_patch_labels_name_the_digit_whose_centre_lies_in_the_patch():
    rng = np.random.default_rng(1)
    picture, _ = compose("row", rng, handwriting("train"), shape=(2, 2))
    labels = label_patches([picture])
    assert int((labels.centre == 1).sum()) <= len(picture.digits)
    for digit in picture.digits:
        down, across = int(digit.y) // 14, int(digit.x) // 14
        tile, patch = 2 * (down // 8) + across // 8, 8 * (down % 8) + across % 8
        assert labels.centre[0, tile, patch] == 1
        assert labels.column[0, tile, patch] == across
        assert labels.colour[0, tile, patch] in (COLOURS.index(digit.colour), -100, len(COLOURS))


def test_too_many_digits_are_refused():
    with pytest.raises(NoRoomError, match="60 digits do not fit in a picture of 112 x 112 pixels"):
        place(np.random.default_rng(0), 112, 112, ["red"] * 60)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown task 'riddle'; tasks are read, count, row"):
        examples("riddle", 1)
    with pytest.raises(ValueError, match="split must be 'train' or 'held-out', not 'test'"):
        examples("read", 1, split="test")
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        examples("read", -1)


def test_a_written_dataset_reads_back(tmp_path):
    table = write_dataset(tmp_path / "data", per_task=2, seed=9)
    assert table == tmp_path / "data" / "data.jsonl"
    lines = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [f"{task}-{number:04d}" for task in TASKS for number in (0, 1)]
    drawn = [example for task in TASKS for example in examples(task, 2, seed=9)]
    for line, example in zip(lines, drawn, strict=True):
        assert set(line) == {"id", "task", "image", "question", "answers"}
        assert (line["task"], line["question"]) == (example.task, example.question)
        assert tuple(line["answers"]) == example.answers
        with Image.open(table.parent / line["image"]) as image:
            assert image.convert("RGB").tobytes() == example.image.tobytes()
