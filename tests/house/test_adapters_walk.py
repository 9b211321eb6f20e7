"""The walk of docs/adapters.md: its files, its commands, nothing else, from an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pip", reason="environments made by other tools may have no pip")

from walking import Step, Walk, as_parameters, read, require_printed

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text("utf-8")
STEPS = read(PAGE)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(tmp_path_factory.mktemp("adapters-walk"), STEPS)


@pytest.mark.slow  # each step starts a process; CI runs it in its second stage
@pytest.mark.parametrize("step", as_parameters(STEPS))
def test_each_command_of_the_walk_does_what_the_page_says(walk: Walk, step: Step) -> None:
    require_printed(step, walk.reach(step))
