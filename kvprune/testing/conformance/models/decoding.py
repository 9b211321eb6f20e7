"""What a tiny model generates under a policy, compared with the untouched model: KV06 to KV09, KV12, KV13.

Each check is a function of a policy and a `Scenario`.
"""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.arguments import cache_of, returned_cache
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.budgets import keeping_all
from kvprune.testing.conformance.common.isolation import require_unchanged, whole_state
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.cache_contents import require_aligned
from kvprune.testing.conformance.models.scenario import Generated, Scenario, difference
from kvprune.testing.conformance.models.sites import Site
from kvprune.testing.hooks import temporary

__all__ = [
    "check_clean_exit",
    "check_identity",
    "check_lossless",
    "check_mask_width",
    "check_oracle",
    "check_storage_order",
    "require_close",
]


def check_mask_width(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV06: at each step, each layer's mask is as wide as the keys that the layer attends to."""
    model = scenario.model
    wrong: list[str] = []

    def watch(site: Site) -> Any:
        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache, mask = cache_of(kwargs), kwargs.get(site.mask)
            width = _width(site, cache, kwargs.get(site.states))
            if mask is not None and mask.shape[-1] != width:
                wrong.append(f"layer {site.layer_idx} has a mask of {mask.shape[-1]} for {width} columns")

        return site.module.register_forward_pre_hook(look, with_kwargs=True)

    with scenario.compress(policy), temporary(map(watch, scenario.sites(model))):
        try:
            scenario.generate(model)
        except Exception as error:
            if not wrong:
                raise
            wrong[0] += f" ({type(error).__name__} followed)"
    if wrong:
        raise Violation("masks as wide as what each layer holds", wrong[0])


def _width(site: Site, cache: Any, states: Any) -> int:
    """Return how many columns a layer is about to attend to."""
    flat, filled = cache, states is None
    if isinstance(cache, EncoderDecoderCache):  # here, encoder states are given at each step
        flat, filled = cache.cross_attention_cache, bool(cache.is_updated.get(site.layer_idx))
    width: int = (flat.layers[site.layer_idx].keys if filled else states).shape[-2]
    return width


def check_identity(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV07: keeping all tokens is bit-identical to the untouched model."""
    unlimited = keeping_all(policy) or policy
    if not scenario.all_visible and not (unlimited is policy and policy.keeps_invisible):
        return
    run, generated = scenario.run(unlimited)
    if _quantizes(run):
        _require_full_precision_in_prefill(unlimited, generated, scenario)
        return
    if not torch.equal(generated.sequences, scenario.stock.sequences) or not torch.equal(
        generated.logits, scenario.stock.logits
    ):
        raise Violation(
            f"logits of {unlimited.spec} bit-identical to the untouched model",
            f"a difference of {difference(generated, scenario.stock)}",
        )
    # Copies of a sample, such as its beams, share storage.
    layers = scenario.layers_of(generated.cache).values()
    held = sum(layer.bytes_held * layer.copies for layer in layers)
    if held != run.report.bytes_full:
        raise Violation(f"{unlimited.spec} to hold all {run.report.bytes_full} bytes", f"{held}")


def check_lossless(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV08: dropping only what decoding cannot see changes nothing."""
    unlimited = keeping_all(policy) or policy
    run, generated = scenario.run(unlimited)
    early = any(selection is not None for selection in run.prefill_selections.values())
    if early and not scenario.all_live:
        return  # stock text before an image attends to padding, so dropping that early is a change
    if _quantizes(run):
        _require_full_precision_in_prefill(unlimited, generated, scenario)
        return
    require_close(f"{unlimited.spec} to decode like the untouched model", generated, scenario.stock, scenario)


def _quantizes(run: Compression) -> bool:
    return any(selection.quantizes for selection in run.selections.values())


def _require_full_precision_in_prefill(
    policy: CrossKVPolicy, generated: Generated, scenario: Scenario
) -> None:
    """Raise unless the first logits are those of the untouched model, and later ones are not.

    Holding all tokens in few bits changes decoding, as KV13 checks, and leaves prefill unchanged.
    """
    first, stock = generated.logits[0], scenario.stock.logits[0]
    apart = float((first - stock).abs().max()) if first.shape == stock.shape else float("inf")
    if not scenario.are_close(apart):
        raise Violation(
            f"prefill under {policy.spec} to attend in full precision", f"logits that differ by {apart:.2e}"
        )
    if len(generated.logits) > 1 and torch.equal(generated.logits, scenario.stock.logits):
        raise Violation(
            f"decoding under {policy.spec} to read quantized entries", "the logits of the untouched model"
        )


def check_storage_order(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV09: kept tokens decode the same in any order, and each holds the numbers of its column."""
    run, cache = scenario.prefill(policy)
    require_aligned(run, scenario.layers_of(cache), scenario)
    _, expected = scenario.run(policy)
    model = scenario.model
    draw = random.Random(scenario.seed)

    def shuffle(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cache = returned_cache(output)
        if cache is None:  # a guide has read the prompt
            return
        for layer in scenario.layers_of(cache).values():
            if isinstance(layer, CrossKVLayer) and layer.slots is not None and layer.valid is not None:
                _shuffle(layer, draw)

    hooks = [model.register_forward_hook(shuffle, with_kwargs=True)]
    with temporary(hooks), scenario.compress(policy):
        got = scenario.generate(model)
    require_close("the same logits in any order of kept tokens", got, expected, scenario)


def _shuffle(layer: CrossKVLayer, draw: random.Random) -> None:
    """Shuffle the entries of a layer; those of one precision stay together."""
    assert layer.slots is not None
    assert layer.valid is not None
    orders, first, pools = [], 0, []
    for pool in layer.pools:
        order = draw.sample(range(pool.width), pool.width)
        pools.append(pool.map(lambda tensor, order=order: tensor[:, :, order]))  # type: ignore[misc]
        orders += [first + entry for entry in order]
        first += pool.width
    own = draw.sample(range(layer.width - first), layer.width - first)
    layer.pools = tuple(pools)
    if own:
        layer.keys, layer.values = layer.keys[:, :, own], layer.values[:, :, own]
    orders += [first + entry for entry in own]
    layer.slots, layer.valid = layer.slots[..., orders], layer.valid[..., orders]
    layer.bias = None if layer.bias is None else layer.bias[..., orders]


def check_clean_exit(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV12: model and process are unchanged, also after an exception inside generate."""
    model = copy.deepcopy(scenario.pristine)
    before = whole_state(model)

    def run() -> None:
        with scenario.compress(policy, model):
            scenario.generate(model)

    run()
    require_unchanged("after exit", before, whole_state(model))

    def fail(*call: Any) -> None:
        raise MemoryError("raised by the check")

    failing = (model.get_output_embeddings() or model).register_forward_hook(fail)
    with temporary([failing]), suppress(MemoryError):
        run()
    require_unchanged("after an exception", before, whole_state(model))


def check_oracle(policy: CrossKVPolicy, scenario: Scenario) -> None:
    """KV13: the model generates under the policy what the untouched one does with dropped columns masked."""
    run, generated = scenario.run(policy)
    with scenario.masked(run):
        expected = scenario.generate(scenario.pristine)
    require_close("generation equal to the masked oracle", generated, expected, scenario)


def require_close(what: str, got: Generated, expected: Generated, scenario: Scenario) -> None:
    """Raise unless logits are equal up to rounding, and tokens are equal."""
    apart = difference(got, expected)
    if not scenario.are_close(apart):
        raise Violation(f"{what}, to {scenario.logit_tolerance:g}", f"logits that differ by {apart:.2e}")
    if not torch.equal(got.sequences, expected.sequences):
        raise Violation(what, f"tokens {got.sequences.tolist()} instead of {expected.sequences.tolist()}")
