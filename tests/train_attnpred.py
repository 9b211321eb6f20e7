"""Trains the network of `attnpred`: `python tests/train_attnpred.py --output FILE.safetensors`.

The embedded model answers questions about pictures that it was trained on, or a Whisper (`--model`) writes
down recordings (`--data`), both from the full cache. The network learns to say the attention of a step from
the rows before it, pooled to blocks. The last sixth of the answers is held out. The network is trained for
one history and one block; heads, layers and the number of blocks may differ from those of the model.

In use, the network sees rows of steps that read little. So in training, up to four of the latest rows of a
history keep only the blocks that were largest in the row before, as after that many steps without correction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attention_traces import Trace, demo_traces, speech_traces
from kvprune_strategies import attention_predictors as predictors
from kvprune_strategies.attnpred import AttnPred
from torch import Tensor

from kvprune.errors import DataError
from kvprune.policy.weights import save_weights

BATCH, WIDTH = 32, 64
"""Histories of a step, and blocks of a history: a run of them, drawn at random, where there are more."""

HELD_OUT = 6
"""One in so many answers is held out."""


def examples_of(calls: Sequence[Sequence[Trace]], history: int) -> tuple[Tensor, Tensor]:
    """Return histories ``[n, M, P]`` and the rows that followed ``[n, P]``, of all heads and layers.

    Raises:
        DataError: If there is none.
    """
    before, after = [], []
    for trace in (trace for traces in calls for trace in traces if trace.rows):
        rows = torch.cat([trace.state["history"][0].float(), torch.stack(trace.rows, 1)], dim=1)
        for step in range(len(trace.rows)):
            before.append(rows[:, step : step + history])
            after.append(rows[:, step + history])
    if not before:
        raise DataError("there is no decode step to learn from; give more examples, or longer answers")
    return torch.cat(before), torch.cat(after)


def sparse(history: Tensor, random: torch.Generator, most: int = 4) -> Tensor:
    """Return histories ``[n, M, P]`` whose latest rows look as steps that read little leave them."""
    history = history.clone()
    rows = history.shape[1]
    for row in history:
        steps = int(torch.randint(0, min(most, rows - 1) + 1, (), generator=random))
        share = float(torch.empty(()).uniform_(0.05, 0.4, generator=random))
        count = max(1, round(share * row.shape[-1]))
        for step in range(rows - steps, rows):
            kept = torch.zeros_like(row[step]).scatter_(0, row[step - 1].topk(count).indices, 1)
            total = row[step].sum()
            row[step] *= kept
            row[step] *= total / row[step].sum().clamp(min=1e-3 * total)  # a softmax over fewer entries
    return history.clamp(max=1)


def captured(expected: Tensor, row: Tensor, share: float = 0.1) -> float:
    """Return how much of what the best blocks receive the expected ones do, for equally many blocks."""
    count = max(1, round(share * row.shape[-1]))
    best = row.topk(count, dim=-1).values.sum(-1)
    found = row.gather(-1, expected.topk(count, dim=-1).indices).sum(-1)
    return float((found / best.clamp(min=1e-9)).mean())


def judge(weights: Mapping[str, Tensor], history: Tensor, row: Tensor) -> dict[str, tuple[float, float]]:
    """Return the mean squared error and the captured share of each predictor."""
    with torch.no_grad():
        parts = [predictors.network(weights, part[None])[0] for part in history.split(64)]
        rivals = {
            "cnn": torch.cat(parts),
            "last": predictors.last(history[None])[0],
            "mean": predictors.mean(history[None])[0],
            "ema": predictors.ema(history[None], AttnPred.decay)[0],
        }
    return {
        name: (float(((expected - row) ** 2).mean()), captured(expected, row))
        for name, expected in rivals.items()
    }


def fit(
    history: Tensor, row: Tensor, check: tuple[Tensor, Tensor], *, steps: int, rate: float, seed: int
) -> dict[str, Tensor]:
    """Return the weights with the least squared error on the examples to check, seen every 100 steps."""
    random = torch.Generator().manual_seed(seed)
    weights = {name: tensor.clone().requires_grad_() for name, tensor in predictors.initial_weights().items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, least, started = weights, float("inf"), time.monotonic()
    for step in range(1, steps + 1):
        drawn = torch.randint(len(history), (BATCH,), generator=random)
        before, after = sparse(history[drawn], random), row[drawn]
        blocks = before.shape[-1]
        if blocks > WIDTH:
            first = int(torch.randint(0, blocks - WIDTH + 1, (), generator=random))
            before, after = before[..., first : first + WIDTH], after[..., first : first + WIDTH]
        loss = ((predictors.network(weights, before[None])[0] - after) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            error, share = judge(weights, *check)["cnn"]
            print(
                f"step {step:5}  error {error:.3e}  captured {share:.3f}  {time.monotonic() - started:.0f} s"
            )
            if error < least:
                least = error
                best = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return best


def main() -> None:
    """Record, train, judge and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--model", type=Path, help="folder of a Whisper; by default, the embedded model")
    parser.add_argument("--data", type=Path, help="JSON-lines file of recordings that nothing is measured on")
    parser.add_argument("--count", type=int, default=24, help="questions of each task, or recordings")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--history", type=int, default=AttnPred.history)
    parser.add_argument("--block", type=int, default=AttnPred.block)
    options = parser.parse_args()
    policy = AttnPred(weights="fresh", keep_ratio=0.1, history=options.history, block=options.block)
    if options.model is None:
        recorded = demo_traces(policy, count=options.count, seed=options.seed, split="train")
    elif options.data is None:
        parser.error("--model needs --data, recordings to write down")
    else:
        recorded = speech_traces(policy, options.model, options.data, limit=options.count)
    calls = list(recorded)
    learn = examples_of([one for number, one in enumerate(calls) if number % HELD_OUT], options.history)
    check = examples_of(calls[::HELD_OUT], options.history)
    check = (check[0][: 64 * 24], check[1][: 64 * 24])
    print(f"{len(calls)} answers; {len(learn[0])} histories to learn from, {len(check[0])} to check")
    weights = fit(*learn, check, steps=options.steps, rate=options.rate, seed=options.seed)
    judged = judge(weights, *check)
    for name, (error, share) in judged.items():
        print(f"{name:5} error {error:.3e}  captured {share:.3f}")
    training = {
        "model": "the embedded model" if options.model is None else options.model.name,
        "answers": len(calls),
        "histories": len(learn[0]),
        "steps": options.steps,
        "rate": options.rate,
        "seed": options.seed,
        "error": {name: error for name, (error, _) in judged.items()},
    }
    saved = save_weights(options.output, policy, weights, {}, training)
    print(f"{saved.path} (digest {saved.digest}, {saved.path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
