"""A study as its file states it: model, policies, budgets, settings, and the data sets of its table."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import get_args

from kvprune.comparison.plan.grid import DEFAULT_KEEP_RATIOS
from kvprune.comparison.plan.settings import Settings
from kvprune.comparison.statistics.summary import Metric
from kvprune.comparison.studies.toml_table import (
    FLAG,
    NUMBERS,
    TABLES,
    TEXT,
    TEXTS,
    WHOLE,
    Kind,
    TomlTable,
)
from kvprune.errors import KVPruneError, StudyError
from kvprune.text import shown, suggestion

__all__ = ["DataSet", "Study", "built_in_studies", "find_study", "read_study"]

_FOLDER = Path(__file__).parent
"""The studies that come with kvprune lie beside this file."""

_SETTINGS: Mapping[str, Kind[str | int | bool]] = {
    "model": TEXT,
    "dtype": TEXT,
    "attn_implementation": TEXT,
    "seed": WHOLE,
    "draws": WHOLE,
    "limit": WHOLE,
    "batch_size": WHOLE,
    "max_new_tokens": WHOLE,
    "repetitions": WHOLE,
    "reread": FLAG,
    "answer_attention": FLAG,
    "against": TEXT,
    "guide": TEXT,
}
"""Settings of a comparison that a study may state. Those that depend on the machine are not among them."""

_KEYS = ("title", "status", "notes", *_SETTINGS, "policies", "keep_ratios", "data")
_DATA_KEYS = ("title", "metric", "file", "demo_task", "limit", "max_new_tokens", "source")
_LONGEST_TITLE = 80
_METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A data set of a study: a row of its table.

    Attributes:
        title: name of the row.
        metric: what its answers are measured by: "accuracy" for questions about pictures, "word_error_rate"
            for recordings.
        file: JSON-lines file, relative to the folder of the data; None where `demo_task` is given.
        demo_task: task of the demo whose questions are written into the folder of the data.
        limit: examples per task; None takes the limit of the study.
        max_new_tokens: limit on an answer in tokens; None takes that of the study.
        source: where this row comes from, in words.
    """

    title: str
    metric: Metric
    file: str | None
    demo_task: str | None
    limit: int | None
    max_new_tokens: int | None
    source: str | None

    @property
    def folder(self) -> str:
        """Name of the results folder: letters, digits and hyphens of the title, in lower case."""
        return re.sub(r"[^\w]+", "-", self.title.casefold()).strip("-_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What a study file states.

    Attributes:
        path: the file.
        sha256: SHA-256 of the file.
        title: what the table is called.
        status: whether the authors of the file ran it, in words.
        notes: sentences that belong under the table.
        policies: specs of the policies; one without a budget runs at each keep ratio.
        keep_ratios: fractions of visible tokens kept.
        settings: settings that all data sets share.
        data: the data sets, in the order of the table.
    """

    path: Path
    sha256: str
    title: str
    status: str | None
    notes: tuple[str, ...]
    policies: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    settings: Settings
    data: tuple[DataSet, ...]


def built_in_studies() -> dict[str, Path]:
    """Return the files of the studies that come with kvprune, by name."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}


def find_study(name: str | Path) -> Study:
    """Read a study that comes with kvprune, by its name, or one of your own, by its file.

    Raises:
        StudyError: If there is none, or its file is wrong.
    """
    known = built_in_studies()
    if str(name) in known:
        return read_study(known[str(name)])
    path = Path(name)
    if path.suffix != ".toml" and not path.is_file():
        raise StudyError(
            f"there is no study {shown(str(name))}{suggestion(str(name), known)}; give the path of a .toml "
            f"file, or one of: {', '.join(known)}"
        )
    return read_study(path)


def read_study(path: Path) -> Study:
    """Read and check a study file, as far as that is possible without its policies and its data.

    Raises:
        StudyError: If the file cannot be read or is no TOML, or a key is unknown, missing, of the wrong type
            or out of range; names the file, the key and what would be right.
    """
    content, values = _read(path)
    table = TomlTable(str(path), values, _KEYS)
    data = tuple(
        _data_set(TomlTable(f"{path}, data set {number}", one, _DATA_KEYS))
        for number, one in enumerate(table.require("data", TABLES), start=1)
    )
    _check_data_sets(str(path), data)
    policies = tuple(table.require("policies", TEXTS))
    if not policies:
        raise table.wrong("policies", "it must name at least one policy")
    ratios = table.get("keep_ratios", NUMBERS)
    return Study(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        title=table.require("title", TEXT),
        status=table.get("status", TEXT),
        notes=tuple(table.get("notes", TEXTS) or ()),
        policies=policies,
        keep_ratios=DEFAULT_KEEP_RATIOS if ratios is None else tuple(ratios),
        settings=_settings(table),
        data=data,
    )


def _read(path: Path) -> tuple[bytes, Mapping[str, object]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise StudyError(f"there is no study file at {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise StudyError(f"the study file {path} cannot be read: {error}") from error
    try:
        return content, tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise StudyError(f"{path}: byte {error.start + 1} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # RecursionError: deep nesting
        raise StudyError(f"{path} is not TOML: {error}") from error


def _settings(table: TomlTable) -> Settings:
    stated = {key: table.get(key, kind) for key, kind in _SETTINGS.items()}
    stated = {key: value for key, value in stated.items() if value is not None}
    try:
        return Settings(**stated)  # type: ignore[arg-type]  # each was read as the kind of its field
    except KVPruneError as error:
        raise StudyError(f"{table.where}: {error}") from error


def _data_set(table: TomlTable) -> DataSet:
    file, task = table.get("file", TEXT), table.get("demo_task", TEXT)
    if (file is None) == (task is None):
        raise StudyError(
            f"{table.where}: give either 'file', a JSON-lines file relative to the folder of the data, or "
            f"'demo_task', a task of the demo; this data set has {'neither' if file is None else 'both'}"
        )
    if file is not None and (PurePath(file).is_absolute() or ".." in PurePath(file).parts):
        raise table.wrong("file", "it must be a path inside the folder of the data, such as pope/data.jsonl")
    metric = table.require("metric", TEXT)
    chosen = next((one for one in _METRICS if one == metric), None)
    if chosen is None:
        raise table.wrong("metric", f"it must be one of {', '.join(_METRICS)}{suggestion(metric, _METRICS)}")
    found = DataSet(
        title=table.require("title", TEXT),
        metric=chosen,
        file=file,
        demo_task=task,
        limit=_at_least_one(table, "limit"),
        max_new_tokens=_at_least_one(table, "max_new_tokens"),
        source=table.get("source", TEXT),
    )
    if task is not None and chosen != "accuracy":
        raise table.wrong("metric", "the demo's questions are about pictures, so it must be 'accuracy'")
    if not 1 <= len(found.folder) <= _LONGEST_TITLE:
        raise table.wrong(
            "title",
            f"it must have a letter or a digit and at most {_LONGEST_TITLE} characters, since it names a "
            "folder, too",
        )
    return found


def _at_least_one(table: TomlTable, key: str) -> int | None:
    value = table.get(key, WHOLE)
    if value is not None and value < 1:
        raise table.wrong(key, "it must be at least 1")
    return value


def _check_data_sets(where: str, data: Sequence[DataSet]) -> None:
    """Raise unless there are data sets, of one kind, whose titles give each a folder of its own."""
    if not data:
        raise StudyError(f"{where}: key 'data' is empty; add at least one data set under a line [[data]]")
    first: dict[str, DataSet] = {}
    for one in data:
        other = first.setdefault(one.folder, one)
        if other is not one:
            raise StudyError(
                f"{where}: two data sets are titled {shown(other.title)} and {shown(one.title)}, so both "
                f"would have the results folder {one.folder!r}; give each a title of its own"
            )
        if one.metric != data[0].metric:
            raise StudyError(
                f"{where}: data set {shown(data[0].title)} has the metric {data[0].metric!r} and "
                f"{shown(one.title)} has {one.metric!r}; a study has one model, which either answers "
                "questions about pictures or writes down speech, so all its data sets have one metric"
            )
