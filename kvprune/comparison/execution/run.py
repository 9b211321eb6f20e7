"""One run of a comparison: answers and times whatever its results folder does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from kvprune.comparison.data.examples import Example
from kvprune.comparison.execution.batches import ask, load_generator
from kvprune.comparison.execution.claim import Claimed
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.timing import measure
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Progress
from kvprune.comparison.statistics.summary import Summary, summarise
from kvprune.comparison.storage.answer_lines import answer_rows
from kvprune.comparison.storage.recorded_grid import Batch
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.comparison.storage.timings import Laps, read_timings, timing_row

__all__ = ["Run"]

_Session = tuple[tuple[Configuration, ...], list[int]]
"""Configurations that are timed in turns, and the numbers of their repetitions."""


class Run:
    """One run of a comparison. Knows what is done and what is left; loads the model only if it is needed.

    Args:
        folder: The results folder, already locked.
        claimed: What the folder holds for this run; see `claim`.
        on_progress: Called at once, and after each unit of work.

    Raises:
        ResultsError: If a finished line of the folder is damaged or does not belong to this run.
    """

    def __init__(
        self, folder: ResultsFolder, claimed: Claimed, on_progress: Callable[[Progress], None]
    ) -> None:
        self._folder, self._settings, self._grid = folder, claimed.settings, claimed.grid
        self._configurations, self._examples = claimed.configurations, claimed.examples
        self._by_id = {one.id: one for one in claimed.examples}
        self._addresses = claimed.grid.addresses()
        self._answers = claimed.answers
        self._laps: dict[int, Laps] = dict(claimed.timings.laps)
        self._timed_batch = self._batch_to_time(claimed.timings.examples)
        self._sessions = self._plan_sessions(claimed.timings.next)
        self._generator: Generator | None = None
        self._on_progress = on_progress
        self._drawing = {spec for spec, seed, _ in self._answers if seed is not None}
        self._answered = sum(
            self._is_done(one, batch, seed)
            for batch in self._grid.batches
            for one in self._configurations
            for seed in (None, *self._grid.seeds)
        )
        self._timed = sum(len(laps) for laps in self._laps.values())
        # Each session begins with a round that is not counted; each round times the untouched model, too.
        self._to_time = self._timed + sum(
            (1 + len(configurations)) * (1 + len(numbers)) for configurations, numbers in self._sessions
        )
        self._report("starting" if self._done < self._total else "nothing left to do")

    def answer(self) -> None:
        """Answer every example under every configuration, batch by batch, the full cache first."""
        for batch in self._grid.batches:
            pending = [one for one in self._configurations if self._next_seed(one, batch) is not None]
            if not pending:
                continue
            examples = [self._by_id[name] for name in batch]
            inputs = self._model().encode(examples)
            for one in pending:
                self._answer_batch(one, batch, examples, inputs)

    @property
    def is_answered(self) -> bool:
        """Whether no answer is missing."""
        return all(
            self._next_seed(one, batch) is None
            for batch in self._grid.batches
            for one in self._configurations
        )

    @property
    def encoder_note(self) -> str | None:
        """Say how often the encoder ran for the answers of this run; None if nothing was answered."""
        if self._generator is None or not self._generator.encoder.computed:
            return None
        encoder = self._generator.encoder
        own = (
            f"; {', '.join(encoder.own)} ran it themselves, since they look inside it" if encoder.own else ""
        )
        return (
            f"The encoder ran {encoder.computed} times for answers, and its output was reused "
            f"{encoder.reused} times{own}. Times are taken end to end, with the encoder."
        )

    def time(self) -> None:
        """Time the repetitions that are missing, always the same batch of examples."""
        for configurations, numbers in self._sessions:
            inputs = self._model().encode([self._by_id[name] for name in self._timed_batch])
            rows = measure(
                self._model(),
                inputs,
                configurations,
                repetitions=numbers,
                seed=self._grid.seeds[0],
                on_lap=self._lap,
            )
            for measured in rows:
                row = timing_row(measured, self._addresses, self._timed_batch, self._grid.digests)
                self._folder.timings.append([row])
                self._laps |= read_timings("timing", [row], self._addresses, self._grid.digests).laps

    def summary(self) -> Summary:
        """Return the summary of all answers and times; every answer must be there."""
        return summarise(
            self._configurations,
            self._examples,
            self._answers,
            self._laps if self._settings.repetitions else {},
            batch_size=max(len(batch) for batch in self._grid.batches),
            device=resolve_device(self._settings.device),
            reread=self._settings.reread,
            against=self._settings.against,
        )

    def _answer_batch(
        self, one: Configuration, batch: Batch, examples: Sequence[Example], inputs: Mapping[str, Any]
    ) -> None:
        """Answer a batch under one configuration: once, or with each seed if its policy draws."""
        known = [self._answers.get((REFERENCE, None, name)) for name in batch]
        full = {answer.id: answer for answer in known if answer is not None}
        seed = self._next_seed(one, batch)
        while seed is not None:
            answers = ask(self._model(), examples, inputs, one, seed, full)
            drawn = answers[0].seed
            assert drawn in (None, seed), f"asked with seed {seed}, answered with seed {drawn}"
            fresh = [answer for answer in answers if answer.key not in self._answers]
            self._folder.results.append(answer_rows(self._addresses.of(one.spec, batch, drawn), fresh))
            self._answers.update({answer.key: answer for answer in fresh})
            if drawn is not None:
                self._drawing.add(one.spec)
            self._answered += 1
            self._report("answering")
            seed = self._next_seed(one, batch)

    def _next_seed(self, one: Configuration, batch: Batch) -> int | None:
        """Return the first seed with which a configuration has yet to answer a batch, None if there is none.

        Whether a policy draws is known once it has run. What it answers without drawing counts for all seeds.
        """
        if self._is_done(one, batch, None):
            return None
        return next((seed for seed in self._grid.seeds if not self._is_done(one, batch, seed)), None)

    def _is_done(self, one: Configuration, batch: Batch, seed: int | None) -> bool:
        """Whether the folder has the answers of a configuration, with this seed, to all of a batch."""
        return all((one.spec, seed, name) in self._answers for name in batch)

    def _batch_to_time(self, timed: Sequence[str] | None) -> tuple[str, ...]:
        """Return ids of the batch that was timed before, or of one spread evenly over the examples."""
        if timed is not None:
            return tuple(timed)
        names = [one.id for one in self._examples]
        size = min(self._settings.batch_size, len(names))
        return tuple(names[number * len(names) // size] for number in range(size))

    def _plan_sessions(self, number: int) -> list[_Session]:
        """Return what is left to time: neighbouring repetitions of the same configurations are one session.

        Args:
            number: Number of the first new repetition.
        """
        # A reference that reads the answer is no method: it is not timed.
        reference, *others = (one for one in self._configurations if not one.policy.reads_answer)
        done = {
            one.spec: sum(one.spec in laps for laps in self._laps.values()) for one in (reference, *others)
        }
        missing = {spec: self._settings.repetitions - count for spec, count in done.items()}
        sets: Iterator[tuple[Configuration, ...]] = (
            (reference, *(one for one in others if missing[one.spec] > turn))
            for turn in range(max(missing.values()))
        )
        sessions: list[_Session] = []
        for configurations, turns in groupby(sets):
            numbers = [number + turn for turn, _ in enumerate(turns)]
            sessions.append((configurations, numbers))
            number += len(numbers)
        return sessions

    def _model(self) -> Generator:
        """Return the model; loads it at the first call, so that a finished comparison never does."""
        if self._generator is None:
            generator = load_generator(self._settings, self._examples[0].kind)
            generator.check(self._examples)  # before anything is computed
            self._generator = generator
        return self._generator

    def _lap(self) -> None:
        self._timed += 1
        self._report("timing")

    @property
    def _done(self) -> int:
        return self._answered + self._timed

    @property
    def _total(self) -> int:
        """All units of work, as far as is known which policies draw."""
        runs = len(self._configurations) + (len(self._grid.seeds) - 1) * len(self._drawing)
        return len(self._grid.batches) * runs + self._to_time

    def _report(self, phase: str) -> None:
        self._on_progress(Progress(phase, self._done, self._total))
