"""Makes a results folder that of a comparison: joins what it holds and what is asked for to one grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvprune.comparison.data.examples import Example, Kind, Utterance, choose, read_examples
from kvprune.comparison.execution.batches import batches
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import Configuration, partner, unite, with_guide
from kvprune.comparison.plan.settings import DEFAULT_AGAINST, NO_GUIDE, PICTURE_TOKENS, Settings
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.answer_lines import StoredAnswer, current
from kvprune.comparison.storage.answers import Answer, Key
from kvprune.comparison.storage.growth import grow
from kvprune.comparison.storage.identity import policy_identities
from kvprune.comparison.storage.manifest import build_about, build_context, guide_digest
from kvprune.comparison.storage.recorded_grid import Origin, RecordedGrid
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.comparison.storage.stored_run import choose_examples
from kvprune.comparison.storage.timings import Timings, read_timings
from kvprune.errors import GuideError
from kvprune.text import shown

__all__ = ["Claimed", "Data", "claim", "find_data"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where a comparison's examples come from.

    Attributes:
        origin: a file of the user, or one of the demos.
        examples: all examples that there are; None for the demo about pictures, which is written into the
            results folder.
        tasks: tasks of that demo that are asked for.
    """

    origin: Origin
    examples: tuple[Example, ...] | None
    tasks: tuple[str, ...] | None

    @property
    def kind(self) -> Kind:
        """What the examples are."""
        return "pictures" if self.examples is None else self.examples[0].kind


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A results folder that was claimed for a comparison.

    Attributes:
        settings: the settings, in which model, guide, device and partner are those of the run.
        grid: the whole grid.
        configurations: its configurations, the full cache first.
        examples: its examples.
        answers: finished answers of the grid.
        timings: measured times of the grid.
    """

    settings: Settings
    grid: RecordedGrid
    configurations: tuple[Configuration, ...]
    examples: tuple[Example, ...]
    answers: dict[Key, Answer]
    timings: Timings


def find_data(settings: Settings) -> Data:
    """Read and check the examples as far as that is possible without a results folder.

    Raises:
        DataError: If the file is missing or damaged, or a task is unknown.
    """
    if settings.data is not None:
        return Data(origin="file", examples=read_examples(settings.data), tasks=None)
    if settings.demo == "speech":
        return Data(origin="speech", examples=read_examples(sources.speech_data()), tasks=None)
    return Data(origin="pictures", examples=None, tasks=sources.check_demo_tasks(settings.tasks))


def claim(
    folder: ResultsFolder,
    wanted: Sequence[Configuration],
    data: Data,
    settings: Settings,
    on_note: Callable[[str], None],
) -> Claimed:
    """Join what a folder holds and what is asked for to one grid, and write it down.

    Args:
        folder: The results folder, already locked.
        wanted: Configurations asked for, the full cache first.
        data: What `find_data` returned.
        settings: The settings.
        on_note: Called with each thing that a user should know before anything is computed.

    Raises:
        ResultsError: If the folder is damaged.
        DataError: If an example is damaged, or a task is unknown.
        UnsupportedModelError: If there is no such model or guide.
        PolicyOptionError: If the policy to compare with is not part of the grid.
        GuideError: If a guide would do nothing, or is missing.
    """
    folder.check()
    model, device = sources.model_of(settings, data.kind), resolve_device(settings.device)
    limit = settings.max_new_tokens or (PICTURE_TOKENS if data.kind == "pictures" else None)
    long = next((one.id for one in data.examples or () if isinstance(one, Utterance) and one.is_long), None)
    if long is not None and settings.answer_attention:
        on_note(
            f"answer-attention is left out: recording {shown(long, 80)} is read window by window, and nobody "
            "knows the full cache's answer to a window that begins elsewhere"
        )
    settings = replace(
        settings,
        model=model,
        device=device,
        max_new_tokens=limit,
        answer_attention=settings.answer_attention and long is None,
    )
    lines = folder.answers()
    old = None if folder.is_free else folder.grid
    recorded = _recorded_guide(folder, old, lines)
    guide = sources.guide_of(settings, data.kind, recorded)
    wanted = wanted if guide == NO_GUIDE else with_guide(wanted)
    configurations, gone = _unite(old, wanted, lines, settings)
    settings = replace(
        settings,
        against=_partner(settings.against, configurations),
        guide=_guide_of_all(configurations, guide, recorded, chosen=settings.guide is not None),
    )
    asked = _asked(configurations, data, settings, lines, old)
    about = build_about(settings)
    if folder.manifest is None:
        folder.record(asked, (), about)
    every, chosen = _examples(folder, data, settings)
    asked = replace(asked, digests={one.id: one.digest for one in chosen})
    by_id = {one.id: one for one in every}
    growth = grow(
        old or replace(asked, policies=(), digests={}, batches=()),
        asked,
        available={one.id: one.digest for one in every},
        answered={line.answer.id for line in lines},
        former=folder.earlier,
        form=lambda names: [
            tuple(one.id for one in batch)
            for batch in batches([by_id[name] for name in names], settings.batch_size)
        ],
    )
    earlier = [] if old is None else folder.earlier
    if old is not None and growth.replaced is not None:
        earlier = [*earlier, growth.replaced]
    grid = growth.grid
    folder.record(grid, earlier, about)
    addresses = grid.addresses()
    answers, others = current(str(folder.results.path), lines, grid, earlier)
    rows = folder.timings.recover()
    timings = read_timings(str(folder.timings.path), rows, addresses, grid.digests)
    for note in (
        *(f"{spec} is in this folder but does not run any more ({why})" for spec, why in gone.items()),
        *growth.notes,
        *_more_configurations(configurations, wanted),
        *_kept(others),
    ):
        on_note(note)
    return Claimed(
        settings=settings,
        grid=grid,
        configurations=configurations,
        examples=choose_examples(every, tuple(grid.digests)),
        answers=answers,
        timings=timings,
    )


def _unite(
    old: RecordedGrid | None,
    wanted: Sequence[Configuration],
    lines: Sequence[StoredAnswer],
    settings: Settings,
) -> tuple[tuple[Configuration, ...], Mapping[str, str]]:
    """Return all configurations; those that the folder names but never answered are left out, see `unite`."""
    answered = {line.answer.spec for line in lines}
    earlier = [] if old is None else [spec for spec in old.specs if spec in answered]
    return unite(earlier, wanted, with_answer_attention=settings.answer_attention)


def _recorded_guide(folder: ResultsFolder, old: RecordedGrid | None, lines: Sequence[StoredAnswer]) -> str:
    """Return the guide of a folder's answers; one that was named, but never took part, is forgotten."""
    answered = {line.answer.spec for line in lines}
    policies = () if old is None else old.policies
    took_part = any("guide_digest" in one and one["spec"] in answered for one in policies)
    return folder.about["guide"] if took_part else NO_GUIDE


def _guide_of_all(configurations: Sequence[Configuration], guide: str, recorded: str, *, chosen: bool) -> str:
    """Return the guide of a whole folder: that of now, or that of its earlier configurations.

    Args:
        configurations: All configurations of the folder.
        guide: The guide of now.
        recorded: The guide of earlier configurations.
        chosen: Whether the user chose the guide of now.

    Raises:
        GuideError: If no configuration has a guide, but the user chose one, or the other way round.
    """
    guided = next((one.spec for one in configurations if one.guide), None)
    if guided is None:
        if chosen and guide != NO_GUIDE:
            raise GuideError(
                f"no policy here asks for a guide, so {shown(guide)} would do nothing; add one that does "
                "(--policy guided), or leave --guide out"
            )
        return NO_GUIDE
    guide = recorded if guide == NO_GUIDE else guide
    if guide == NO_GUIDE:
        raise GuideError(f"{guided} needs a guide; name one with --guide FOLDER (Settings.guide)")
    return guide


def _partner(against: str, configurations: Sequence[Configuration]) -> str:
    return partner(against, configurations, optional=against == DEFAULT_AGAINST)


def _asked(
    configurations: Sequence[Configuration],
    data: Data,
    settings: Settings,
    lines: Sequence[StoredAnswer],
    old: RecordedGrid | None,
) -> RecordedGrid:
    """Return the grid with the ingredients of now, but without examples."""
    policies = policy_identities(configurations, guide_digest(settings))
    drawn = {line.answer.seed for line in lines if line.answer.seed is not None}
    seeds = {settings.seed + number for number in range(settings.draws)}
    seeds |= {seed for seed in (() if old is None else old.seeds) if seed in drawn}
    return RecordedGrid(
        context=build_context(settings, data.kind, policies[0]),
        policies=tuple(policies),
        seeds=tuple(sorted(seeds)),
        origin=data.origin,
        data_seed=settings.seed if data.origin == "pictures" else None,
        digests={},
        batches=(),
    )


def _examples(
    folder: ResultsFolder, data: Data, settings: Settings
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return all examples that there are, and those that are asked for."""
    every, tasks, limit = data.examples, settings.tasks, settings.limit
    if every is None:
        tasks, limit = data.tasks or (), limit or sources.DEFAULT_LIMIT
        every = sources.write_demo(folder.path, tasks, limit, settings.seed)
    return every, choose(every, tasks, limit)


def _more_configurations(whole: Sequence[Configuration], wanted: Sequence[Configuration]) -> Sequence[str]:
    """Say so if the folder has configurations that are not asked for; references come by themselves."""
    named = {one.spec for one in wanted}
    more = sum(one.spec not in named and not one.policy.reads_answer for one in whole)
    return (f"this folder compares {len(whole)} configurations, {more} more than this command names",) * bool(
        more
    )


def _kept(others: Mapping[str, int]) -> Sequence[str]:
    return [
        f"{count} answers of former runs are kept in this folder, marked as old, and not shown: {reason}"
        for reason, count in others.items()
    ]
