"""The command that trains the weights of a policy: train."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from kvprune.cli.common import (
    Debug,
    TrustRemoteCode,
    hide_progress_bars,
    hide_warnings,
    one_line_errors,
)
from kvprune.text import printable

__all__ = ["train"]


def train(
    policy: Annotated[str, typer.Argument(help="Spec of the policy, without weights, such as quecc:k=4.")],
    out: Annotated[Path, typer.Option(help="File to write the weights to; it ends in .safetensors.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id or folder of the model. Default: the demo's, or Whisper base for recordings."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON-lines file of questions or recordings, as for `kvprune compare`. Default: the demo's."
        ),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Another such file, to validate with. Default: a part of --data.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            help="Share of the pictures or recordings of --data to validate with, without --validation."
        ),
    ] = 0.1,
    answers: Annotated[
        str,
        typer.Option(
            help="What to learn: full (what the model answers with all tokens), or data (the file's)."
        ),
    ] = "full",
    pictures: Annotated[int, typer.Option(help="Pictures of the demo to draw.")] = 1000,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Questions or recordings in each step.")] = 64,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    attention: Annotated[
        float, typer.Option(help="Weight of the distance of cross-attention outputs in the loss.")
    ] = 0.0,
    every: Annotated[int, typer.Option(help="Steps between two validations and checkpoints.")] = 50,
    patience: Annotated[
        int,
        typer.Option(help="Validations without a better one that end the training; 0: it never ends early."),
    ] = 10,
    seed: Annotated[
        int, typer.Option(help="Seed of pictures, and of the order of questions or recordings.")
    ] = 0,
    device: Annotated[
        str | None, typer.Option(help="Device, such as cpu or cuda. Default: cuda if available, else cpu.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: auto (as stored), float32, bfloat16.")] = "auto",
    full_precision: Annotated[
        bool, typer.Option("--full-precision", help="Write the weights in float32, not float16.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Train the weights of a policy on a frozen model.

    The policy learns to leave the answers of the model as they are. Prints the curve of validations, and the
    digest of the weights. The same command continues where it stopped.
    """
    with one_line_errors(debug, resumes=True):
        from kvprune.comparison.data.packages import require
        from kvprune.comparison.display.console import progress_bar
        from kvprune.comparison.plan.settings import Progress
        from kvprune.training.command import Asked, learn
        from kvprune.training.recipe import Recipe

        require("matplotlib", who="the picture of the curve")
        hide_progress_bars()
        warm_up = min(50, steps // 10)
        recipe = Recipe(
            steps=steps, rate=rate, warm_up=warm_up, attention=attention, every=every, patience=patience
        )
        asked = Asked(
            policy=policy,
            out=out,
            model=model,
            data=data,
            validation=validation,
            held_out=held_out,
            answers=answers,
            pictures=pictures,
            batch=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            half=not full_precision,
            trust_remote_code=trust_remote_code,
        )
        with redirect_stdout(sys.stderr), hide_warnings(), progress_bar() as bar:
            done = learn(asked, recipe, lambda what, count, total: bar(Progress(what, count, total)))
    for row in done.curve:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    ended = ", which is why training ended early" if done.stopped_early else ""
    print(f"best validation after step {done.best_step}{ended}")
    print(printable(f"wrote {done.file.path}, digest {done.file.digest}"))
