"""Study files: what they may hold, how mistakes are named, and what comes with kvprune."""

from __future__ import annotations

import io
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvprune.comparison import DEFAULT_KEEP_RATIOS, Settings, find_study
from kvprune.comparison.data.examples import is_correct, read_examples
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.studies.study import built_in_studies, read_study
from kvprune.errors import StudyError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "studies.md").read_text("utf-8")

GOOD = """
title = "A study"
policies = ["trim"]
[[data]]
title = "One"
metric = "accuracy"
file = "one.jsonl"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return read_study(path)

    return read


def test_what_a_file_leaves_out_has_the_defaults_of_compare(read: Callable[[str], Any]) -> None:
    study = read(GOOD)
    assert study.settings == Settings()
    assert study.keep_ratios == DEFAULT_KEEP_RATIOS
    assert (study.status, study.notes) == (None, ())
    (one,) = study.data
    assert (one.title, one.metric, one.file, one.folder) == ("One", "accuracy", "one.jsonl", "one")
    assert (one.demo_task, one.limit, one.max_new_tokens, one.source) == (None, None, None, None)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('title = "A study"', "", r"study\.toml: key 'title' is missing; it must be a non-empty string"),
        ('title = "A study"', "title = 7", r"key 'title' is 7; it must be a non-empty string"),
        ('"A study"', '" "', r"key 'title' is ' '; it must be a non-empty string"),
        ("policies", "polices", r"unknown key 'polices'; did you mean 'policies'\?; the keys are title, "),
        ('["trim"]', '"trim"', r"key 'policies' is 'trim'; it must be a list of non-empty strings"),
        ('["trim"]', '["trim", 3]', r"key 'policies' is \['trim', 3\]; it must be a list of non-empty"),
        ('["trim"]', "[]", r"key 'policies' is \[\]; it must name at least one policy"),
        ('["trim"]', '["trim"]\nkeep_ratios = 0.5', r"key 'keep_ratios' is 0\.5; it must be a list of num"),
        ('["trim"]', '["trim"]\nkeep_ratios = [true]', r"key 'keep_ratios' is \[True\]; it must be a list"),
        ('["trim"]', '["trim"]\nseed = true', r"key 'seed' is True; it must be a whole number"),
        ('["trim"]', '["trim"]\nseed = 1.5', r"key 'seed' is 1\.5; it must be a whole number"),
        ('["trim"]', '["trim"]\nreread = 1', r"key 'reread' is 1; it must be true or false"),
        ('["trim"]', '["trim"]\nbatch_size = 0', r"study\.toml: batch_size is 0; it must be at least 1"),
        ('["trim"]', '["trim"]\ndtype = "int8"', r"study\.toml: unknown dtype 'int8'; choose from auto"),
        ('["trim"]', '["trim"]\ntrust_remote_code = true', r"unknown key 'trust_remote_code'"),
        ("[[data]]", "[data]", r"key 'data' is \{.*\}; it must be a list of tables, each under a line \[\["),
        ("file =", "fil =", r"data set 1: unknown key 'fil'; did you mean 'file'\?"),
        ('file = "one.jsonl"', "", r"data set 1: give either 'file', .* this data set has neither"),
        ('"one.jsonl"', '"one.jsonl"\ndemo_task = "read"', r"data set 1: .* this data set has both"),
        ('"one.jsonl"', '"/etc/one.jsonl"', r"key 'file' is '/etc/one\.jsonl'; it must be a path inside"),
        ('"one.jsonl"', '"../one.jsonl"', r"key 'file' is '\.\./one\.jsonl'; it must be a path inside"),
        (
            '"accuracy"',
            '"acuracy"',
            r"key 'metric' is 'acuracy'; it must be one of accuracy, word_error_rate",
        ),
        ('"one.jsonl"', '"one.jsonl"\nlimit = 0', r"data set 1: key 'limit' is 0; it must be at least 1"),
        (
            'metric = "accuracy"\nfile = "one.jsonl"',
            'metric = "word_error_rate"\ndemo_task = "read"',
            r"key 'metric' is 'word_error_rate'; the demo's questions are about pictures",
        ),
        ('"One"', '"?!"', r"data set 1: key 'title' is '\?!'; it must have a letter or a digit"),
        ('"One"', f'"{"o" * 81}"', r"data set 1: key 'title' is 'oo.*at most 80 characters"),
        ("title", "title title", r"study\.toml is not TOML: .*line 2"),
        ('"A study"', "[" * 3000, r"study\.toml is not TOML"),
        ('"A study"', "9" * 5000, r"study\.toml is not TOML"),
    ],
)
def test_a_mistake_names_key_value_and_what_would_be_right(
    read: Callable[[str], Any], before: str, after: str, message: str
) -> None:
    assert before in GOOD
    with pytest.raises(StudyError, match=message):
        read(GOOD.replace(before, after, 1))


def test_there_must_be_a_data_set(read: Callable[[str], Any]) -> None:
    head = GOOD.partition("[[data]]")[0]
    with pytest.raises(StudyError, match="key 'data' is missing"):
        read(head)
    with pytest.raises(StudyError, match="key 'data' is empty"):
        read(head + "data = []")


@pytest.mark.parametrize("title", ["One", "one", "ONE!"])
def test_two_data_sets_with_one_results_folder_are_refused(read: Callable[[str], Any], title: str) -> None:
    more = f'[[data]]\ntitle = "{title}"\nmetric = "accuracy"\nfile = "two.jsonl"\n'
    with pytest.raises(StudyError, match=rf"titled 'One' and '{title}'.*results folder 'one'"):
        read(GOOD + more)


def test_pictures_and_speech_need_two_studies(read: Callable[[str], Any]) -> None:
    more = '[[data]]\ntitle = "Two"\nmetric = "word_error_rate"\nfile = "two.jsonl"\n'
    with pytest.raises(StudyError, match="'One' has the metric 'accuracy' and 'Two' has 'word_error_rate'"):
        read(GOOD + more)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(b"title = \xff")
    with pytest.raises(StudyError, match="byte 9 is not UTF-8"):
        read_study(path)
    with pytest.raises(StudyError, match=r"there is no study file at .*other\.toml"):
        find_study(tmp_path / "other.toml")
    with pytest.raises(StudyError, match="cannot be read"):
        find_study("a\0b.toml")
    with pytest.raises(StudyError, match=r"no study 'dem'; did you mean 'demo'.*one of: demo, llama-3"):
        find_study("dem")


def test_the_studies_that_come_with_kvprune_are_sound() -> None:
    assert set(built_in_studies()) == {"demo", "llama-3.2-11b-vision", "llama-3.2-90b-vision"}
    for name in built_in_studies():
        study = find_study(name)
        assert expand(study.policies, study.keep_ratios)[0].spec == "full"
        assert study.notes, name
        assert f"| `{name}` |" in PAGE
        if name != "demo":
            assert study.status == "not run: gated weights"
            row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
            assert study.status in row
            for one in study.policies:
                if one.startswith("trim"):
                    assert one.partition("=")[2] in row


def test_wheels_carry_the_studies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "comparison/studies/*.toml" in project["tool"]["setuptools"]["package-data"]["kvprune"]


def block(marker: str, language: str) -> str:
    found = re.search(rf"<!-- test: {marker} -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None, marker
    return found[1]


def test_the_file_of_the_page_is_sound(read: Callable[[str], Any]) -> None:
    study = read(block("study", "toml"))
    assert [one.title for one in study.data] == ["POPE", "Invoices"]
    assert study.data[1].limit == 200
    assert len(expand(study.policies, study.keep_ratios)) == 10


def test_every_key_is_on_the_page(read: Callable[[str], Any]) -> None:
    with pytest.raises(StudyError) as caught:
        read("none = 1")
    for key in str(caught.value).rpartition("the keys are ")[2].split(", "):
        assert f"`{key}`" in PAGE or key == "data", key


def png(colour: str) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(target, "PNG")
    return target.getvalue()


def test_the_converter_of_the_page_makes_data_that_compare_reads(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture = {"bytes": png("red"), "path": "a.png"}
    choice = {
        **{f"choice_{letter}": f"the {letter}" for letter in "abcd"},
        "question": "Which?",
        "answer": "B",
        "question_type_id": 4,
        "data_type": "image",
        "image": [picture],
    }
    video = {**choice, "data_type": "video", "image": [picture, picture]}
    yes = {"question": "Is it red? Please answer yes or no.", "answer": "Yes", "category": "color"}
    no = {"question": "Is there a dog?", "answer": "no", "category": "adversarial"}
    for name, rows in {
        "choices": [choice, video, choice],
        "yes": [{**one, "image": picture} for one in (yes, no)],
    }.items():
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    space: dict[str, Any] = {"__name__": "convert"}
    exec(compile(block("converter", "python"), "studies.md", "exec", dont_inherit=True), space)
    assert space["convert"]([tmp_path / "choices.parquet"], tmp_path / "choices") == 2
    assert space["convert"]([tmp_path / "yes.parquet"], tmp_path / "yes") == 2
    first, second = read_examples(tmp_path / "choices" / "questions.jsonl")
    assert (first.id, second.id, first.task) == ("000000", "000001", "4")
    for right in ("B", "b", "B.", "(B)", "B. the b", "the b"):
        assert is_correct(right, first.answers)
    for wrong in ("A", "the a", "B or C", "no b"):
        assert not is_correct(wrong, first.answers)
    red, dog = read_examples(tmp_path / "yes" / "questions.jsonl")
    assert (red.task, dog.task) == ("color", "adversarial")
    assert is_correct("Yes.", red.answers)
    assert not is_correct("Yes", dog.answers)
    rows = [json.loads(line) for line in (tmp_path / "yes" / "questions.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [
        "Is it red? Please answer yes or no.",
        "Is there a dog?\nAnswer with yes or no.",
    ]
