"""The command line: parses, calls the library and prints; what is computed is computed elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'kvprune: the command line needs {missing.name}, which is not installed: pip install "kvprune[demo]"'
    ) from missing

from kvprune import registry
from kvprune.errors import (
    ConformanceError,
    KVPruneError,
    PluginError,
    PolicyOptionError,
    UnknownInvariantError,
)
from kvprune.spec import describe_type
from kvprune.text import error_line, printable

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvprune",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Prune the cross-attention KV cache of vision-language models, and compare how well that works.",
)

_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files that come with the model; read them first, they can do whatever you can.",
    ),
]

_WIDTH = 120
"""Columns of a table where standard output is no terminal."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a docstring must not end a command on a terminal without UTF-8
            stream.reconfigure(errors="backslashreplace")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvprune {metadata.version('kvprune')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_policies(debug: _Debug = False) -> None:
    """List installed policies, and plugins that could not be loaded."""
    with _one_line_errors(debug):
        found = _load_quietly()
        table = _table("policy", "version", "plugin (distribution)", "what it does")
        for entry in found.policies.values():
            claim = " ".join(_docstring(entry.cls).partition("\n\n")[0].split())
            plugin = f"{entry.plugin} ({entry.distribution})"
            table.add_row(entry.name, str(entry.version), plugin, printable(claim, 400))
        _console().print(table)
        for broken in found.broken:
            _say(f"broken plugin {broken.name} ({broken.distribution}): {broken.problem}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A policy's name, as `kvprune list` prints it.")],
    debug: _Debug = False,
) -> None:
    """Explain one policy: what it does, its options, where it comes from and what it costs."""
    with _one_line_errors(debug):
        found = _load_quietly()
        found.policy_class(name)
        entry = found.policies[name]
        try:
            _describe(entry)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the class is foreign code, too
            raise PluginError(
                f"policy {name!r} of plugin {entry.plugin!r} cannot be described: {error_line(error)}"
            ) from error


def _describe(entry: registry.PolicyEntry) -> None:
    policy = entry.cls
    text, meanings = _read_docstrings(policy)
    print(f"{entry.name}, version {entry.version}, from plugin {entry.plugin} ({entry.distribution})\n")
    print(printable(text, 20_000, newlines=True) + "\n")
    for fact in ("paper", "fidelity", "cost"):
        print(f"{fact + ':':<10}{printable(getattr(policy, fact), 400) or '-'}")
    types = policy.option_types()
    table = _table("option", "type", "default", "meaning")
    for option in dataclasses.fields(policy):
        row = option.name, describe_type(types[option.name]), _default(option), meanings.get(option.name, "-")
        table.add_row(*(printable(cell, 400) for cell in row))
    print()
    if types:
        _console().print(table)
    else:
        print("It has no options.")


def _default(option: dataclasses.Field[Any]) -> str:
    if option.default_factory is not dataclasses.MISSING:
        return str(option.default_factory()).lower()
    return "required" if option.default is dataclasses.MISSING else str(option.default).lower()


@app.command()
def doctor(debug: _Debug = False) -> None:
    """Check versions, plugins, what adapters rely on in transformers, and the demo model."""
    from kvprune.doctor import examine

    with _one_line_errors(debug), redirect_stdout(sys.stderr):
        _quieten_transformers()
        checks = examine()
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            print(section)
        mark = {True: "ok", False: "FAIL", None: "-"}[check.ok]
        print(f"  {mark:<5} {check.name}: {check.detail}")
        if check.ok is False:
            print(f"        to do: {check.remedy}")
    failed = sum(check.ok is False for check in checks)
    print(f"{failed} of {len(checks)} checks failed." if failed else "All is well.")
    raise typer.Exit(1 if failed else 0)


@app.command()
def check(
    policy: Annotated[
        str,
        typer.Argument(
            help="Name of an installed policy, checked with several budgets; a spec such as "
            "trim:k_ratio=0.1, checked as it is; or the class name of an installed adapter, or of a model "
            "that it supports."
        ),
    ],
    expect_failure: Annotated[
        list[str] | None,
        typer.Option(help="ID=REASON of an invariant that must fail; repeatable."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Invariants to check, separated by commas.")] = None,
    seed: Annotated[int, typer.Option(help="Of the generated problems.")] = 0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON on standard output.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Check a policy, or an adapter, against the invariants KV01 to KV14, on tiny models."""
    from kvprune.testing import check_adapter, check_policy
    from kvprune.testing.conformance import installed_adapter

    with _one_line_errors(debug):
        ids = None if only is None else [part.strip() for part in re.split("[,;]", only)]
        expected = dict(_expected_failure(text) for text in expect_failure or [])
        try:
            adapter = installed_adapter(policy)
            if adapter is None:
                report = check_policy(policy, only=ids, expected_failures=expected, seed=seed)
            else:
                with _quiet_transformers():  # some families warn at each call of `generate`
                    report = check_adapter(adapter, only=ids, expected_failures=expected, seed=seed)
        except ConformanceError as failure:
            report = failure.report
    if json_output:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        table = _table("id", "what", "outcome", "problems", "seconds")
        for result in report.results:
            row = (result.id, result.title, result.outcome, str(result.problems), f"{result.seconds:.1f}")
            table.add_row(*row)
        _console().print(table)
        print("\n".join([*report.explanations, "", report.verdict]))
    raise typer.Exit(0 if report.passed else 1)


def _expected_failure(text: str) -> tuple[str, str]:
    invariant, equals, reason = (part.strip() for part in text.partition("="))
    if not equals or not reason:
        raise UnknownInvariantError(f"expected ID=REASON such as KV14='not nested', got {text!r}")
    return invariant, reason


@app.command()
def compare(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Spec such as trim or random:keep_tokens=32; repeatable. One that states no budget is "
            "crossed with --keep-ratios. Default: lossless, trim, and uniform, random and norm with "
            "reach=onward. The full cache is always compared, too."
        ),
    ] = None,
    keep_ratios: Annotated[
        str, typer.Option(help="Fractions of visible tokens kept, separated by commas.")
    ] = "0.5,0.25,0.1,0.05",
    model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: the embedded demo.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="JSON-lines file of questions. Default: the embedded demo's.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks, separated by commas. Default: all.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Examples per task. Default: all of --data, 64 of the demo.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For policies that draw, and for the demo's questions.")] = 0,
    output: Annotated[Path, typer.Option(help="Results folder. The same command resumes in it.")] = Path(
        "kvprune-results"
    ),
    batch_size: Annotated[int, typer.Option(help="Examples per call of generate.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Limit on an answer, in tokens.")] = 16,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, float64, bfloat16 or float16.")
    ] = "auto",
    attn_implementation: Annotated[
        str | None, typer.Option(help="eager, sdpa, ... Default: what transformers chooses.")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Repetitions of the timing; 0 times nothing.")] = 5,
    trust_remote_code: _TrustRemoteCode = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print summary.json on standard output, and nothing else there.")
    ] = False,
    debug: _Debug = False,
) -> None:
    """Compare policies and budgets: accuracy, kept tokens, bytes and speed, on the same questions."""
    with _one_line_errors(debug):
        from kvprune.ablation import DEFAULT_POLICIES, Settings
        from kvprune.ablation import compare as run
        from kvprune.ablation.console import progress_bar, show_summary

        settings = Settings(
            model=model,
            data=data,
            tasks=None if tasks is None else tuple(part.strip() for part in tasks.split(",")),
            limit=limit,
            seed=seed,
            output=output,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            repetitions=repetitions,
            trust_remote_code=trust_remote_code,
        )
        _quieten_transformers()
        ratios = [_ratio(part) for part in re.split("[,;]", keep_ratios)]
        with redirect_stdout(sys.stderr), progress_bar() as on_progress:  # plugins may print
            summary = run(policy or DEFAULT_POLICIES, ratios, settings, on_progress)
        if json_output:
            print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
        else:
            show_summary(summary, output, _console())


@app.command()
def verify(
    results: Annotated[Path, typer.Argument(help="Results folder that `kvprune compare` wrote.")],
    sample: Annotated[
        int, typer.Option(help="Batches under a configuration to run again; each also runs uncompressed.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the draw of these batches.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="Run everything again.")] = False,
    trust_remote_code: _TrustRemoteCode = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the verification as JSON.")] = False,
    debug: _Debug = False,
) -> None:
    """Run a part of a comparison again and say whether it reproduces; changes nothing. Exit code 1: no."""
    with _one_line_errors(debug):
        from kvprune.ablation import verify as run
        from kvprune.ablation.console import progress_bar

        _quieten_transformers()
        with redirect_stdout(sys.stderr), progress_bar() as on_progress:
            found = run(
                results,
                sample=None if everything else sample,
                seed=seed,
                trust_remote_code=trust_remote_code,
                on_progress=on_progress,
            )
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if json_output else found)
    raise typer.Exit(0 if found.reproduces else 1)


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Turn errors that the user can do something about into one line and exit code 2."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted; the same command continues where this one stopped")
        raise typer.Exit(130) from None
    except (KVPruneError, ModuleNotFoundError) as error:
        if debug:
            raise
        _say(f"error: {printable(str(error), newlines=True)}")
        raise typer.Exit(2) from None


def _quieten_transformers() -> None:
    """Keep its bars for loading weights from breaking what this command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep its warnings off the terminal for a while."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PolicyOptionError(
            f"keep ratio {text.strip()!r} is no number; expected fractions such as 0.5,0.25"
        ) from None


def _load_quietly() -> registry.Registry:
    """Load all plugins; what they print goes to standard error, which is no part of a command's answer."""
    with redirect_stdout(sys.stderr):
        return registry.load()


def _docstring(cls: type) -> str:
    """Return the docstring that an author wrote; not the signature that a dataclass makes up."""
    text = getattr(cls, "__doc__", None)
    if not isinstance(text, str) or text.startswith(f"{cls.__name__}("):
        return ""
    return inspect.cleandoc(text)


def _read_docstrings(policy: type) -> tuple[str, dict[str, str]]:
    """Return a class's docstring without its arguments, and each argument's meaning, inherited or not."""
    meanings: dict[str, str] = {}
    for cls in reversed(policy.__mro__):
        arguments = _ARGUMENTS.search(_docstring(cls))
        for name, meaning in _ARGUMENT.findall(arguments[1] if arguments else ""):
            meanings[name] = " ".join(meaning.split())
    text = _ARGUMENTS.sub("", _docstring(policy))
    return re.sub("\n{3,}", "\n\n", text).strip(), meanings


_ARGUMENTS = re.compile(r"^(?:Args|Attributes):\n((?:[ ]+\S.*\n?|\n(?=[ ]))*)", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w+)(?: \([^)]*\))?:((?:.*)(?:\n {5,}.*)*)", re.MULTILINE)


def _table(*columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.columns[0].no_wrap = True
    return table


def _console() -> Console:
    # Text of plugins is shown as it is: no markup, no :emoji:.
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if console.is_terminal:
        return console
    return Console(width=_WIDTH, highlight=False, markup=False, emoji=False)


def _say(text: str) -> None:
    print(f"kvprune: {text}", file=sys.stderr)
