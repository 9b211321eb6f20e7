"""The options of ``kvprune compare``: type and help text of each, in the order in which --help lists them.

The defaults stand in the signature of the command; a test compares them with those of the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvprune.cli.common import TrustRemoteCode

__all__ = [
    "Against",
    "AnswerAttention",
    "AttnImplementation",
    "BatchSize",
    "Data",
    "Demo",
    "Device",
    "Draws",
    "Dtype",
    "Every",
    "Guide",
    "Json",
    "KeepRatios",
    "Limit",
    "MaxNewTokens",
    "Model",
    "Output",
    "Policies",
    "Repetitions",
    "Reread",
    "Seed",
    "Tasks",
    "TrustRemoteCode",
]

Policies = Annotated[
    list[str] | None,
    typer.Option(
        help="Spec such as trim or random:keep_tokens=32; repeatable. A spec that states no budget runs at "
        "each of --keep-ratios. Default: lossless, fastv, divprune, trim, and uniform, random, norm, keydiff "
        "and snapkv with reach=onward. The full cache is always compared, too."
    ),
]
Every = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Add every built-in policy that takes a keep_ratio (with reach=onward if it has that option) to "
        "the default ones and those of --policy, and rank all of them within each budget. Says which other "
        "ones are left out.",
    ),
]
KeepRatios = Annotated[str, typer.Option(help="Fractions of visible tokens kept, separated by commas.")]
Model = Annotated[str | None, typer.Option(help="Hub id or folder. Default: the demo's.")]
Guide = Annotated[
    str | None,
    typer.Option(
        help="Hub id or folder of a model that guides policies such as guided, in rows of their own; "
        "embedded is that of the embedded model, self is none. Default: embedded for the embedded model."
    ),
]
Data = Annotated[
    Path | None, typer.Option(help="JSON-lines file of questions or recordings. Default: the demo's.")
]
Tasks = Annotated[str | None, typer.Option(help="Tasks, separated by commas. Default: all.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Examples per task. Default: all of --data, or 32 of each task of the demo."),
]
Seed = Annotated[
    int, typer.Option(help="Seed for policies that draw random numbers, and for the demo's questions.")
]
Output = Annotated[
    Path,
    typer.Option(
        help="Results folder. The same command continues where it was interrupted, and another one adds what "
        "is new."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Examples per call of generate.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Most new tokens of an answer. Default: 16 of pictures; of speech, what the model permits."
    ),
]
Reread = Annotated[
    bool,
    typer.Option(
        "--reread/--no-reread",
        help="Read the last token of each prompt again from the pruned cache, so that one-token answers show "
        "what was dropped.",
    ),
]
Demo = Annotated[
    str,
    typer.Option(
        help="Which demo runs where --data is not given: pictures (with the embedded model) or speech (with "
        "openai/whisper-base, or --model)."
    ),
]
Draws = Annotated[
    int, typer.Option(help="Seeds for each policy that draws random numbers: --seed, --seed + 1, ...")
]
Against = Annotated[
    str,
    typer.Option(
        help="Policy, by name or by spec without budget, that others are compared with at the same budget."
    ),
]
AnswerAttention = Annotated[
    bool,
    typer.Option(
        "--answer-attention/--no-answer-attention",
        help="Add the reference row that may look at the answer of the full cache, at each keep ratio.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="Device, such as cpu or cuda. Default: cuda if available, else cpu.")
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, float64, bfloat16 or float16.")]
AttnImplementation = Annotated[
    str | None, typer.Option(help="eager, sdpa, ... Default: what transformers chooses.")
]
Repetitions = Annotated[int, typer.Option(help="Repetitions of the timing; 0 turns it off.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print summary.json on standard output, and nothing else there.")
]
