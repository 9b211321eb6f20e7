"""The walk of docs/write-a-policy.md, from an empty folder: see `walking`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("pip", reason="environments made by other tools may have no pip")

from walking import Walk, as_parameters, read, require_printed

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
STEPS = read(PAGE)
(COMPARISON,) = (step for step in STEPS if step.command.startswith("kvprune compare"))


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return Walk(tmp_path_factory.mktemp("walk"), STEPS)


@pytest.mark.parametrize("step", as_parameters(STEPS))
def test_each_command_of_the_walk_does_what_the_page_says(walk, step):
    require_printed(step, walk.reach(step))


def test_the_policy_is_listed_from_its_own_package(walk):
    (step,) = (step for step in STEPS if step.command == "kvprune list")
    output = walk.reach(step)
    (row,) = (line for line in output.splitlines() if line.startswith("value-spread"))
    assert "value-spread (kvprune-value-spread)" in row
    assert "broken" not in output


def test_the_comparison_names_the_policy_and_draws_a_picture(walk):
    output = walk.reach(COMPARISON)
    rows = [line.split()[0] for line in output.splitlines() if "reach=onward " in line and " % " in line]
    assert rows == ["value-spread:reach=onward", "random:reach=onward"] * 2
    results = walk.folder / "kvprune-results"
    assert "value-spread:keep_ratio=0.25,reach=onward" in (results / "results.jsonl").read_text("utf-8")
    assert "kvprune-value-spread" in (results / "manifest.json").read_text("utf-8")
    with Image.open(results / "accuracy_vs_kept.png") as picture:
        picture.load()
        assert picture.width > 400
        assert picture.height > 400
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_the_walk_is_whole():
    commands = [step.command.split()[:2] for step in STEPS]
    assert commands == [
        ["python", "try_it.py"],
        ["pip", "install"],
        ["kvprune", "list"],
        ["kvprune", "show"],
        ["kvprune", "check"],
        ["pytest", "-q"],
        ["kvprune", "compare"],
        ["python", "contrast_it.py"],
        ["python", "read_less.py"],
        ["pytest", "-q"],
        ["python", "halve_it.py"],
        ["python", "learn_it.py"],
    ]
    assert COMPARISON.looks_like


def test_this_environment_is_as_it_was(walk):
    assert importlib.util.find_spec("kvprune_value_spread") is None
