"""Compares a tiny model of a declared family with stock transformers and with the oracle."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from decoder_pairs import PAIRS
from generation import generate
from transformers.models.mllama import modeling_mllama

import kvprune
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.adapters.tiny.family import TinyFamily
from kvprune.session.compression import Compression
from kvprune.testing import masked_oracle

STEPS = 4
MOST = 1e-5
"""Largest difference of logits in float32, relative to the largest logit."""

ONWARD = ("trim:keep_ratio=0.5", "divprune:keep_ratio=0.5")
"""Policies whose heads share tokens: by queries and by features, both also for later layers."""
BY_HEAD = ("norm:keep_ratio=0.5", "h2o:keep_ratio=0.5")


OLD = not hasattr(modeling_mllama, "_has_cached_cross_attention_states")
"""Whether transformers is older than 5.23."""
NAN_IF_OLD = {"CanaryForConditionalGeneration", "CohereAsrForConditionalGeneration"}
"""Classes whose encoder returns NaN for padding in eager attention, in old releases of transformers."""


def installed(names: Any) -> list[Any]:
    """Return pytest parameters for names of classes; those that this release lacks are skipped."""
    return [
        pytest.param(name, marks=[] if hasattr(transformers, name.split()[0]) else _absent(name))
        for name in names
    ]


def _absent(name: str) -> Any:
    return pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {name}")


def tiny_of(name: str) -> TinyFamily:
    return PAIRS[name] if name in PAIRS else TINY_FAMILIES[name]


def adapter_of(name: str) -> Any:
    return next(adapter for adapter in FAMILIES if name.split()[0] in adapter.model_classes)


def pads(name: str, attention: str) -> bool:
    """Whether stock transformers knows padding of the encoder."""
    return tiny_of(name).pads and not (OLD and attention == "eager" and name in NAN_IF_OLD)


def settings_of(name: str) -> list[tuple[str, bool, int]]:
    """Return attention, padding and beams of each setting that stock transformers has."""
    tiny = tiny_of(name)
    return [
        (attention, padded, beams)
        for attention in (("sdpa", "eager") if tiny.sdpa else ("eager",))
        for padded in ((False, True) if pads(name, attention) else (False,))
        for beams in ((1, 3) if tiny.beams else (1,))
    ]


def hardest_of(name: str) -> tuple[str, bool, int]:
    """Return the setting with SDPA, padding and beams, as far as stock transformers has it."""
    first = settings_of(name)[0][0]
    return next(setting for setting in reversed(settings_of(name)) if setting[0] == first)


@functools.cache
def modules_of_tiny_models() -> frozenset[str]:
    """Return the names of all classes of modules in the tiny models that this release has."""
    return frozenset(
        type(module).__name__
        for name, tiny in {**TINY_FAMILIES, **PAIRS}.items()
        if hasattr(transformers, name.split()[0])
        for module in tiny.model(name, attn_implementation="eager").modules()
    )


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference; Dia forbids tokens by logits of -inf, which are equal."""
    differ = one != other
    return float((one - other)[differ].abs().max()) if differ.any() else 0.0


def largest(logits: torch.Tensor) -> torch.Tensor:
    """Return the largest logit that is finite."""
    return logits[logits.isfinite()].abs().max()


def check(name: str, attention: str, padded: bool, beams: int, specs: tuple[str, ...]) -> None:
    """Compare a class in one setting with stock transformers and with the oracle."""
    tiny = tiny_of(name)
    model, inputs = tiny.model(name, torch.float32, attention), tiny.batch(torch.float32, padded)
    sequences, stock, _ = generate(model, inputs, STEPS, num_beams=beams)
    with kvprune.compress(model, "full") as found:  # which finds the adapter
        same, logits, _ = generate(model, inputs, STEPS, num_beams=beams)
    assert found.report.bytes_held <= found.report.bytes_full
    assert torch.equal(same, sequences)
    assert torch.equal(logits, stock)
    for spec in specs:
        logits = equals_oracle(name, model, inputs, spec, num_beams=beams)
        # The model depends on what it attends to, so the comparison with the oracle says something.
        assert logits.shape != stock.shape or apart(logits, stock) > 10 * MOST * largest(stock), spec


def equals_oracle(
    name: str, model: Any, inputs: dict[str, Any], spec: str, steps: int = STEPS, **options: Any
) -> torch.Tensor:
    """Assert that a pruned model equals the oracle and holds less; return its logits."""
    adapter = adapter_of(name)
    with Compression(adapter(model), kvprune.get_policy(spec), seed=0) as run:
        got, logits, _ = generate(model, inputs, steps, **options)
    with masked_oracle(model, run.selections, run.prefill_selections, adapter=adapter):
        expected, wanted, _ = generate(model, inputs, steps, **options)
    assert torch.equal(got, expected), spec
    assert apart(logits, wanted) <= MOST * largest(wanted), spec
    assert run.report.bytes_held < run.report.bytes_full, spec
    return logits
