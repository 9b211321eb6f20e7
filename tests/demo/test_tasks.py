"""Questions: each answer is worked out again from where the glyphs lie, and there is no second right one."""

import re
from collections import Counter

import numpy as np
import pytest

from kvprune.demo.glyphs import GLYPHS
from kvprune.demo.pictures import COLOURS, place
from kvprune.demo.tasks import COUNTS, LESSONS, TASKS, ask

ASKED = 400
SIDE = 224 / 6
COLUMNS = "abcdef"
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def kind(name):
    if name.isdigit():
        return "digit"
    return "letter" if len(name) == 1 else "shape"


def cell(glyph):
    """Name the cell that a glyph's centre lies in, from pixels alone."""
    return f"{COLUMNS[int(glyph.x // SIDE)]}{int(glyph.y // SIDE) + 1}"


def beside(name, side):
    """Name the cell on a side of another; None outside the picture."""
    across, down = STEPS[side]
    column, row = COLUMNS.index(name[0]) + across, int(name[1]) + down
    return f"{COLUMNS[column]}{row}" if 0 <= column < 6 and 1 <= row <= 6 else None


def right_answers(question, glyphs):
    """Return every answer that a question permits, one for each way to understand it."""
    at = {cell(glyph): glyph for glyph in glyphs}
    if asked := re.fullmatch(r"which (\w+) is (\w+)\?", question):
        return [glyph.name for glyph in glyphs if (kind(glyph.name), glyph.colour) == asked.groups()]
    if asked := re.fullmatch(r"what is at (\w\d)\?", question):
        return [glyph.name for name, glyph in at.items() if name == asked[1]]
    if asked := re.fullmatch(r"where and what is (.+) the (\w+) (\w+)\?", question):
        side, *look = asked.groups()
        found = [name for name, glyph in at.items() if [glyph.colour, glyph.name] == look]
        places = [beside(name, side) for name in found]
        return [f"{name} {at[name].name}" if name in at else "nothing" for name in places]
    if asked := re.fullmatch(r"where is the (\w+) (\w+)\?", question):
        return [name for name, glyph in at.items() if (glyph.colour, glyph.name) == asked.groups()]
    if asked := re.fullmatch(r"how many (\w+)s are (\w+)\?", question):
        return [str(sum((kind(glyph.name), glyph.colour) == asked.groups() for glyph in glyphs))]
    if asked := re.fullmatch(r"read from (\w)(\d) to (\w)(\d)\.", question):
        assert asked[2] == asked[4]
        span = COLUMNS[COLUMNS.index(asked[1]) : COLUMNS.index(asked[3]) + 1]
        assert len(span) == 3
        return [" ".join(at[f"{column}{asked[2]}"].name for column in span)]
    if asked := re.fullmatch(r"which is (\w+), (\w\d) or (\w\d)\?", question):
        return [name for name in asked.groups()[1:] if at[name].colour == asked[1]]
    if asked := re.fullmatch(r"is there a (\w+) (\w+)\?", question):
        return ["yes" if any((one.colour, one.name) == asked.groups() for one in glyphs) else "no"]
    raise AssertionError(f"unknown question: {question}")


@pytest.fixture(scope="module")
def asked():
    """Return for each task the questions about many pictures, each with the picture's glyphs."""
    rng = np.random.default_rng(11)
    made = {}
    for task in LESSONS:
        pairs = ((place(rng), task) for _ in range(ASKED))
        made[task] = [(ask(task, rng, glyphs), glyphs) for glyphs, task in pairs]
    return made


@pytest.mark.parametrize("task", LESSONS)
def test_there_is_exactly_one_right_answer(asked, task):
    queries = [(query, glyphs) for query, glyphs in asked[task] if query is not None]
    assert len(queries) > 0.75 * ASKED, "most pictures permit a question"
    for query, glyphs in queries:
        assert query.task == task
        assert right_answers(query.question, glyphs) == [query.answer], query


@pytest.mark.parametrize("task", LESSONS)
def test_a_question_is_impossible_only_where_it_would_be_ambiguous(asked, task):
    missing = sum(query is None for query, _ in asked[task])
    assert missing == 0 or task == "compare", "two glyphs of one colour cannot be told apart by it"


def test_the_tasks_are_those_of_the_documents():
    assert TASKS == ("read", "place", "beside", "count", "row", "compare", "presence")
    assert set(LESSONS) - set(TASKS) == {"where"}


def test_half_of_the_glyphs_asked_for_are_there(asked):
    answers = Counter(query.answer for query, _ in asked["presence"])
    assert set(answers) == {"yes", "no"}
    assert abs(answers["yes"] - ASKED / 2) < 3 * (ASKED / 4) ** 0.5


def test_half_of_the_absent_ones_are_there_in_another_combination(asked):
    apart = []
    for query, glyphs in asked["presence"]:
        if query.answer == "no":
            colour, name = query.question.rstrip("?").split()[-2:]
            assert colour in {glyph.colour for glyph in glyphs}, "a colour of the picture"
            apart.append(name in {glyph.name for glyph in glyphs})
    assert abs(sum(apart) - len(apart) / 2) < 3 * (len(apart) / 4) ** 0.5


def test_numbers_to_count_are_as_equally_frequent_as_pictures_permit(asked):
    expected, found = Counter(), Counter()
    for query, glyphs in asked["count"]:
        looks = Counter((kind(glyph.name), glyph.colour) for glyph in glyphs)
        pairs = ((one, colour) for one in ("digit", "letter", "shape") for colour in COLOURS)
        offered = {looks[pair] for pair in pairs} & set(COUNTS)
        found[int(query.answer)] += 1
        expected.update({number: 1 / len(offered) for number in offered})
    assert set(found) == set(COUNTS) == {0, 1, 2, 3, 4, 5}
    for number in COUNTS:
        assert abs(found[number] - expected[number]) < 4 * expected[number] ** 0.5


def test_the_wanted_cell_is_first_as_often_as_second(asked):
    queries = [query for query, _ in asked["compare"] if query is not None]
    first = sum(query.question.split()[3].rstrip(",") == query.answer for query in queries)
    assert abs(first - len(queries) / 2) < 3 * (len(queries) / 4) ** 0.5


def test_all_sides_kinds_and_glyphs_are_asked_about(asked):
    sides = {re.search(r"is (.+) the", query.question)[1] for query, _ in asked["beside"]}
    assert sides == set(STEPS)
    assert {query.question.split()[1] for query, _ in asked["read"]} == {"digit", "letter", "shape"}
    assert {query.answer for query, _ in asked["place"]} == set(GLYPHS)


def test_the_same_seed_asks_the_same():
    glyphs = place(np.random.default_rng(0))
    for task in LESSONS:
        one, two = (ask(task, np.random.default_rng(4), glyphs) for _ in range(2))
        assert one == two


def test_questions_about_absent_things_do_not_depend_on_the_order_of_sets():
    """Names and colours are sorted first: the order of a set of strings changes from process to process."""
    glyphs = place(np.random.default_rng(0))
    for seed in range(20):
        orders = (glyphs, glyphs[::-1])
        forward, backward = (ask("presence", np.random.default_rng(seed), order) for order in orders)
        assert forward.answer == backward.answer
        assert forward == backward or forward.answer == "yes"


def test_glyphs_that_permit_no_question_are_not_asked_about():
    rng = np.random.default_rng(0)
    alike = tuple(glyph for glyph in place(rng) if glyph.colour == "red")[:1] * 2
    for task in ("read", "beside", "row", "compare", "where"):
        assert ask(task, rng, alike) is None


def test_unknown_tasks_are_refused():
    with pytest.raises(KeyError, match="riddle"):
        ask("riddle", np.random.default_rng(0), ())
