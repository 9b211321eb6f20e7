"""Commands that run models on data: compare, verify."""

from __future__ import annotations

import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from kvprune.cli.common import (
    Debug,
    load_quietly,
    make_console,
    one_line_errors,
    quieten_transformers,
    say,
)
from kvprune.errors import PolicyOptionError

__all__ = ["compare", "verify"]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files that come with the model; read them first, they can do whatever you can.",
    ),
]


def compare(
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Spec such as trim or random:keep_tokens=32; repeatable. One that states no budget is "
            "crossed with --keep-ratios. Default: lossless, fastv, divprune, trim, and uniform, random, "
            "norm, keydiff and snapkv with reach=onward. The full cache is always compared, too."
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Add every built-in policy that takes a keep_ratio, with reach=onward where it has that, to "
            "the default ones and those of --policy, and rank them within each budget.",
        ),
    ] = False,
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
    late_tokens: Annotated[
        int | None,
        typer.Option(
            help="Last tokens of each prompt that are decoded after pruning, so that one-token answers show "
            "what policies drop that prune after prefill. Default: 0; 1 with --all.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored), float32, float64, bfloat16 or float16.")
    ] = "auto",
    attn_implementation: Annotated[
        str | None, typer.Option(help="eager, sdpa, ... Default: what transformers chooses.")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Repetitions of the timing; 0 times nothing.")] = 5,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print summary.json on standard output, and nothing else there.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare policies and budgets: accuracy, kept tokens, bytes and speed, on the same questions."""
    with one_line_errors(debug, resumes=True):
        from kvprune.comparison import DEFAULT_POLICIES, Settings, every_policy
        from kvprune.comparison import compare as run
        from kvprune.comparison.display.console import progress_bar, show_summary

        settings = Settings(
            model=model,
            data=data,
            tasks=None if tasks is None else tuple(part.strip() for part in tasks.split(",")),
            limit=limit,
            seed=seed,
            output=output,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            late_tokens=int(every) if late_tokens is None else late_tokens,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            repetitions=repetitions,
            trust_remote_code=trust_remote_code,
        )
        quieten_transformers()
        ratios = [_ratio(part) for part in re.split("[,;]", keep_ratios)]
        policies = list(policy or DEFAULT_POLICIES)
        if every:
            found = every_policy(load_quietly())
            policies = [*DEFAULT_POLICIES, *found.specs, *(policy or ())]
            for name, why in found.left_out.items():
                say(f"left out: {name} {why}")
        with redirect_stdout(sys.stderr), progress_bar() as on_progress:  # plugins may print
            summary = run(policies, ratios, settings, on_progress)
        if json_output:
            print(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
        else:
            show_summary(summary, output, make_console(), ranked=every)


def verify(
    results: Annotated[Path, typer.Argument(help="Results folder that `kvprune compare` wrote.")],
    sample: Annotated[
        int, typer.Option(help="Batches under a configuration to run again; each also runs uncompressed.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the draw of these batches.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="Run everything again.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the verification as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Run a part of a comparison again and say whether it reproduces; changes nothing. Exit code 1: no."""
    with one_line_errors(debug):
        from kvprune.comparison import verify as run
        from kvprune.comparison.display.console import progress_bar

        quieten_transformers()
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


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PolicyOptionError(
            f"keep ratio {text.strip()!r} is no number; expected fractions such as 0.5,0.25"
        ) from None
