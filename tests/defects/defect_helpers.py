"""What the tests of known defects share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kvprune
from kvprune.errors import (
    IncompatibleTransformersError,
    KVPruneError,
    PolicyFailedError,
    PolicyOptionError,
    ScoreError,
)
from kvprune.testing import mllama_inputs, tiny_bart

BLAMES_THE_POLICY = (PolicyFailedError, PolicyOptionError, ScoreError)

NotRaised = pytest.fail.Exception
"""What `pytest.raises` raises if nothing was raised."""

DEFAULTS = {
    "do_sample": False,
    "max_new_tokens": 4,
}


def _why_not() -> str:
    """Return why no model can be compressed with the installed transformers, or ""."""
    try:
        kvprune.compress(tiny_bart(), "full")
    except IncompatibleTransformersError as error:
        return str(error)[:200]
    return ""


WHY_NOT = _why_not()

on_models = pytest.mark.skipif(
    bool(WHY_NOT), reason=f"compress() refuses this transformers, which would hide the defect: {WHY_NOT}"
)
"""Beside the marker of a defect that shows on a model: otherwise the refusal would pass for the defect."""


def texts(rows: int = 1, length: int = 10, seed: int = 0) -> Tensor:
    """Return token ids for BART."""
    return torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def sounds(rows: int = 1, seed: int = 0) -> Tensor:
    """Return features for the tiny Whisper."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, 100, generator=generator, dtype=torch.float64)


def chats(*layouts: str, seed: int = 0) -> dict[str, Tensor]:
    """Return float64 inputs for Mllama."""
    return mllama_inputs(layouts, seed=seed, dtype=torch.float64)


def repeated(inputs: Mapping[str, Tensor], times: int) -> dict[str, Tensor]:
    """Return a batch in which each sample stands several times."""
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


def generate(model: Any, inputs: Mapping[str, Any], **options: Any) -> Any:
    """Generate greedily; with `return_dict_in_generate`, return everything."""
    return model.generate(**inputs, **{**DEFAULTS, **options})


def logits_of(model: Any, inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """Generate greedily and return the raw logits, ``[steps, B, V]``."""
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(list(generate(model, inputs, **wanted, **options)["logits"]))


def kept(run: Any) -> dict[int, list[Any]]:
    """Return the columns that decoding uses, by layer."""
    return {layer_idx: selection.indices.tolist() for layer_idx, selection in run.selections.items()}


@contextmanager
def hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Run a forward hook of the user's on a module."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def or_refused(*, match: str = "") -> Iterator[None]:
    """Let a block end with an error of ours that does not blame the policy, in place of a right result."""
    refusal = None
    try:
        yield
    except KVPruneError as error:
        refusal = error
    if refusal is not None:
        assert not isinstance(refusal, BLAMES_THE_POLICY), f"blames the policy: {refusal}"
        assert match.casefold() in str(refusal).casefold()


def followed_by(inputs: Mapping[str, Tensor], token: int = 9) -> dict[str, Tensor]:
    """Return the inputs of a next step of Mllama, one token for each sample."""
    seen = inputs["cross_attention_mask"]
    rows = len(seen)
    more = torch.ones(rows, 1, dtype=inputs["attention_mask"].dtype)
    return {
        "input_ids": torch.full((rows, 1), token),
        "attention_mask": torch.cat([inputs["attention_mask"], more], dim=1),
        "cross_attention_mask": torch.cat([seen, seen[:, -1:]], dim=1),
    }


def copied(cache: Any) -> Any:
    """Return a deep copy of a cache."""
    return copy.deepcopy(cache)
