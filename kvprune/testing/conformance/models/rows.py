"""Whether each row of a batch gets what it gets alone, where the inputs alone do not say so.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.results import NotApplicable, Violation
from kvprune.testing.conformance.models.forward_calls import alone, called, with_repeated_row
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.hooks import temporary
from kvprune.testing.reference import kept_bits, same_by_head

__all__ = ["check_empty_sample", "check_rows_of_equal_inputs"]


def check_rows_of_equal_inputs(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Rows of equal inputs that a hook tells apart get what each gets alone: nobody takes them for copies."""
    if scenario.dtype != torch.float64:
        return  # in float32, rounding may decide
    text = getattr(scenario.model.get_decoder(), "embed_tokens", None)
    if text is None:
        raise NotApplicable("the decoder of this model has no embed_tokens, so rows cannot be told apart")
    sample = alone(scenario.inputs, 0)
    twice = {name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) for name, tensor in sample.items()}
    random = torch.Generator().manual_seed(scenario.seed)
    bias = 2 * torch.randn(2, 1, text.embedding_dim, generator=random, dtype=scenario.dtype)

    def run(inputs: dict[str, Tensor], rows: slice) -> tuple[Compression, Tensor]:
        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            return output + bias[rows]

        with temporary([text.register_forward_hook(add)]):
            return _prefill(policy, scenario, inputs)

    together = run(twice, slice(0, 2))
    for row in range(2):
        _require_row(f"row {row} of two equal inputs", together, row, run(sample, slice(row, row + 1)))


def check_empty_sample(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """A sample that is nothing but padding changes nothing for the other samples of its batch."""
    if scenario.dtype != torch.float64:
        return  # in float32, rounding may decide
    mask = scenario.inputs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        raise NotApplicable("the inputs have no attention_mask that could make a sample all padding")
    batch = with_repeated_row(scenario.inputs)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][-1] = 0
    with torch.no_grad():
        stock = called(scenario.pristine, batch)["logits"]
    if not stock.isfinite().all():
        name = type(scenario.pristine).__name__
        raise NotApplicable(f"the untouched {name} computes NaN for a sample that is all padding")
    without, together = (_prefill(policy, scenario, inputs) for inputs in (scenario.batch(), batch))
    for row in range(scenario.batch_size):
        own = without[0], without[1][row : row + 1]
        _require_row(f"sample {row} beside one that is all padding", together, row, own, row)


def _prefill(
    policy: CrossKVPolicy, scenario: Scenario, inputs: dict[str, Tensor]
) -> tuple[Compression, Tensor]:
    """Run a prefill; return the compression, and the logits of the last row ``[B, V]``."""
    with scenario.compress(policy) as run, torch.no_grad():
        logits: Tensor = called(scenario.model, inputs)["logits"][:, -1]
    return run, logits


def _require_row(
    what: str,
    together: tuple[Compression, Tensor],
    row: int,
    own: tuple[Compression, Tensor],
    own_row: int = 0,
) -> None:
    """Raise unless a row of a batch selects and computes what it does in another batch."""
    (run, logits), (other, wanted) = together, own
    for layer_idx, selection in other.selections.items():
        got, expected = kept_bits(run.selections[layer_idx])[row], kept_bits(selection)[own_row]
        if not same_by_head(got, expected):
            raise Violation(
                f"{what} to keep what it keeps otherwise in layer {layer_idx}, "
                f"{[sorted(column for column, _ in head) for head in expected]}",
                f"{[sorted(column for column, _ in head) for head in got]}",
            )
    apart = float((logits[row] - wanted[0]).abs().max())
    if not apart <= 1e-6:
        raise Violation(f"{what} to get the logits that it gets otherwise", f"a difference of {apart:.2e}")
