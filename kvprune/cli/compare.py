"""The command that compares policies and budgets on a model and its data: compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from kvprune.cli import compare_options as options
from kvprune.cli.common import (
    Debug,
    hide_progress_bars,
    load_quietly,
    make_console,
    one_line_errors,
    read_ratios,
    say,
)
from kvprune.text import printable_json

if TYPE_CHECKING:
    from kvprune.comparison import Settings

__all__ = ["compare"]


def compare(
    policy: options.Policies = None,
    every: options.Every = False,
    keep_ratios: options.KeepRatios = "0.5,0.25,0.1,0.05",
    model: options.Model = None,
    guide: options.Guide = None,
    data: options.Data = None,
    demo: options.Demo = "pictures",
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    output: options.Output = Path("kvprune-results"),
    batch_size: options.BatchSize = 16,
    max_new_tokens: options.MaxNewTokens = None,
    reread: options.Reread = True,
    draws: options.Draws = 1,
    against: options.Against = "trim",
    answer_attention: options.AnswerAttention = True,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    attn_implementation: options.AttnImplementation = None,
    repetitions: options.Repetitions = 5,
    trust_remote_code: options.TrustRemoteCode = False,
    json_output: options.Json = False,
    debug: Debug = False,
) -> None:
    """Compare policies and budgets on the same questions.

    Prints accuracy, kept tokens, bytes and speed of each, next to the full cache, and keeps all results in a
    folder.
    """
    with one_line_errors(debug, resumes=True):
        from kvprune.comparison import Settings
        from kvprune.comparison import compare as run
        from kvprune.comparison.display.console import progress_bar, show_summary

        settings = Settings(
            model=model,
            guide=guide,
            data=data,
            demo=demo,  # type: ignore[arg-type]  # checked by Settings
            tasks=None if tasks is None else tuple(part.strip() for part in tasks.split(",")),
            limit=limit,
            seed=seed,
            output=output,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            reread=reread,
            draws=draws,
            against=against,
            answer_attention=answer_attention,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            repetitions=repetitions,
            trust_remote_code=trust_remote_code,
        )
        hide_progress_bars()
        ratios = read_ratios(keep_ratios)
        policies = _specs(policy or (), settings if every else None)
        with redirect_stdout(sys.stderr), progress_bar() as on_progress:  # plugins may print
            summary = run(policies, ratios, settings, on_progress, say)
        if json_output:
            print(printable_json(summary.to_dict()))
        else:
            show_summary(summary, output, make_console(), ranked=every)


def _specs(given: Sequence[str], every: Settings | None) -> list[str]:
    """Return the specs to compare: those given, or the default ones; with settings, all that can run."""
    from kvprune.comparison import DEFAULT_POLICIES, every_policy
    from kvprune.comparison.execution.support import adapter_for

    if every is None:
        return list(given or DEFAULT_POLICIES)
    found = every_policy(load_quietly(), adapter_for(every))
    for name, why in found.left_out.items():
        say(f"left out: {name} {why}")
    return [*DEFAULT_POLICIES, *found.specs, *given]
