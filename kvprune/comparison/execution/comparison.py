"""The comparison as a whole: claims a results folder, runs what is missing, writes summary and figure."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvprune.comparison.data.examples import Example, digest
from kvprune.comparison.display import plot
from kvprune.comparison.execution.run import Run
from kvprune.comparison.plan.devices import resolve_device
from kvprune.comparison.plan.grid import DEFAULT_KEEP_RATIOS, DEFAULT_POLICIES, Configuration, expand
from kvprune.comparison.plan.settings import Progress, Settings
from kvprune.comparison.statistics.summary import Summary
from kvprune.comparison.storage import sources
from kvprune.comparison.storage.journal import write_atomically, write_json
from kvprune.comparison.storage.recorded_settings import describe
from kvprune.comparison.storage.results_folder import PLOT, SUMMARY, ResultsFolder
from kvprune.policy.spec import PolicySpec

__all__ = ["compare", "require"]


def compare(
    policies: Sequence[str | PolicySpec] = DEFAULT_POLICIES,
    keep_ratios: Sequence[float] = DEFAULT_KEEP_RATIOS,
    settings: Settings | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Compare policies on questions about pictures, and write a results folder.

    The same call resumes an interrupted comparison. A finished one is only summarised again, without
    loading the model.

    Args:
        policies: Specs. A spec without a budget is combined with each of `keep_ratios`. The full cache is
            always compared, too.
        keep_ratios: Fractions of visible tokens to keep, in (0, 1].
        settings: Model, data and everything else; the embedded demo by default.
        on_progress: Called before the first and after each unit of work.

    Raises:
        KVPruneError: If something is wrong with a policy, the data, the folder or the model; the class tells
            which: `PolicyOptionError`, `UnknownPolicyError`, `DataError`, `ResultsError`,
            `UnsupportedModelError`, ...
        ModuleNotFoundError: If an optional dependency is missing; the message says how to install it.
    """
    settings = settings or Settings()
    require("scipy", "matplotlib", "PIL")
    configurations = expand(policies, keep_ratios)
    with ResultsFolder(settings.output) as folder:
        examples = _claim(folder, configurations, settings)
        run = Run(folder, configurations, examples, settings, on_progress)
        run.answer()
        run.time()
        summary = run.summary()
        write_json(folder.path / SUMMARY, summary.to_dict())
        write_atomically(folder.path / PLOT, plot.render(summary))
    return summary


def require(*modules: str) -> None:
    """Raise now, and not after hours of work, if an optional dependency is missing.

    Raises:
        ModuleNotFoundError: If a module cannot be imported; names it and the command that installs it.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'this needs {module}, which is not installed: pip install "kvprune[demo]"', name=module
            ) from error


def _claim(
    folder: ResultsFolder, configurations: Sequence[Configuration], settings: Settings
) -> tuple[Example, ...]:
    """Claim the folder for this run and return the examples to ask."""
    examples: tuple[Example, ...] | None = None
    limit = settings.limit
    if settings.data is None:
        tasks = sources.check_demo_tasks(settings.tasks)
        limit = limit or sources.DEFAULT_LIMIT
    else:
        examples = sources.own_examples(settings.data, settings.tasks, limit)
        tasks = tuple(dict.fromkeys(example.task for example in examples))
    exact = replace(settings, tasks=tasks, limit=limit, device=resolve_device(settings.device))
    folder.claim(describe(configurations, exact))
    if examples is None:
        examples = sources.demo_examples(folder.path, tasks, limit or sources.DEFAULT_LIMIT, settings.seed)
    folder.pin("data_sha256", digest(examples))
    return examples
