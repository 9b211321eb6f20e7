"""One run of a comparison: answers and times whatever its results folder does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvprune.comparison.data.examples import Example
from kvprune.comparison.execution.batches import ask, batches, load_generator
from kvprune.comparison.execution.generation import Generator
from kvprune.comparison.execution.timing import measure
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import REFERENCE, Configuration
from kvprune.comparison.plan.settings import Progress, Settings
from kvprune.comparison.statistics.summary import Summary, summarise
from kvprune.comparison.storage.answers import Answer, to_row
from kvprune.comparison.storage.results_folder import ResultsFolder
from kvprune.comparison.storage.timings import read_laps

__all__ = ["Run"]


class Run:
    """One run of a comparison. Knows what is done and what is left; loads the model only if it is needed.

    Args:
        folder: The results folder, already claimed for this run.
        configurations: What is compared, the full cache first.
        examples: The questions.
        settings: The settings of the run.
        on_progress: Called at once, and after each unit of work.

    Raises:
        ResultsError: If a finished line of the folder is damaged or does not belong to this run.
    """

    def __init__(
        self,
        folder: ResultsFolder,
        configurations: Sequence[Configuration],
        examples: Sequence[Example],
        settings: Settings,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._folder, self._settings = folder, settings
        self._configurations, self._examples = configurations, examples
        self._specs = [one.spec for one in configurations]
        self._answers = folder.answers(self._specs, [example.id for example in examples])
        rows = folder.timings.recover()
        self._laps = read_laps(str(folder.timings.path), rows, self._specs)
        self._batches = batches(examples, settings.batch_size)
        self._repetitions = [number for number in range(settings.repetitions) if number not in self._laps]
        self._generator: Generator | None = None
        self._on_progress = on_progress
        answered = sum(not self._is_open(batch, one) for batch in self._batches for one in configurations)
        round_ = len(configurations) + 1
        timed = round_ * len(self._laps)
        to_time = round_ * (len(self._repetitions) + 1) if self._repetitions else 0
        self._done = answered + timed
        self._total = len(self._batches) * len(configurations) + timed + to_time
        self._report("starting" if self._done < self._total else "nothing left to do")

    def answer(self) -> None:
        """Answer every example under every configuration, batch by batch, the full cache first."""
        for batch in self._batches:
            pending = [one for one in self._configurations if self._is_open(batch, one)]
            if not pending:
                continue
            inputs = self._model().encode(batch)
            for one in pending:
                fresh = self._ask(batch, inputs, one)
                self._folder.results.append([to_row(answer) for answer in fresh])
                self._answers.update({answer.key: answer for answer in fresh})
                self._done += 1
                self._report("answering")

    def time(self) -> None:
        """Time the repetitions that are missing, on one batch of examples spread evenly over the data."""
        if not self._repetitions:
            return
        size = min(self._settings.batch_size, len(self._examples))
        spread = [self._examples[number * len(self._examples) // size] for number in range(size)]
        rows = measure(
            self._model(),
            self._model().encode(spread),
            self._configurations,
            repetitions=self._repetitions,
            seed=self._settings.seed,
            on_lap=self._lap,
        )
        for row in rows:
            self._folder.timings.append([row])
            self._laps.update(read_laps("timing", [row], self._specs))

    def summary(self) -> Summary:
        """Return the summary of all answers and times; every answer must be there."""
        return summarise(
            self._configurations,
            self._examples,
            self._answers,
            {number: lap for number, lap in self._laps.items() if self._settings.repetitions},
            batch_size=min(self._settings.batch_size, len(self._examples)),
            device=resolve_device(self._settings.device),
            reread=self._settings.reread,
            against=self._settings.against,
        )

    def _ask(self, batch: Sequence[Example], inputs: Mapping[str, Any], one: Configuration) -> list[Answer]:
        """Answer a batch under one configuration; return the answers that the folder does not have yet."""
        known = [self._answers.get((REFERENCE, None, example.id)) for example in batch]
        full = {answer.id: answer for answer in known if answer is not None}
        fresh = ask(self._model(), batch, inputs, one, self._settings.seed, full)
        return [answer for answer in fresh if answer.key not in self._answers]

    def _is_open(self, batch: Sequence[Example], one: Configuration) -> bool:
        """Whether the folder lacks an answer of a configuration to an example of a batch."""
        return any((one.spec, None, example.id) not in self._answers for example in batch)

    def _model(self) -> Generator:
        """Return the model; loads it at the first call, so that a finished comparison never does."""
        if self._generator is None:
            generator = load_generator(self._settings, self._examples[0].kind)
            generator.check(self._examples)  # before anything is computed
            self._generator = generator
        return self._generator

    def _lap(self) -> None:
        self._done += 1
        self._report("timing")

    def _report(self, phase: str) -> None:
        self._on_progress(Progress(phase, self._done, self._total))
