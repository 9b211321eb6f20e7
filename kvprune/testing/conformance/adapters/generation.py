"""What a family offers besides plain generation: scoring answers, drafts of its own, attention weights.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from kvprune.errors import UnsupportedModelError
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.results import NotApplicable, Violation
from kvprune.testing.conformance.models.forward_calls import alone, called, forward, next_turn
from kvprune.testing.conformance.models.scenario import Scenario
from kvprune.testing.conformance.models.sites import Site
from kvprune.testing.hooks import temporary

__all__ = ["check_logits_to_keep", "check_self_speculation", "check_weights"]


def check_logits_to_keep(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """How many rows of logits a call returns changes neither these logits nor what is kept."""
    if "logits_to_keep" not in inspect.signature(type(scenario.pristine).forward).parameters:
        raise NotApplicable(f"{type(scenario.pristine).__name__}.forward has no logits_to_keep")

    def score(rows: int) -> tuple[Compression, Tensor]:
        with scenario.compress(policy) as run, torch.no_grad():
            logits: Tensor = called(scenario.model, {**scenario.batch(), "logits_to_keep": rows})["logits"]
        return run, logits

    whole, expected = score(0)
    length = expected.shape[1]
    for rows in sorted({1, 2, 3, length - 1, length + 3} - {0}):
        run, logits = score(rows)
        for layer_idx, selection in whole.selections.items():
            if run.selections[layer_idx] != selection:
                raise Violation(
                    f"the same selection in layer {layer_idx} with logits_to_keep={rows} as without",
                    "another one",
                )
        apart = float((logits - expected[:, -logits.shape[1] :]).abs().max())
        if logits.shape[1] != min(rows, length) or not apart <= scenario.tolerance:
            raise Violation(
                f"with logits_to_keep={rows}, the last logits of the whole prompt",
                f"{logits.shape[1]} rows that differ by {apart:.2e}",
            )


def check_self_speculation(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Drafts by the model's own first layers (``assistant_early_exit``) give the tokens of greedy search."""
    one = replace(scenario, inputs=alone(scenario.inputs, 0), beams=1, steps=8)

    def tokens(model: Any, **options: Any) -> list[int]:
        found: Tensor = model.generate(
            **one.batch(), max_new_tokens=one.steps, do_sample=False, num_beams=1, **options
        )
        listed: list[int] = found[0].tolist()
        return listed

    try:
        # A copy: transformers leaves the number of layers in its config changed if drafting fails.
        can = tokens(copy.deepcopy(one.pristine), assistant_early_exit=1) == tokens(one.pristine)
    except Exception as error:
        raise NotApplicable(
            f"the untouched {type(one.pristine).__name__} does not generate with assistant_early_exit "
            f"({type(error).__name__})"
        ) from error
    if not can:
        raise NotApplicable("the untouched model generates other tokens with assistant_early_exit")
    with one.compress(policy) as plain:
        greedy = tokens(one.model)
    with one.compress(policy) as run:
        try:
            drafted = tokens(one.model, assistant_early_exit=1)
        except UnsupportedModelError as refusal:
            raise NotApplicable(str(refusal)) from refusal
    if drafted != greedy:
        raise Violation(f"the tokens of greedy search with assistant_early_exit=1, {greedy}", f"{drafted}")
    for layer_idx, selection in plain.selections.items():
        if run.selections.get(layer_idx) != selection:
            raise Violation(
                f"the selection of greedy search in layer {layer_idx} with assistant_early_exit=1",
                "another one",
            )


def check_weights(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """Attention weights that the model returns have one entry for each column, 0 where it was dropped.

    They are those of the untouched model with the dropped columns masked, in prefill and in a later turn.
    """
    model = scenario.model
    found = _WeightsOf(scenario, model)  # hooks that came first see what others return, too
    with found.watching(), scenario.compress(policy) as run:
        found.call()
    wanted = _WeightsOf(scenario, scenario.pristine)
    # Older releases of transformers want another mask in a later turn of Mllama; the prefill is compared
    # then.
    with wanted.watching(), scenario.masked(run), suppress(IndexError):
        wanted.call()
    if not wanted.calls or not wanted.calls[0]:
        raise NotApplicable(f"the untouched {type(scenario.pristine).__name__} returns no attention weights")
    for number, moment in enumerate(("prefill", "a later turn")[: len(wanted.calls)]):
        for layer_idx, expected in wanted.calls[number].items():
            where = f"the attention weights of layer {layer_idx} in {moment}"
            _require_weights(where, found.calls[number].get(layer_idx), expected)
    returned = [weights.shape[-1] for weights in found.returned]
    if returned and set(returned) != {scenario.columns}:
        raise Violation(f"cross_attentions with {scenario.columns} entries for each row", f"{returned}")


def _require_weights(where: str, weights: Tensor | None, expected: Tensor) -> None:
    """Raise unless weights ``[B, Hq, T, S]`` are those of the masked model."""
    if weights is None or weights.shape != expected.shape:
        got = None if weights is None else list(weights.shape)
        raise Violation(f"{where} to be {list(expected.shape)}, with an entry for each column", f"{got}")
    if bool(weights[expected == 0].any()):
        raise Violation(f"{where} to be 0 at dropped columns", "other weights there")
    apart = float((weights - expected).abs().max())
    if not apart <= 1e-5:
        raise Violation(f"{where} to be those of the masked model", f"weights that differ by {apart:.2e}")


class _WeightsOf:
    """Attention weights of a model in a prefill and in a later turn.

    Attributes:
        calls: Weights ``[B, Hq, T, S]`` by layer index, for each call.
        returned: What the prefill returned as ``cross_attentions``.
    """

    def __init__(self, scenario: Scenario, model: Any) -> None:
        self.calls: list[dict[int, Tensor]] = []
        self.returned: list[Tensor] = []
        self._scenario, self._model = scenario, model

    def watching(self) -> Any:
        """Return a context that notes what each cross-attention module returns."""

        def watch(site: Site) -> RemovableHandle:
            def note(module: Any, args: Any, output: Any) -> None:
                at = site.weights_at
                if isinstance(output, tuple) and len(output) > at and output[at] is not None:
                    self.calls[-1][site.layer_idx] = output[at]

            handle: RemovableHandle = site.module.register_forward_hook(note)
            return handle

        def note_output(module: Any, args: Any, output: Any) -> None:
            self.returned += getattr(output, "cross_attentions", None) or ()

        watched = [watch(site) for site in self._scenario.sites(self._model)]
        return temporary([*watched, self._model.register_forward_hook(note_output)])

    @torch.no_grad()
    def call(self) -> None:
        """Run a prefill and a later turn.

        Raises:
            NotApplicable: If the modules return no weights.
        """
        scenario, options = self._scenario, {"output_attentions": True}
        self.calls.append({})
        cache = forward(self._model, {**scenario.batch(), **options})  # type: ignore[dict-item]
        self.calls.append({})
        next_turn(self._model, {**scenario.batch(), **options}, cache, 1)  # type: ignore[dict-item]
        if not all(self.calls):
            raise NotApplicable(
                "the model's attention modules return no attention weights, not even in eager mode"
            )
