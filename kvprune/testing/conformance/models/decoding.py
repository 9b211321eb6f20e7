"""What a model generates under a policy, compared with the untouched one: KV06 to KV09, KV12, KV13.

Each check is a function of a policy and a `Setting`.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.compression import Compression
from kvprune.testing.conformance.common.budgets import keeping_all
from kvprune.testing.conformance.common.findings import Violation
from kvprune.testing.conformance.common.isolation import model_state, process_state
from kvprune.testing.conformance.models.alignment import require_aligned
from kvprune.testing.conformance.models.setting import Generated, Setting, difference, run_under
from kvprune.testing.conformance.models.sites import Site

__all__ = [
    "check_clean_exit",
    "check_identity",
    "check_lossless",
    "check_mask_width",
    "check_oracle",
    "check_storage_order",
    "require_close",
    "require_unchanged",
]


def check_mask_width(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV06: at each step, each layer's mask is as wide as what the layer attends to."""
    model = setting.model
    wrong: list[str] = []

    def watch(site: Site) -> Any:
        def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            cache, mask = kwargs["past_key_values"], kwargs.get(site.mask)
            width = _width(site, cache, kwargs.get(site.states))
            if mask is not None and mask.shape[-1] != width:
                wrong.append(f"layer {site.layer_idx} has a mask of {mask.shape[-1]} for {width} columns")

        return site.module.register_forward_pre_hook(look, with_kwargs=True)

    with setting.compress(policy):
        handles = [watch(site) for site in setting.sites(model)]
        try:
            setting.generate(model)
        except Exception as error:
            if not wrong:
                raise
            wrong[0] += f" ({type(error).__name__} followed)"
        finally:
            for handle in handles:
                handle.remove()
    if wrong:
        raise Violation("masks as wide as what each layer holds", wrong[0])


def _width(site: Site, cache: Any, states: Any) -> int:
    """Return how many columns a layer is about to attend to."""
    flat, filled = cache, states is None
    if isinstance(cache, EncoderDecoderCache):  # states come at each step
        flat, filled = cache.cross_attention_cache, bool(cache.is_updated.get(site.layer_idx))
    width: int = (flat.layers[site.layer_idx].keys if filled else states).shape[-2]
    return width


def check_identity(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV07: keeping all is bit-identical to the untouched model."""
    unlimited = keeping_all(policy) or policy
    if not setting.all_visible and not (unlimited is policy and policy.keeps_invisible):
        return
    run, generated = run_under(unlimited, setting)
    if _quantizes(run):
        _require_full_precision_in_prefill(unlimited, generated, setting)
        return
    if not torch.equal(generated.sequences, setting.stock.sequences) or not torch.equal(
        generated.logits, setting.stock.logits
    ):
        raise Violation(
            f"logits of {unlimited.spec} bit-identical to the untouched model",
            f"a difference of {difference(generated, setting.stock)}",
        )
    # Copies of a sample, such as its beams, are held once.
    layers = setting.layers_of(generated.cache).values()
    held = sum(layer.bytes_held * layer.copies for layer in layers)
    if held != run.report.bytes_full:
        raise Violation(f"{unlimited.spec} to hold all {run.report.bytes_full} bytes", f"{held}")


def check_lossless(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV08: dropping only what decoding cannot see changes nothing."""
    unlimited = keeping_all(policy) or policy
    run, generated = run_under(unlimited, setting)
    early = any(selection is not None for selection in run.prefill_selections.values())
    if early and not setting.all_live:
        return  # text before the image attends to padding in stock: dropping that early is a change
    if _quantizes(run):
        _require_full_precision_in_prefill(unlimited, generated, setting)
        return
    require_close(f"{unlimited.spec} to decode like the untouched model", generated, setting.stock, setting)


def _quantizes(run: Compression) -> bool:
    return any(selection.quantizes for selection in run.selections.values())


def _require_full_precision_in_prefill(policy: CrossKVPolicy, generated: Generated, setting: Setting) -> None:
    """Raise unless the first step's logits are those of stock, and later ones are not.

    Keeping all in few bits changes decoding, by what KV13 says and no more; and prefill not at all.
    """
    first, stock = generated.logits[0], setting.stock.logits[0]
    apart = float((first - stock).abs().max()) if first.shape == stock.shape else float("inf")
    if not apart <= setting.tolerance:
        raise Violation(
            f"prefill under {policy.spec} to attend in full precision", f"logits that differ by {apart:.2e}"
        )
    if len(generated.logits) > 1 and torch.equal(generated.logits, setting.stock.logits):
        raise Violation(f"decoding under {policy.spec} to read quantized entries", "the logits of stock")


def check_storage_order(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV09: kept tokens decode the same in any order, and each is the one that its column says."""
    run, cache = setting.prefill(policy)
    require_aligned(run, setting.layers_of(cache), setting)
    _, expected = run_under(policy, setting)
    model = setting.model
    draw = random.Random(setting.seed)

    def shuffle(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        for layer in setting.layers_of(output.past_key_values).values():
            if isinstance(layer, CrossKVLayer) and layer.slots is not None and layer.valid is not None:
                _shuffle(layer, draw)

    handle = model.register_forward_hook(shuffle, with_kwargs=True)
    try:
        with setting.compress(policy):
            got = setting.generate(model)
    finally:
        handle.remove()
    require_close("the same logits in any order of kept tokens", got, expected, setting)


def _shuffle(layer: CrossKVLayer, draw: random.Random) -> None:
    """Put the entries of a layer in another order; those of one precision stay together."""
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


def check_clean_exit(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV12: model and process are as before, also after an exception inside generate."""
    model, process = copy.deepcopy(setting.pristine), process_state()
    before = {**model_state(model), **process}

    def run() -> None:
        with Compression(setting.adapter_class(model), policy, setting.seed):
            setting.generate(model)

    run()
    require_unchanged("after exit", before, {**model_state(model), **process_state()})

    def fail(*call: Any) -> None:
        raise MemoryError("raised by the check")

    handle = (model.get_output_embeddings() or model).register_forward_hook(fail)
    try:
        run()
    except MemoryError:
        pass
    finally:
        handle.remove()
    require_unchanged("after an exception", before, {**model_state(model), **process_state()})


def require_unchanged(when: str, before: dict[str, object], after: dict[str, object]) -> None:
    """Raise, naming what differs between two states of model and process."""
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Violation(f"model and process as before, {when}", f"changed: {', '.join(changed[:3])}{more}")


def check_oracle(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV13: generating under the policy equals the untouched model with the dropped columns masked."""
    run, generated = run_under(policy, setting)
    with setting.masked(run):
        expected = setting.generate(setting.pristine)
    require_close("generation equal to the masked oracle", generated, expected, setting)


def require_close(what: str, got: Generated, expected: Generated, setting: Setting) -> None:
    """Raise unless logits are equal to rounding, and tokens equal."""
    apart = difference(got, expected)
    if not apart <= setting.tolerance:
        raise Violation(f"{what}, to {setting.tolerance:g}", f"logits that differ by {apart:.2e}")
    if not torch.equal(got.sequences, expected.sequences):
        raise Violation(what, f"tokens {got.sequences.tolist()} instead of {expected.sequences.tolist()}")
