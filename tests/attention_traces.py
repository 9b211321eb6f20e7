"""Records what text pays attention to while a model decodes from its full cache, for `attnpred`.

Shared by `train_attnpred.py`, which learns from such traces, and `captured_mass.py`, which measures on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kvprune_strategies import attention_blocks as blocks
from kvprune_strategies.attnpred import AttnPred
from torch import Tensor

import kvprune
from kvprune import DecodePolicy, HeldView, Selection, StepView, demo
from kvprune.comparison.data.examples import read_examples
from kvprune.comparison.execution.speech import SpeechGenerator
from kvprune.demo.evaluate import encode
from kvprune.demo.strokes import Split
from kvprune.policy import State

__all__ = ["Trace", "demo_traces", "speech_traces"]


@dataclass
class Trace:
    """The attention of one cross-attention layer while one answer was written.

    Args:
        rank: Index among the cross-attention layers.
        state: What `attnpred` prepared, ``[1, ...]`` by name.
        rows: Attention of each decode step, ``[Hq, K]`` in float32; if pooled, ``[Hq, P]``.
    """

    rank: int
    state: Mapping[str, Tensor]
    rows: list[Tensor] = field(default_factory=list)


def recorder(policy: AttnPred, into: list[Trace], *, pool: bool) -> DecodePolicy:
    """Return a policy that reads everything and appends to ``into`` what it sees.

    Args:
        policy: Prepares the states.
        into: Gets a trace of each layer after each prefill.
        pool: Whether rows are pooled to blocks.
    """
    now: dict[int, Trace] = {}

    @dataclass(frozen=True, kw_only=True)
    class Recorder(DecodePolicy):
        name = "recorder"
        needs = frozenset({"queries"})

        def prepare(self, view: HeldView) -> State:
            trace = Trace(view.layer.rank, policy.prepare(view))
            now[trace.rank] = trace
            into.append(trace)
            return {}

        def attend(self, step: StepView, state: State) -> Selection | None:
            return None

        def observe(self, step: StepView, attention: Tensor, state: State) -> tuple[State, None]:
            trace = now[step.rank]
            row = attention.float()[:, :, None]  # [1, Hq, 1, K]
            if pool:
                row = blocks.pooled(row, trace.state, policy.block)
            trace.rows.append(row[0, :, 0].clone())
            return state, None

    return Recorder()


def _recorded(
    model: Any, policy: AttnPred, calls: Sequence[Callable[[], object]], *, pool: bool
) -> Iterator[list[Trace]]:
    """Yield the traces of each call of the model, one for each cross-attention layer."""
    for call in calls:
        traces: list[Trace] = []
        with torch.inference_mode(), kvprune.compress(model, recorder(policy, traces, pool=pool)):
            call()
        yield traces


def demo_traces(
    policy: AttnPred, *, count: int, seed: int, split: Split = "held-out", pool: bool = True
) -> Iterator[list[Trace]]:
    """Yield the traces of the embedded model on questions whose answers take several tokens.

    Args:
        policy: Prepares the states.
        count: Questions of each task.
        seed: Of the questions; `kvprune compare` asks those of seed 0 unless told otherwise.
        split: "train" for pictures that the model was trained on.
        pool: Whether rows are pooled to blocks.
    """
    model, processor = demo.load()
    asked = [one for task in demo.TASKS for one in demo.examples(task, count, seed, split)]
    calls = [
        lambda one=one: model.generate(**encode(processor, [one]), max_new_tokens=12, do_sample=False)
        for one in asked
    ]
    yield from _recorded(model, policy, calls, pool=pool)


def speech_traces(
    policy: AttnPred, folder: Path, data: Path, *, limit: int | None = None, pool: bool = True
) -> Iterator[list[Trace]]:
    """Yield the traces of a Whisper on recordings, in the order of the file.

    Args:
        policy: Prepares the states.
        folder: Of the model.
        data: JSON-lines file of recordings.
        limit: How many of them, evenly spaced; all by default.
        pool: Whether rows are pooled to blocks.
    """
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    generator = SpeechGenerator(
        model=model, processor=AutoProcessor.from_pretrained(folder), max_new_tokens=64
    )
    examples = list(read_examples(data))
    if limit is not None and limit < len(examples):
        examples = [examples[number * len(examples) // limit] for number in range(limit)]
    calls = [lambda one=one: generator.generate(generator.encode([one])) for one in examples]
    yield from _recorded(model, policy, calls, pool=pool)
