"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import kvprune_command, runner

import kvprune
from kvprune.cli import app
from kvprune.comparison.storage import sources
from kvprune.session import registry

COMMANDS = [
    [name]
    for name in (
        "list",
        "show",
        "cite",
        "doctor",
        "check",
        "compare",
        "study",
        "verify",
        "train",
        "results",
        "bench",
    )
]
COMMANDS += [["bench", "memory"], *(["results", name] for name in ("list", "export", "diff"))]


def test_version() -> None:
    assert kvprune_command("--version") == f"kvprune {metadata.version('kvprune')}\n"


def test_list_names_every_policy_with_its_claim() -> None:
    out = kvprune_command("list")
    for name in kvprune.list_policies():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        assert "builtin (kvprune)" in line
    assert "Keep tokens drawn at random" in out


def test_list_and_show_tell_references_from_methods() -> None:
    label = "reference, not a method"
    out = kvprune_command("list")
    assert out.count(label) == 1
    (line,) = (line for line in out.splitlines() if label in line)
    assert line.startswith("answer-attention ")
    assert f"kind:     {label}\n" in kvprune_command("show", "answer-attention")
    assert label not in kvprune_command("show", "uniform")


class _Broken:
    """An entry point whose module cannot be imported."""

    name = "shiny"
    dist = SimpleNamespace(name="kvprune-shiny")

    def load(self) -> None:
        raise ImportError("no module named shinylib")


@pytest.fixture
def broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **k: [*real(**k), _Broken()])


def test_list_names_broken_plugins_and_goes_on(broken_plugin: None) -> None:
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0
    assert "trim" in result.stdout
    assert "broken plugin shiny (kvprune-shiny): ImportError: no module named shinylib" in result.stderr


def test_doctor_fails_for_a_broken_plugin(broken_plugin: None) -> None:
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL  shiny (kvprune-shiny): ImportError: no module named shinylib" in result.stdout
    assert "to do: repair, update or uninstall kvprune-shiny" in result.stdout


def test_show_explains_a_policy() -> None:
    out = kvprune_command("show", "norm")
    assert "norm, version 2, from plugin builtin (kvprune)" in out
    assert "highest (or lowest) L2 norm" in out
    assert "2406.11430" in out
    assert "fidelity: inspired-by" in out
    assert "cost:     one pass over values" in out
    assert "Args:" not in out
    options = {line.split()[0]: line for line in out.splitlines() if line and not line.startswith(" ")}
    assert "values | keys | raw_keys" in options["of"]
    assert "high | low" in options["keep"]
    assert "Fraction of visible tokens kept" in options["keep_ratio"], "meanings are inherited"


def test_show_every_installed_policy() -> None:
    for name in kvprune.list_policies():
        out = kvprune_command("show", name)
        for option in registry.load().policy_class(name).option_types():
            table = out[out.index("\noption ") :]  # a docstring may begin a line with the same word
            (line,) = (line for line in table.splitlines() if line.startswith(f"{option} "))
            assert not line.rstrip().endswith(" -"), f"option {option} of {name} has no documented meaning"
    assert "It has no options." in kvprune_command("show", "full")


def test_errors_are_one_line_with_code_2() -> None:
    err = kvprune_command("show", "nrom", code=2)
    assert err.startswith("kvprune: error: unknown policy 'nrom'; did you mean 'norm'?")
    assert err.count("\n") == 1


def test_show_and_cite_take_specs() -> None:
    pair = "divprune:keep_ratio=0.5 then h2o:keep_ratio=0.2"
    out = kvprune_command("show", pair)
    assert out.startswith(f"{pair} is made of then, divprune, h2o\n")
    for name in ("then", "divprune", "h2o"):
        assert kvprune_command("show", name) in out
    assert kvprune_command("show", "trim:keep_ratio=0.5") == kvprune_command("show", "trim")
    assert kvprune_command("show", "mint:alpha=2") == kvprune_command("show", "mint")
    assert kvprune_command("cite", pair) == kvprune_command("cite", "divprune", "h2o")
    assert kvprune_command("cite", "mint:alpha=2") == kvprune_command("cite", "mint")
    for command in ("show", "cite"):
        assert "'trim' has no option 'keep'" in kvprune_command(command, "trim:keep=1", code=2)
        assert "did you mean 'mint'?" in kvprune_command(command, "mintt", code=2)


def test_debug_shows_the_traceback() -> None:
    result = runner.invoke(app, ["show", "nrom", "--debug"])
    assert isinstance(result.exception, kvprune.errors.UnknownPolicyError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "trimm"], "unknown policy 'trimm'; did you mean 'trim'"),
        (["--policy", "trim:keep=1"], "policy 'trim' has no option 'keep'"),
        (["--keep-ratios", "0.5,half"], "keep ratio 'half' is no number"),
        (["--keep-ratios", "0.5,1.5"], "keep ratio 1.5 is not a fraction in (0, 1]"),
        (["--tasks", "reed"], "unknown task 'reed'; did you mean 'read'?"),
        (["--data", "nowhere.jsonl"], "no data file at nowhere.jsonl"),
        (["--dtype", "int3"], "unknown dtype 'int3'"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--output", "taken"], "taken is not a results folder: it holds 'novel.txt'"),
    ],
)
def test_compare_refuses_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "novel.txt").write_text("chapter one")
    err = kvprune_command("compare", *arguments, code=2)
    last = err.splitlines()[-1]
    assert last.startswith("kvprune: error: ")
    assert message in last
    assert (tmp_path / "taken" / "novel.txt").read_text() == "chapter one"


def test_unknown_flags_are_refused() -> None:
    assert "No such option" in kvprune_command("compare", "--keep-ratoi", "0.5", code=2)


def test_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvprune.comparison.compare", interrupted)
    err = kvprune_command("compare", "--output", str(tmp_path), code=130)
    assert "interrupted; the same command continues where this one stopped" in err


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a small comparison that has been run once."""
    demo = pytest.importorskip("kvprune.demo")
    if not hasattr(demo, "load"):
        pytest.skip("the demo model is not there yet")
    arguments = ["compare", "--output", str(tmp_path_factory.mktemp("cli") / "out"), "--policy", "trim"]
    arguments += ["--keep-ratios", "0.5;0.1", "--tasks", "read, count", "--limit", "1", "--seed", "3"]
    arguments += ["--max-new-tokens", "2", "--repetitions", "1"]
    kvprune_command(*arguments)
    return arguments


def test_compare_prints_table_notes_and_folder(compared: list[str]) -> None:
    out = kvprune_command(*compared)
    rows = [line for line in out.splitlines() if line.startswith(("full", "trim"))]
    assert [line.split()[0] for line in rows[:3]] == ["full", "trim", "trim"]
    assert " 10 % " in rows[2]
    assert "2 examples (read 1, count 1); 95 % Wilson intervals" in out
    assert f"Everything is in {compared[2]}" in out


def test_compare_json_is_all_of_standard_output(compared: list[str], undrawn: None) -> None:
    out = kvprune_command(*compared, "--json")
    assert json.loads(out) == json.loads((Path(compared[2]) / "summary.json").read_text())


def test_module_runs_and_list_needs_no_optional_package() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'scipy', 'sklearn', 'PIL'], None));"
        "sys.argv = ['kvprune', 'list']; import runpy; runpy.run_module('kvprune', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "trim" in done.stdout


def test_missing_typer_is_one_line() -> None:
    code = "import sys; sys.modules['typer'] = None; import kvprune.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr == (
        "kvprune: the command line needs typer, which is not installed: pip install typer\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], *([*command, "--help"] for command in COMMANDS)],
    ids=lambda arguments: " ".join(arguments),
)
def test_help_and_version_wait_for_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = f"""
import sys
from kvprune.cli import main
sys.argv = ["kvprune", *{arguments!r}]
try:
    main()
finally:
    heavy = {{"torch", "transformers", "numpy", "kvprune_strategies"}} & set(sys.modules)
    print("imported:", *sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported:"


def test_help_has_one_whole_line_on_each_command() -> None:
    out = kvprune_command("--help")
    lines = out[out.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in lines] == [command[0] for command in COMMANDS if len(command) == 1]
    for line in lines:
        assert line.endswith("."), line
        assert not line.endswith("..."), line


def test_documentation_names_every_option_of_compare() -> None:
    import typer

    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    command = typer.main.get_command(app).commands["compare"]  # type: ignore[attr-defined]
    for parameter in command.params:
        for flag in parameter.opts:
            if flag != "--help":
                assert f"`{flag}" in page, f"docs/compare.md does not explain {flag}"


def test_defaults_are_those_of_the_library() -> None:
    import typer

    from kvprune.comparison import DEFAULT_KEEP_RATIOS, Settings

    command = typer.main.get_command(app).commands["compare"]  # type: ignore[attr-defined]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    assert defaults.pop("keep_ratios") == ",".join(map(str, DEFAULT_KEEP_RATIOS))
    settings = Settings()
    for name in ("seed", "output", "batch_size", "max_new_tokens", "dtype", "repetitions", "limit"):
        assert str(defaults[name]) == str(getattr(settings, name)), name
    help_texts = {parameter.name: parameter.help for parameter in command.params}
    assert str(sources.DEFAULT_LIMIT) in help_texts["limit"]


def test_a_reader_that_has_seen_enough_ends_show_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def closed(entry: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("kvprune.cli.policies._describe", closed)
    result = runner.invoke(app, ["show", "trim"])
    assert "cannot be described" not in result.output
    assert result.exit_code == 1
