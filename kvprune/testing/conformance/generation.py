"""What a model generates under a policy, compared with the untouched one: KV06 to KV09, KV11 to KV13.

Each check is a function of a policy and a `Setting`.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from kvprune.cache import CrossKVLayer
from kvprune.policy import CrossKVPolicy
from kvprune.session import Compression, compress
from kvprune.testing.conformance.budgets import keeping_all
from kvprune.testing.conformance.isolation import model_state, process_state
from kvprune.testing.conformance.report import Violation
from kvprune.testing.conformance.setting import Generated, Setting, cross_layers, difference, run_under
from kvprune.testing.oracle import masked_oracle

__all__ = [
    "check_alignment",
    "check_clean_exit",
    "check_identity",
    "check_lossless",
    "check_mask_width",
    "check_oracle",
    "check_storage_order",
]


def check_mask_width(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV06: at each step, each layer's mask is as wide as what the layer attends to."""
    model = setting.model
    wrong: list[str] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states: Any = kwargs.get("cross_attention_states", kwargs.get("key_value_states"))
        cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
        layer_idx = module.layer_idx
        if model.config.is_encoder_decoder:  # states come at each step
            filled, cache = cache.is_updated.get(layer_idx), cache.cross_attention_cache
        else:
            filled = states is None
        width = (cache.layers[layer_idx].keys if filled else states).shape[-2]
        if mask is not None and mask.shape[-1] != width:
            wrong.append(f"layer {layer_idx} has a mask of {mask.shape[-1]} for {width} columns")

    handles = []
    with setting.compress(policy):
        if model.config.is_encoder_decoder:
            sites = [layer.encoder_attn for layer in model.get_decoder().layers]
        else:
            text = model.model.language_model
            sites = [text.layers[i].cross_attn for i in text.config.cross_attention_layers]
        handles = [site.register_forward_pre_hook(look, with_kwargs=True) for site in sites]
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


def check_identity(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV07: keeping all is bit-identical to the untouched model."""
    unlimited = keeping_all(policy) or policy
    if not setting.all_visible and not (unlimited is policy and policy.keeps_invisible):
        return
    run, generated = run_under(unlimited, setting)
    if not torch.equal(generated.sequences, setting.stock.sequences) or not torch.equal(
        generated.logits, setting.stock.logits
    ):
        raise Violation(
            f"logits of {unlimited.spec} bit-identical to the untouched model",
            f"a difference of {difference(generated, setting.stock)}",
        )
    # Copies of a sample, such as its beams, are held once.
    layers = cross_layers(setting.pristine, generated.cache).values()
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
    _require_close(f"{unlimited.spec} to decode like the untouched model", generated, setting.stock, setting)


def check_storage_order(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV09: kept tokens decode the same in any order, and each is the one that its column says."""
    run, cache = setting.prefill(policy)
    _require_aligned(run, cross_layers(setting.pristine, cache), setting)
    if setting.pristine.config.is_encoder_decoder:
        return
    inputs, shuffled = setting.inputs, copy.deepcopy(cache)
    for layer in shuffled.layers:
        if isinstance(layer, CrossKVLayer) and layer.slots is not None and layer.valid is not None:
            order = random.Random(setting.seed).sample(range(layer.keys.shape[-2]), layer.keys.shape[-2])
            layer.keys, layer.values = layer.keys[:, :, order], layer.values[:, :, order]
            layer.slots, layer.valid = layer.slots[..., order], layer.valid[..., order]
    one = torch.ones(len(inputs["input_ids"]), 1, dtype=torch.long)
    step = {
        "input_ids": 9 * one,
        "attention_mask": torch.cat([inputs["attention_mask"], one], 1),
        "cross_attention_mask": inputs["cross_attention_mask"][:, -1:],
    }
    model = setting.model
    with setting.compress(policy), torch.no_grad():
        expected = model(**step, past_key_values=cache).logits
        got = model(**step, past_key_values=shuffled).logits
    if not (expected - got).abs().max() <= setting.tolerance:
        raise Violation(
            "the same logits in any order of kept tokens",
            f"a difference of {float((expected - got).abs().max()):.2e}",
        )


def check_alignment(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV11: after a whole search, the cache holds the keys and values of the columns that were selected."""
    run, generated = run_under(policy, setting)
    _require_aligned(run, cross_layers(setting.pristine, generated.cache), setting)


def _require_aligned(run: Compression, layers: dict[int, Any], setting: Setting) -> None:
    for layer_idx, layer in layers.items():
        slots, valid = layer.entries()
        heads = layer.keys.shape[1]
        stock = setting.stock_layers[layer_idx]
        samples = torch.arange(len(slots)) * setting.visibility.batch // len(slots)
        columns = layer.held_columns().repeat_interleave(layer.copies, dim=0)
        if not torch.equal(columns, run.selections[layer_idx].to_mask()):
            raise Violation(
                f"layer {layer_idx} to hold the columns that run.selections names", "other columns"
            )
        index = slots.expand(-1, heads, -1)[..., None]
        flags = valid.expand(-1, heads, -1)
        for name in ("keys", "values"):
            full, held = getattr(stock, name)[samples], getattr(layer, name)
            wanted = full.gather(-2, index.expand(-1, -1, -1, full.shape[-1]))
            apart = (wanted - held).abs().amax(-1)[flags].max()
            if not apart <= setting.tolerance:
                raise Violation(
                    f"layer {layer_idx} to hold, for each kept column, the {name} that stock caches there",
                    f"{name} of other columns, or changed ones (difference {float(apart):.2e})",
                )


def check_clean_exit(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV12: model and process are as before, also after an exception inside generate."""
    model, process = copy.deepcopy(setting.pristine), process_state()
    before = model_state(model)
    with compress(model, policy, seed=setting.seed):
        setting.generate(model)
    _require_unchanged("after exit", {**before, **process}, {**model_state(model), **process_state()})
    site = model.lm_head

    def fail(*call: Any) -> None:
        raise MemoryError("raised by the check")

    handle = site.register_forward_hook(fail)
    try:
        with compress(model, policy, seed=setting.seed):
            setting.generate(model)
    except MemoryError:
        pass
    finally:
        handle.remove()
    _require_unchanged("after an exception", {**before, **process}, {**model_state(model), **process_state()})


def _require_unchanged(when: str, before: dict[str, object], after: dict[str, object]) -> None:
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise Violation(f"model and process as before, {when}", f"changed: {', '.join(changed[:3])}{more}")


def check_oracle(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV13: generating under the policy equals the untouched model with the dropped columns masked."""
    run, generated = run_under(policy, setting)
    with masked_oracle(setting.pristine, run.selections, run.prefill_selections):
        expected = setting.generate(setting.pristine)
    _require_close("generation equal to the masked oracle", generated, expected, setting)


def _require_close(what: str, got: Generated, expected: Generated, setting: Setting) -> None:
    apart = difference(got, expected)
    if not apart <= setting.tolerance:
        raise Violation(f"{what}, to {setting.tolerance:g}", f"logits that differ by {apart:.2e}")
    if not torch.equal(got.sequences, expected.sequences):
        raise Violation(what, f"tokens {got.sequences.tolist()} instead of {expected.sequences.tolist()}")
