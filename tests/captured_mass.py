"""How much attention the blocks hold that `attnpred` chooses: `python tests/captured_mass.py`.

The embedded model answers questions, or a Whisper (`--model`) writes down recordings (`--data`), from the
full cache. For each decode step, layer and query head, the table says what part of the attention the entries
receive that each predictor chooses, in per cent, in the mean over steps that do not read everything. The
history follows what these steps would have seen: attention over what was read, and all of it in each fifth
step. `dense history` is the same if every step saw everything. `best blocks` and `best entries` know the
attention of the step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from attention_traces import Trace, demo_traces, speech_traces
from kvprune_strategies import attention_blocks as blocks
from kvprune_strategies.attnpred import AttnPred
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kvprune
from kvprune import StepView, scoring


def step_view(attention: Tensor, keys: Tensor, taken: int, rank: int) -> StepView:
    """Return the view of a step; predictors look at the history alone, so it has no queries."""
    heads, entries = attention.shape[1:]
    return StepView(
        queries_of=lambda: torch.zeros(1, heads, 1),
        text_rows=1,
        keys=keys,
        values=keys,
        slots_of=lambda: torch.arange(entries)[None, None],
        readable_of=lambda: torch.ones(1, 1, entries, dtype=torch.bool),
        number_of=lambda: torch.tensor(taken),
        taken=taken,
        layer_idx=rank,
        rank=rank,
        num_layers=1,
        scaling=1.0,
        unrestricted=True,
    )


def held(attention: Tensor, mask: Tensor) -> Tensor:
    """Return the part of the attention ``[1, Hq, K]`` that KV heads read, bool ``[1, Hkv, K]``."""
    group = attention.shape[1] // mask.shape[1]
    return (attention * mask.repeat_interleave(group, dim=1)).sum(-1)  # [1, Hq]


def captured(policy: AttnPred, trace: Trace, kv_heads: int, *, dense: bool) -> Iterator[float]:
    """Yield the part of the attention that each step captures that does not read everything."""
    state = trace.state
    for taken, row in enumerate(trace.rows):
        attention = row[None]  # [1, Hq, K]
        keys = torch.zeros(1, kv_heads, attention.shape[-1], 1)
        step = step_view(attention, keys, taken, trace.rank)
        read = policy.attend(step, state)
        seen = attention
        if read is not None:
            mask = read.mask.expand(-1, kv_heads, -1)
            part = held(attention, mask)
            yield float(part.mean())
            if not dense:
                spread = mask.repeat_interleave(attention.shape[1] // kv_heads, dim=1)
                seen = attention * spread / part.clamp(min=1e-9)[..., None]
        state = policy.observe(step, seen, state)[0]


def best(policy: AttnPred, trace: Trace, kv_heads: int, *, entries: bool) -> Iterator[float]:
    """Yield what the entries, or whole blocks, hold that receive most in each step."""
    for taken, row in enumerate(trace.rows):
        if policy.interval and (taken + 1) % policy.interval == 0:
            continue
        attention = row[None]
        by_head = scoring.by_kv_head(attention, kv_heads)  # [1, Hkv, K]
        if not entries:
            size = policy.block
            padded = blocks.pooled(by_head[:, :, None], trace.state, size)[:, :, 0]  # [1, Hkv, P], largest
            total = torch.zeros_like(padded)
            block = trace.state.get(blocks.ENTRY)
            if block is None:
                block = (torch.arange(by_head.shape[-1]) // size)[None, None]
            block = block.expand_as(by_head)
            total.scatter_add_(-1, block.clamp(min=0), by_head.masked_fill(block < 0, 0))
            by_head = blocks.spread(total, trace.state, size, by_head.shape[-1])
        view = step_view(attention, torch.zeros(1, kv_heads, attention.shape[-1], 1), taken, trace.rank)
        count = policy.budget.resolve(attention.shape[-1])
        yield float(held(attention, view.best(by_head, count).mask).mean())


def main() -> None:
    """Record, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a Whisper; by default, the embedded model")
    parser.add_argument("--data", type=Path, help="JSON-lines file of recordings; by default, the demo's")
    parser.add_argument("--count", type=int, default=8, help="questions of each task, or recordings")
    parser.add_argument("--weights", help="of the network; by default, demo or whisper-base")
    parser.add_argument("--keep-ratios", default="0.25,0.1,0.05")
    options = parser.parse_args()
    weights = options.weights or ("demo" if options.model is None else "whisper-base")
    first = kvprune.get_policy(f"attnpred:weights={weights}")
    assert isinstance(first, AttnPred)
    if options.model is None:
        calls, kv_heads = list(demo_traces(first, count=options.count, seed=0, pool=False)), 2
    else:
        data = options.data or kvprune.demo.speech_data()
        calls = list(speech_traces(first, options.model, data, limit=options.count, pool=False))
        kv_heads = calls[0][0].rows[0].shape[0]
    print(table(calls, kv_heads, weights, [float(ratio) for ratio in options.keep_ratios.split(",")]))


def table(calls: Sequence[Sequence[Trace]], kv_heads: int, weights: str, ratios: Sequence[float]) -> str:
    """Return the table as text."""
    traces = [trace for call in calls for trace in call]
    shown = Table("chosen by", *(f"{ratio:.0%}" for ratio in ratios), "dense history", box=None)

    def mean(policies: Sequence[AttnPred], rule: str, **how: bool) -> list[str]:
        means = []
        for policy in policies:
            found = [
                part
                for trace in traces
                for part in (
                    captured(policy, trace, kv_heads, **how)
                    if rule == "captured"
                    else best(policy, trace, kv_heads, **how)
                )
            ]
            means.append(f"{100 * sum(found) / len(found):.1f}")
        return means

    with torch.inference_mode():
        for predictor in ("last", "mean", "ema", "cnn"):
            named = f",weights={weights}" if predictor == "cnn" else ""
            policies = [policy_of(f"keep_ratio={ratio},predictor={predictor}{named}") for ratio in ratios]
            dense = mean(policies, "captured", dense=True)
            shown.add_row(predictor, *mean(policies, "captured", dense=False), " / ".join(dense))
        policies = [policy_of(f"keep_ratio={ratio},predictor=last") for ratio in ratios]
        shown.add_row("best blocks", *mean(policies, "best", entries=False), "")
        shown.add_row("best entries", *mean(policies, "best", entries=True), "")
    console = Console(width=110)
    with console.capture() as capture:
        console.print(shown)
    steps = sum(len(trace.rows) for trace in traces) // len({trace.rank for trace in traces})
    return f"{len(calls)} answers, {steps} steps\n{capture.get()}"


def policy_of(options: str) -> AttnPred:
    """Return `attnpred` with some options."""
    policy = kvprune.get_policy(f"attnpred:{options}")
    assert isinstance(policy, AttnPred)
    return policy


if __name__ == "__main__":
    main()
