"""Which glyphs a question needs, where they lie, and which numbers follow from what is kept."""

import json

import needed_tokens
import pytest
import torch
from question_needs import LAYOUT, questions
from test_tasks import right_answers
from token_scores import where_high

from kvprune import demo


@pytest.fixture(scope="module")
def asked():
    """Return six questions of each task."""
    return {task: list(questions(task, 6, seed=4)) for task in demo.TASKS}


@pytest.mark.parametrize("task", demo.TASKS)
def test_questions_are_those_of_the_demo(asked, task):
    for question, example in zip(asked[task], demo.examples(task, 6, seed=4), strict=True):
        assert question.example == example


@pytest.mark.parametrize("task", demo.TASKS)
def test_the_needed_glyphs_suffice_and_each_is_necessary(asked, task):
    for question in asked[task]:
        text, glyphs = question.example.question, [question.example.glyphs[n] for n in question.needed]
        assert right_answers(text, glyphs) == list(question.example.answers)
        none = (task, question.example.answers[0]) in (("count", "0"), ("presence", "no"))
        assert bool(glyphs) != none
        looks = {(glyph.colour, glyph.name) for glyph in glyphs}
        for glyph in glyphs if task != "presence" or len(looks) == len(glyphs) else ():
            assert not answerable(text, [one for one in glyphs if one is not glyph], question.example.answers)


def answerable(text, glyphs, answers):
    """Whether these glyphs alone give the right answer."""
    try:
        return right_answers(text, glyphs) == list(answers)
    except KeyError:  # a cell that is named holds nothing
        return False


@pytest.mark.parametrize("task", demo.TASKS)
def test_tokens_that_a_glyph_covers_lie_around_its_centre(asked, task):
    centres = LAYOUT.places[0] * 14 + 7  # [260, 2], of patches, in pixels
    for question in asked[task]:
        for glyph, covered in zip(question.example.glyphs, question.covered.T, strict=True):
            y, x = (centres[covered].double().mean(0) - torch.tensor([glyph.y, glyph.x])).abs()
            assert max(x, y) < 14
        assert torch.stack(list(question.shows.values())).sum(0).eq(1).all()
        assert int(question.shows["class token"].sum()) == 4


def test_numbers_of_what_is_kept(asked):
    question = asked["beside"][0]
    anchor, neighbour = question.covered[:, question.needed].T  # [260] each
    one = anchor[None]  # [1, 260]
    both = torch.stack([question.needs, question.needs])  # [2, 260]
    row = needed_tokens.measure(question, {1: one, 3: both}, right=True)
    share = float(anchor.sum() / question.needs.sum())
    both_cover = float((anchor & neighbour).sum() / neighbour.sum())
    assert row["layer 1"] == row["any head"] == pytest.approx(share)
    assert row["layer 3"] == row["beside 1"] == row["half kept"] == row["right then"] == 1
    assert row["all"] == row["beside"] == pytest.approx((1 + share) / 2)
    assert row["beside 2"] == pytest.approx((1 + both_cover) / 2)
    assert (row["on glyph"], row["on ground"]) == (1, 0)
    nothing = needed_tokens.measure(question, {1: ~question.needs[None]}, right=False)
    assert (nothing["all"], nothing["half kept"], nothing["right else"]) == (0, False, False)
    easy = next(other for task in ("count", "presence") for other in asked[task] if not other.needed)
    assert "all" not in needed_tokens.measure(easy, {1: one}, right=True)


def test_tokens_are_replaced_by_ground(asked):
    question = asked["row"][0]
    ground = question.shows["ground"]
    swapped = needed_tokens.with_ground(question, question.needs)
    assert int(swapped.sum()) == int(question.needs.sum())
    assert int((swapped & ground).sum()) == needed_tokens.SWAPPED
    assert needed_tokens.with_ground(question, ground).equal(ground)  # nothing else is kept


def test_scores_that_are_high_on_glyphs_are_found_there(asked):
    question = asked["row"][0]
    row = where_high(question, question.shows["glyph"].double())
    assert (row["on needed"], row["on ground"]) == (1, 0)
    assert row["rank corr. glyph"] > 0.5 > row["rank corr. needed"] > 0


def test_everything_is_measured_and_printed(tmp_path, capsys):
    table = tmp_path / "numbers.json"
    policies = ["--policy", "norm:reach=onward", "--policy", "adakv"]
    needed_tokens.main([*policies, "--keep-ratios", "0.25", "--count", "1", "--json", str(table)])
    numbers = json.loads(table.read_text("utf-8"))
    rows = numbers["policies"]["0.25"]
    assert (rows["(all)"]["all"], rows["(needed)"]["all"], rows["(all but needed)"]["all"]) == (1, 1, 0)
    assert rows["norm:reach=onward"]["kept"] == rows["adakv"]["kept"] == pytest.approx(65 / 260)
    assert "+ ground" in rows["norm:reach=onward"]
    assert "+ ground" not in rows["adakv"], "each head of each layer keeps its own set"
    lengths = numbers["scores"]["norm: length of values, layer 1"]
    assert lengths["on needed"] > lengths["on ground"]
    assert "needed tokens kept, % at 0.25" in capsys.readouterr().out
