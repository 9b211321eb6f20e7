"""Part B of the known defects, continued: packaging, the command line, and what a data file can do to it.

Each test asserts what is right, and failed before the defect was cured; what is still open is a strict
expected failure.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from defect_helpers import on_models
from PIL import Image
from typer.testing import CliRunner

from kvprune import cli
from kvprune.comparison import Settings, compare
from kvprune.errors import DataError
from kvprune.text import printable

ROOT = Path(__file__).parents[2]

# B6: data files of others.


def data_file(folder: Path, **changes: str) -> Path:
    """Write two questions about one picture; changes are to the first."""
    Image.new("RGB", (40, 40), "red").save(folder / "picture.png")
    plain = {"image": "picture.png", "question": "what?", "answers": ["red"]}
    rows = [{**plain, **changes}, {**plain, "task": "other"}]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def compared(folder: Path, **changes: str) -> Any:
    """Run `kvprune compare` on a data file."""
    arguments = ["--data", str(data_file(folder, **changes)), "--output", str(folder / "results")]
    plain = ["--policy", "lossless", "--repetitions", "0", "--max-new-tokens", "2"]
    return CliRunner().invoke(cli.app, ["compare", *arguments, *plain], env={"COLUMNS": "200"})


@on_models
def test_b6_a_task_named_as_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    done = compared(tmp_path, task="[/nope]")
    assert done.exit_code == 0, repr(done.exception)
    assert "[/nope]" in done.stdout


@on_models
def test_b6_a_question_with_the_image_token_is_asked_or_refused(tmp_path: Path) -> None:
    data = data_file(tmp_path, question="what is <|image|>?")
    settings = Settings(data=data, output=tmp_path / "results", max_new_tokens=2, repetitions=0)
    with contextlib.suppress(DataError):
        compare(["lossless"], [], settings)


@on_models
def test_b6_names_of_tasks_are_made_printable(tmp_path: Path) -> None:
    done = compared(tmp_path, task="\x1b]0;owned\x07\u202e")
    assert done.exit_code == 0, repr(done.exception)
    assert not [character for character in "\x1b\x07\u202e" if character in done.output]


# B8: what show and doctor print.


@pytest.mark.parametrize("length", [401, 412])
def test_b8_an_elision_makes_a_text_shorter(length: int) -> None:
    assert len(printable("x" * length, 400)) <= length


def test_b8_show_prints_the_meaning_of_an_option_as_it_is() -> None:
    shown = CliRunner().invoke(cli.app, ["show", "aircache"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "characters left" not in shown.output


WITHOUT_THE_EXTRA = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
extra = {"matplotlib", "scipy", "sklearn", "PIL"}
def find_spec(name, *where):
    return None if name.partition(".")[0] in extra else find(name, *where)
importlib.machinery.PathFinder.find_spec = find_spec
from kvprune.cli.doctor import examine
for check in examine():
    print(check.section, check.ok, check.detail, sep="|")
"""


@pytest.mark.slow
def test_b8_doctor_fails_nothing_where_only_the_extra_is_missing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    assert any('pip install "kvprune[demo]"' in detail for _, _, detail in lines)
    of_demo = [(ok, detail) for section, ok, detail in lines if section == "demo"]
    assert [ok for ok, _ in of_demo] == ["None"], of_demo


# B11: start-up.

STARTED = """
import io, sys
from contextlib import redirect_stdout
def loaded(*arguments):
    sys.argv = ["kvprune", *arguments]
    try:
        with redirect_stdout(io.StringIO()):
            import kvprune.cli
            kvprune.cli.main()
    except SystemExit as end:
        assert not end.code, end.code
    return *arguments, [name for name in ("torch", "transformers.cache_utils") if name in sys.modules]
import kvprune
print("import", ["torch"] * ("torch" in sys.modules))
print(*loaded("--help"))
print(*loaded("cite", "trim"))
print(*loaded("list"))
"""


@pytest.fixture(scope="module")
def started() -> dict[str, str]:
    """What is loaded after the import and after each of three commands, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words = [line.partition("[") for line in done.stdout.splitlines()]
    return {command.strip(): f"[{modules}" for command, _, modules in words}


@pytest.mark.parametrize("command", ["cite trim", "list"])
def test_b11_what_computes_nothing_loads_neither_torch_nor_transformers(
    started: dict[str, str], command: str
) -> None:
    assert started[command] == "[]"
