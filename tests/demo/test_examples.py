"""The generator of examples: seeded, prefix-stable, and written to a folder as it draws them."""

import json

import pytest
from PIL import Image
from test_tasks import right_answers

from kvprune.demo import TASKS, examples, write_dataset


@pytest.mark.parametrize("task", TASKS)
def test_examples_have_one_right_answer(task):
    for example in examples(task, 6, seed=3):
        assert example.task == task
        assert list(example.answers) == right_answers(example.question, example.glyphs)
        assert (example.image.size, example.image.mode) == ((224, 224), "RGB")


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_examples_whatever_the_count(task):
    short, long = examples(task, 2, seed=5), examples(task, 4, seed=5)
    for left, right in zip(short, long, strict=False):
        assert left.question == right.question
        assert left.glyphs == right.glyphs
        assert left.image.tobytes() == right.image.tobytes()
    for others in (examples(task, 2, seed=6), examples(task, 2, seed=5, split="train")):
        assert not {example.glyphs for example in others} & {example.glyphs for example in short}


def test_no_picture_is_shown_by_two_tasks():
    drawn = [example.glyphs for task in TASKS for example in examples(task, 3, seed=8)]
    assert len(set(drawn)) == 3 * len(TASKS)


def test_unknown_names_are_refused():
    tasks = "read, place, beside, count, row, compare, presence"
    with pytest.raises(ValueError, match=f"unknown task 'riddle'; tasks are {tasks}"):
        examples("riddle", 1)
    with pytest.raises(ValueError, match="unknown task 'where'"):
        examples("where", 1)
    with pytest.raises(ValueError, match="split must be 'train' or 'held-out', not 'test'"):
        examples("read", 1, split="test")
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        examples("read", -1)
    assert examples("read", 0) == []


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


def test_the_figure_of_the_documents_shows_every_task():
    import demo_figure

    sheet = demo_figure.figure()
    panels = [panel for panel in sheet.axes if panel.get_title()]
    assert [panel.get_title() for panel in panels] == list(TASKS)
    for panel in panels:
        (example,) = examples(panel.get_title(), 1, seed=demo_figure.SEED)
        question, _, answer = panel.get_xlabel().partition("→ ")
        assert (question.split(), answer) == (example.question.split(), example.answers[0])
