"""What a study runs: everything is read and checked here, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from kvprune.comparison.data.examples import choose, read_examples
from kvprune.comparison.data.rows import GOOD_ROWS
from kvprune.comparison.plan.grid import Configuration, answer_attention, expand, partner
from kvprune.comparison.plan.settings import DEFAULT_AGAINST, Settings
from kvprune.comparison.statistics.summary import Metric
from kvprune.comparison.storage.folder_description import FolderDescription, describe_folder
from kvprune.comparison.storage.results_folder import ResultsFolder, read_answers
from kvprune.comparison.storage.sources import DEFAULT_LIMIT, check_demo_tasks, demo_folder, model_of
from kvprune.comparison.studies.study import DataSet, Study
from kvprune.errors import DataError, KVPruneError, StudyError
from kvprune.text import shown, suggestion

__all__ = ["Overrides", "Part", "Plan", "model_name", "plan_study"]

T = TypeVar("T")

_DEMO_DATA = "demo.data"
"""Folder of the demo's questions in the output; no results folder has a dot in its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What a command line may state in place of a study file; None keeps what the file states.

    Attributes:
        model: hub id or folder of the model.
        device: a torch device.
        limit: examples per task, of every data set.
        batch_size: examples per call of `generate`.
        trust_remote_code: let transformers run Python files that come with the model.
    """

    model: str | None = None
    device: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The comparison of one data set.

    Attributes:
        data: the data set.
        settings: the settings of the comparison; its data and its results folder are among them.
        demo_folder: folder that the demo's questions are written to; None where the data set is a file.
        examples: number of examples that are asked.
        there: what the results folder holds already; None where there is none.
    """

    data: DataSet
    settings: Settings
    demo_folder: Path | None
    examples: int
    there: FolderDescription | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a study runs.

    Attributes:
        study: the study.
        output: folder that holds a results folder for each data set, and the table.
        configurations: what is compared, the full cache first.
        overrides: what was stated in place of the study file.
        parts: the comparisons, in the order of the study.
    """

    study: Study
    output: Path
    configurations: tuple[Configuration, ...]
    overrides: Overrides
    parts: tuple[Part, ...]


def model_name(settings: Settings, metric: Metric) -> str:
    """Return the model of a comparison in words: a hub id, a folder, or the embedded demo."""
    model = model_of(settings, "speech" if metric == "word_error_rate" else "pictures")
    return "the embedded demo" if model is None else model


def plan_study(
    study: Study,
    *,
    output: Path,
    data_folder: Path | None = None,
    only: Sequence[str] = (),
    overrides: Overrides | None = None,
) -> Plan:
    """Check a study with its policies, its data and its results folders; nothing is loaded or written.

    Every picture and every recording is decoded once.

    Args:
        study: The study.
        output: Folder for the results.
        data_folder: Folder that the files of the data sets are relative to; only a study whose questions all
            come from the demo needs none.
        only: Titles of the data sets to run; all if empty.
        overrides: What to state in place of the study file.

    Raises:
        StudyError: If a policy, an option, a budget, a title or a metric is wrong, or there is no folder of
            data; names the key.
        DataError: If a file is missing or damaged.
        ResultsError: If a results folder is damaged, or something else is in its place.
    """
    chosen = overrides or Overrides()
    where = str(study.path)
    configurations = _configurations(study, where)
    if output.exists() and not output.is_dir():
        raise StudyError(f"{output} is no folder; choose another one for the results")
    chosen_data = _selected(study, only)
    _check_files(chosen_data, data_folder)
    parts = [_part(study, one, output, data_folder, chosen) for one in chosen_data]
    return Plan(
        study=study, output=output, configurations=configurations, overrides=chosen, parts=tuple(parts)
    )


def _configurations(study: Study, where: str) -> tuple[Configuration, ...]:
    try:
        found = expand(study.policies, study.keep_ratios)
    except KVPruneError as error:
        raise StudyError(f"{where}: keys 'policies' and 'keep_ratios': {error}") from error
    if study.settings.answer_attention:
        known = {one.spec for one in found}
        found += tuple(one for one in answer_attention(found) if one.spec not in known)
    try:
        against = study.settings.against
        partner(against, found, optional=against == DEFAULT_AGAINST)
    except KVPruneError as error:
        raise StudyError(f"{where}: key 'against': {error}") from error
    return found


def _selected(study: Study, only: Sequence[str]) -> list[DataSet]:
    titles = [one.title for one in study.data]
    for title in only:
        if title not in titles:
            raise StudyError(
                f"{study.path} has no data set {shown(title)}{suggestion(title, titles)}; it has: "
                f"{', '.join(titles)}"
            )
    return [one for one in study.data if not only or one.title in only]


def _check_files(data: Sequence[DataSet], data_folder: Path | None) -> None:
    """Raise unless the file of each data set is there; names all that are missing."""
    files = [one.file for one in data if one.file is not None]
    if files and data_folder is None:
        raise StudyError(
            f"this study needs a folder of data that holds {', '.join(files)}; name it with --data-folder"
        )
    missing = [file for file in files if data_folder is not None and not (data_folder / file).exists()]
    if missing:
        raise DataError(
            f"the folder of data {data_folder} has no {', '.join(missing)}; each must be a JSON-lines file "
            f"with rows like {GOOD_ROWS}; --only runs the data sets that are there"
        )


def _part(study: Study, one: DataSet, output: Path, data_folder: Path | None, overrides: Overrides) -> Part:
    demo = None
    if one.demo_task is not None:
        # The seed of the demo's questions is always 0: that of the study is for policies that draw.
        demo = (output / _DEMO_DATA if data_folder is None else data_folder) / one.demo_task
        file = demo_folder(demo, 0) / "data.jsonl"
    else:
        assert data_folder is not None, "checked before"
        file = data_folder / str(one.file)
    settings = _settings(study, one, overrides, file, output / one.folder)
    if demo is not None:
        settings = replace(settings, limit=settings.limit or DEFAULT_LIMIT)
    return Part(
        data=one,
        settings=settings,
        demo_folder=demo,
        examples=_examples(study, one, settings),
        there=_there(settings.output),
    )


def _settings(study: Study, one: DataSet, overrides: Overrides, file: Path, output: Path) -> Settings:
    own, base = overrides, study.settings
    try:
        return replace(
            base,
            data=file,
            output=output,
            model=_first(own.model, base.model),
            device=own.device,
            limit=_first(own.limit, one.limit, base.limit),
            batch_size=base.batch_size if own.batch_size is None else own.batch_size,
            max_new_tokens=_first(one.max_new_tokens, base.max_new_tokens),
            trust_remote_code=own.trust_remote_code,
        )
    except KVPruneError as error:
        raise StudyError(f"{study.path}: {error}") from error


def _first(*values: T | None) -> T | None:
    """Return the first value that is stated, 0 and "" included: a wrong value must not pass for none."""
    return next((value for value in values if value is not None), None)


def _examples(study: Study, one: DataSet, settings: Settings) -> int:
    """Return how many examples are asked; reads and checks all of a file."""
    assert settings.data is not None, "each part has a file"
    if one.demo_task is not None:
        try:
            check_demo_tasks((one.demo_task,))
        except KVPruneError as error:
            where = f"{study.path}: data set {shown(one.title)}"
            raise StudyError(f"{where}, key 'demo_task': {error}") from error
        if settings.data.exists():
            read_examples(settings.data)
        return settings.limit or DEFAULT_LIMIT  # what is not there is written before the run
    found = read_examples(settings.data)
    speech = found[0].kind == "speech"
    if speech != (one.metric == "word_error_rate"):
        right = "word_error_rate" if speech else "accuracy"
        raise StudyError(
            f"{study.path}: data set {shown(one.title)}, key 'metric' is {one.metric!r}, but "
            f"{settings.data} is about {found[0].kind}, which is measured by {right!r}"
        )
    return len(choose(found, None, settings.limit))


def _there(folder: Path) -> FolderDescription | None:
    """Return what a results folder holds; raise if something else, or a damaged one, is in its place."""
    opened = ResultsFolder(folder)
    if opened.manifest is None:
        return None
    read_answers(opened.results)
    return describe_folder(folder)
