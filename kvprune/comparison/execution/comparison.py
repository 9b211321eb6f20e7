"""The comparison as a whole: claims a results folder, runs what is missing, writes summary and figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvprune.comparison.data.packages import require
from kvprune.comparison.display.difference_notes import plan_note
from kvprune.comparison.display.figures import figures
from kvprune.comparison.execution.claim import claim, find_data
from kvprune.comparison.execution.run import Run
from kvprune.comparison.execution.weights_notes import weights_notes
from kvprune.comparison.plan.grid import DEFAULT_KEEP_RATIOS, DEFAULT_POLICIES, expand
from kvprune.comparison.plan.settings import Progress, Settings
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.storage.journal import write_atomically, write_json
from kvprune.comparison.storage.results_folder import SUMMARY, ResultsFolder
from kvprune.policy.spec import PolicySpec

__all__ = ["compare"]


def compare(
    policies: Sequence[str | PolicySpec] = DEFAULT_POLICIES,
    keep_ratios: Sequence[float] = DEFAULT_KEEP_RATIOS,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Compare policies on questions about pictures, or on recordings, and write a results folder.

    A results folder grows: policies, budgets, seeds and questions join those that it has, and only what is
    missing is computed. The summary is that of the whole folder. So the same call resumes an interrupted
    comparison, and a finished one is only summarised again, without loading the model.

    Answers that were computed with other ingredients (another model, another version of a policy, ...) are
    kept in the folder, but they are not part of the summary; a note says so, and why.

    Args:
        policies: Specs. A spec without a budget is combined with each of `keep_ratios`. The full cache is
            always compared, too.
        keep_ratios: Fractions of visible tokens to keep, in (0, 1].
        settings: Model, data and everything else; the embedded demo by default.
        on_progress: Called before the first and after each unit of work.
        on_note: Called with each sentence that a user should read; before anything is computed: which
            answers in the folder no longer count and why, what the folder has beyond this call, which
            weights were trained on another model, and which differences its number of examples can show;
            after answering, what was reused of the encoder.

    Raises:
        KVPruneError: If something is wrong with a policy, the data, the folder or the model; the class tells
            which: `PolicyOptionError`, `UnknownPolicyError`, `DataError`, `ResultsError`,
            `UnsupportedModelError`, ...
        ModuleNotFoundError: If an optional dependency is missing; the message says how to install it.
    """
    settings = settings or Settings()
    require("scipy", "matplotlib", "PIL")
    wanted, data = expand(policies, keep_ratios), find_data(settings)
    with ResultsFolder(settings.output) as folder:
        claimed = claim(folder, wanted, data, settings, on_note)
        for note in weights_notes(claimed):
            on_note(note)
        run = Run(folder, claimed, on_progress)
        if not run.is_answered:
            on_note(plan_note(len(claimed.examples), claimed.examples[0].kind))
        run.answer()
        if run.encoder_note is not None:
            on_note(run.encoder_note)
        run.time()
        summary = run.summary()
        write_json(folder.path / SUMMARY, summary.to_dict())
        for name, picture in figures(summary).items():
            write_atomically(folder.path / name, picture)
    return summary
