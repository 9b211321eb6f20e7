"""What an adapter declares: its family, models, probes and layers; and whether its example can show defects.

Each check is a function of a policy and a `Scenario`; those that need no policy ignore it.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.probes import Probe
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing.conformance.common.isolation import model_state, require_unchanged
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.forward_calls import forward
from kvprune.testing.conformance.models.scenario import Scenario, difference

__all__ = ["check_batch", "check_declaration", "check_layer_indices"]


def check_declaration(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """The class names its family and models, matches these only, and its probes hold in transformers."""
    _require_names(scenario.adapter_class)
    _require_matches(scenario.adapter_class, scenario.pristine)
    _require_probes(scenario.adapter_class)


def _require_names(adapter: type[ModelAdapter]) -> None:
    family, names = getattr(adapter, "family", None), getattr(adapter, "model_classes", None)
    if not isinstance(family, str) or not family.strip():
        raise Violation("family to be a string that is not blank", repr(family))
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
        raise Violation("model_classes to be a tuple of class names", repr(names))


def _require_matches(adapter: type[ModelAdapter], model: Any) -> None:
    names = adapter.model_classes
    is_listed = bool({base.__name__ for base in type(model).__mro__} & set(names))
    for made, listed in ((model, is_listed), (nn.Linear(1, 1), "Linear" in names)):
        if bool(adapter.matches(made)) != listed:
            raise Violation(
                f"matches({type(made).__name__}) to return {listed}, as model_classes {names} implies",
                repr(adapter.matches(made)),
            )
    if not is_listed:
        raise Violation(f"a model of model_classes {names}", f"a {type(model).__name__}")


def _require_probes(adapter: type[ModelAdapter]) -> None:
    probes = adapter.probe()
    if not isinstance(probes, list) or not probes or not all(isinstance(one, Probe) for one in probes):
        raise Violation("probe() to return a list of at least one Probe", repr(probes)[:200])
    failed = [f"{probe.name}: {probe.detail}" for probe in probes if not probe.ok]
    if failed:
        raise Violation("all probes to hold in the installed transformers", "; ".join(failed))


def check_batch(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """The model and the batch are fit to show defects."""
    tensors = [tensor for tensor in scenario.inputs.values() if isinstance(tensor, torch.Tensor)]
    if not tensors or len(tensors[0]) < 2 or all(torch.equal(tensor[0], tensor[1]) for tensor in tensors):
        raise Violation(
            "make_inputs to return at least two samples that differ",
            f"tensors {[list(tensor.shape) for tensor in tensors]}",
        )
    if scenario.pristine.training:
        raise Violation("make_model to return a model in eval mode", "one in training mode")
    if not scenario.stock.logits.isfinite().all():
        raise Violation("finite logits of the untouched model on this batch", "NaN or infinity")
    _, generated = scenario.run(policy)
    if not difference(generated, scenario.stock) > scenario.tolerance:
        raise Violation(
            "a model whose logits depend on what it attends to (see kvprune.testing.enliven)",
            f"the same logits with all columns and under {policy.spec}",
        )


def check_layer_indices(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """The layer indices are, in order, those of the cache layers that do not grow during generation."""
    model = copy.deepcopy(scenario.pristine)
    before = model_state(model)
    indices = list(scenario.adapter_class(model).layer_indices)
    require_unchanged("after the adapter was constructed", before, model_state(model))
    if not indices or any(one >= other for one, other in pairwise(indices)):
        raise Violation("layer_indices to hold at least one index, in increasing order", str(indices))
    with torch.no_grad():
        first = forward(model, scenario.batch())
    grown = scenario.stock.cache
    if isinstance(first, EncoderDecoderCache):
        found = list(range(len(first.cross_attention_cache.layers)))
    else:
        lengths = [[layer.keys.shape[-2] for layer in cache.layers] for cache in (first, grown)]
        found = [i for i, (early, late) in enumerate(zip(*lengths, strict=True)) if early == late]
    if indices != found:
        raise Violation(f"layer_indices {found}, the layers that cache encoder states", str(indices))
