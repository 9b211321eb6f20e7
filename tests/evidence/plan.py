"""What the page shows: the sets in sets.toml, and whether their commands made the folders."""

from __future__ import annotations

import dataclasses
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from kvprune.cli import app
from kvprune.comparison.storage.sources import DEFAULT_LIMIT
from kvprune.comparison.storage.stored_run import StoredRun
from kvprune.errors import KVPruneError, ResultsError
from kvprune.policy.spec import PolicySpec

PLAN = Path(__file__).parent / "sets.toml"


@dataclass(frozen=True, kw_only=True)
class PlannedSet:
    """One set of results: a heading, a table and a panel of a figure.

    Attributes:
        key: its name in sets.toml.
        title: heading on the page.
        about: what was asked of which model, in sentences.
        asks: whether the prompt asks for something in particular.
        commands: the `kvprune compare` commands; each names its results folder with --output. Policies may be
            spread over several.
        prepare: commands that make data or weights before.
        figure: sets of the same figure are its panels.
        aims: whether the aims of the demo are checked on it.
        same_questions_as: key of a set with the same questions and another model; "" for none.
        note: what else a reader must know, or "".
    """

    key: str
    title: str
    about: str
    asks: bool
    commands: tuple[str, ...]
    figure: str
    prepare: tuple[str, ...] = ()
    aims: bool = False
    same_questions_as: str = ""
    note: str = ""

    @property
    def folders(self) -> tuple[str, ...]:
        """The results folders, one for each command."""
        return tuple(str(parameters(command)["output"]) for command in self.commands)


def read_plan(path: Path = PLAN) -> dict[str, PlannedSet]:
    """Read sets.toml.

    Raises:
        KVPruneError: If a field is missing, unknown or of another type, or a set names one that is not there.
    """
    known = {field.name: field for field in dataclasses.fields(PlannedSet) if field.name != "key"}
    found = {}
    for key, given in tomllib.loads(path.read_text("utf-8")).items():
        where = f"{path.name}, [{key}]"
        if odd := sorted(set(given) - set(known)):
            raise KVPruneError(f"{where}: unknown field {odd[0]!r}; known are {', '.join(known)}")
        for name, field in known.items():
            if name not in given and field.default is dataclasses.MISSING:
                raise KVPruneError(f"{where}: field {name!r} is missing")
        for name, value in given.items():
            wanted = {"bool": bool, "str": str}.get(str(known[name].type), list)
            if not isinstance(value, wanted):
                raise KVPruneError(f"{where}: field {name!r} is {value!r}, not a {wanted.__name__}")
        lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        found[key] = PlannedSet(key=key, **{**given, **lists})
        found[key].folders  # noqa: B018  raises if a command is none
    for one in found.values():
        if one.same_questions_as and one.same_questions_as not in found:
            raise KVPruneError(f"[{one.key}] names {one.same_questions_as!r}, which is no set")
    return found


def parameters(command: str) -> dict[str, Any]:
    """Return the options of a `kvprune compare` command, as the command line itself reads them.

    Raises:
        KVPruneError: If it is another command, has wrong options, or names no results folder inside the
            current one.
    """
    words = shlex.split(command.replace("\\\n", " "))
    if words[:2] != ["kvprune", "compare"]:
        raise KVPruneError(f"{command!r} is no `kvprune compare` command")
    group: Any = typer.main.get_command(app)
    compare = group.commands["compare"]
    try:
        found = dict(compare.make_context("kvprune compare", words[2:]).params)
    except Exception as error:  # typer brings its own classes of errors
        raise KVPruneError(f"{command!r}: {getattr(error, 'message', error)}") from error
    output = Path(found["output"])
    if "--output" not in words or output.is_absolute() or ".." in output.parts:
        raise KVPruneError(f"{command!r} must name a results folder in the current one with --output")
    return found


def check_command(command: str, stored: StoredRun) -> None:
    """Raise unless a results folder can have been made by a command; where the model lies is not compared.

    Raises:
        ResultsError: If an option is not what the folder records.
    """
    for what, said, found in _pairs(parameters(command), stored):
        if said != found:
            raise ResultsError(
                f"{stored.folder} was not made by the command that the page would show: {what} is {said} in "
                f"the command and {found} in the folder ({command!r})"
            )


def _pairs(said: dict[str, Any], stored: StoredRun) -> Iterator[tuple[str, object, object]]:
    """Yield what the command says and what the folder has, by name."""
    settings, grid = stored.settings, stored.grid
    for name in ("draws", "seed", "reread", "dtype", "attn_implementation"):
        yield name, said[name], getattr(settings, name)
    for name in ("device", "max_new_tokens"):
        if said[name] is not None:
            yield name, said[name], getattr(settings, name)
    demo = None if said["data"] is not None else said["demo"]
    yield "demo", demo, None if grid.origin == "file" else grid.origin
    yield "data", _name(said["data"]), _name(settings.data)
    tasks = sorted({one.task for one in stored.examples})
    if said["tasks"] is not None:
        yield "tasks", sorted(part.strip() for part in said["tasks"].split(",")), tasks
    most = max(sum(one.task == task for one in stored.examples) for task in tasks)
    limit = DEFAULT_LIMIT if said["limit"] is None and demo == "pictures" else said["limit"]
    if limit is not None:  # a file may hold fewer rows than the limit
        yield "examples per task", limit if demo == "pictures" else min(limit, most), most
    yield from _policies(said, stored)


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _policies(said: dict[str, Any], stored: StoredRun) -> Iterator[tuple[str, object, object]]:
    """Yield the keep ratios and, unless all policies run, the names of policies."""
    specs = [PolicySpec.parse(spec) for spec in said["policy"] or ()]
    ratios = {float(part) for part in said["keep_ratios"].replace(";", ",").split(",")}
    stated = {float(str(spec.options["keep_ratio"])) for spec in specs if "keep_ratio" in spec.options}
    rows = [one for one in stored.configurations if not one.policy.reads_answer]
    found = {one.keep_ratio for one in rows if one.keep_ratio is not None}
    yield "keep ratios", sorted(ratios | stated), sorted(found)
    yield "answer-attention", said["answer_attention"], len(rows) < len(stored.configurations)
    if specs and not said["every"]:
        yield (
            "policies",
            sorted({spec.name for spec in specs} | {"full"}),
            sorted({one.policy.name for one in rows}),
        )
