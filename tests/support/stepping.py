"""Runs of policies that decide in decode steps, against the oracle that masks per step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from generation import generate, mllama
from torch import Tensor

import kvprune
from kvprune.session.registry import find_adapter
from kvprune.testing import masked_oracle, mllama_inputs
from kvprune.testing.oracle_steps import masked_steps

__all__ = ["against_oracle", "recorded"]


def recorded(model: Any, inputs: dict[str, Any], policy: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """Generate under a policy, from a fixed random state; return sequences, logits and the compression."""
    torch.manual_seed(0)
    settings = {name: options.pop(name) for name in ("seed", "reread") if name in options}
    with kvprune.compress(model, policy, **settings) as run:
        run.record_steps()
        run.record_replacements()
        sequences, logits, _ = generate(model, inputs, **options)
    return sequences, logits, run


def against_oracle(model: Any, inputs: dict[str, Any], policy: Any, **options: Any) -> float:
    """Return the largest difference in logits to the untouched model that masks what each step skips.

    Where the policy makes new tokens, the untouched model is fed these.
    """
    sequences, logits, run = recorded(model, inputs, policy, **options)
    reread = options.pop("reread", False)
    torch.manual_seed(0)
    with ExitStack() as stack:
        adapter, kept = find_adapter(model), (run.selections, run.prefill_selections)
        fed = {"reread": reread, "replacements": run.replacements}
        stack.enter_context(masked_oracle(model, *kept, adapter=adapter, **fed))
        stack.enter_context(masked_steps(adapter(model).sites, run.step_reads))
        expected_sequences, expected, _ = generate(model, inputs, **options)
    assert not logits.isnan().any()
    assert torch.equal(sequences, expected_sequences)
    differ = logits != expected  # some models forbid tokens by logits of -inf, which are equal
    return float((logits - expected)[differ].abs().max()) if differ.any() else 0.0


def two_images() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The calls of two turns, each of which brings an image."""
    whole = mllama_inputs(("tt4ttt1tt", "tt2ttt4tt"), dtype=torch.float64)
    of_images = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    first = {name: tensor[:, :1] if name in of_images else tensor[:, :6] for name, tensor in whole.items()}
    first["cross_attention_mask"] = first["cross_attention_mask"][:, :, :1]
    return first, {name: tensor[:, 1:] if name in of_images else tensor for name, tensor in whole.items()}


def later_image_like_the_oracle(policy: Any) -> Any:
    """Let a policy see two images in two turns, compare the second one with the oracle; return the run."""
    model, (first, second) = mllama(torch.float64), two_images()
    with kvprune.compress(model, policy) as run, torch.no_grad():
        run.record_steps()
        cache = model(**first, use_cache=True).past_key_values
        turn_1 = run.selections, run.prefill_selections
        _, logits, _ = generate(model, second, past_key_values=cache)
    with masked_oracle(model, *turn_1), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
    sites = find_adapter(model)(model).sites
    with masked_oracle(model, run.selections, run.prefill_selections), masked_steps(sites, run.step_reads):
        _, expected, _ = generate(model, second, past_key_values=cache)
    assert (logits - expected).abs().max() <= 1e-6
    return run
