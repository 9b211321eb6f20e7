"""Checks that run a tiny model under a policy and compare it with the untouched one.

Each is a function of a policy and a `Setting`, that is a model and a batch for it. They know no policy and
no adapter by name, so that adapters can be checked with them, too.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvprune.cache import CrossKVLayer
from kvprune.policy import CrossKVPolicy, ScoringPolicy
from kvprune.session import Compression, compress
from kvprune.testing.conformance.budgets import allowance, keeping_all
from kvprune.testing.conformance.isolation import model_state, process_state, random_state
from kvprune.testing.conformance.report import Violation
from kvprune.testing.oracle import masked_oracle
from kvprune.testing.problems import ModelProblem
from kvprune.testing.reference import (
    kept_sets,
    live_rows,
    same_by_head,
    seen_by_row,
    slow_decode,
    slow_groups,
    slow_prefill,
    slow_strata,
    visibility_of,
)
from kvprune.visibility import Visibility

__all__ = ["Setting"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


@dataclass(frozen=True)
class _Generated:
    sequences: Tensor
    logits: Tensor  # [steps, B * beams, V]
    cache: Any


@dataclass(frozen=True)
class Setting:
    """A model and a batch for it, and what the untouched model makes of them."""

    pristine: Any
    inputs: dict[str, Tensor]
    beams: int = 1
    steps: int = 3
    seed: int = 0

    @classmethod
    def of(cls, problem: ModelProblem) -> Setting:
        """Build what a problem describes."""
        model, inputs = problem.make_model(), problem.make_inputs()
        return cls(model, inputs, problem.beams, problem.steps, problem.seed)

    @cached_property
    def model(self) -> Any:
        """A copy of the model, which a policy may spoil."""
        return copy.deepcopy(self.pristine)

    def renew(self) -> None:
        """Make a new copy of the model when it is needed next."""
        self.__dict__.pop("model", None)

    def batch(self) -> dict[str, Tensor]:
        """Return a copy of the inputs."""
        return {name: tensor.clone() for name, tensor in self.inputs.items()}

    def generate(self, model: Any, inputs: dict[str, Tensor] | None = None) -> _Generated:
        """Generate greedily, or by beam search."""
        out = model.generate(
            **(inputs or self.batch()),
            max_new_tokens=self.steps,
            num_beams=self.beams,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return _Generated(out["sequences"], torch.stack(list(out["logits"])), out["past_key_values"])

    def prefill(
        self, policy: CrossKVPolicy, inputs: dict[str, Tensor] | None = None
    ) -> tuple[Compression, Any]:
        """Run one forward call under the policy; return the compression and the cache."""
        model = self.model
        with compress(model, policy, seed=self.seed) as run, torch.no_grad():
            cache = _forward(model, inputs or self.batch())
        return run, cache

    @cached_property
    def stock(self) -> _Generated:
        """What the untouched model generates."""
        return self.generate(self.pristine)

    @cached_property
    def stock_layers(self) -> dict[int, Any]:
        """The untouched model's cross-attention cache after prefill, by layer index."""
        with torch.no_grad():
            cache = _forward(self.pristine, self.batch())
        return cross_layers(self.pristine, cache)

    @cached_property
    def visibility(self) -> Visibility:
        """What the text rows may attend, straight from the inputs."""
        columns = next(iter(self.stock_layers.values())).keys.shape[-2]
        return visibility_of(self.inputs, columns)

    @property
    def tolerance(self) -> float:
        """How far logits may differ."""
        return _TOLERANCE[self.stock.logits.dtype]

    @cached_property
    def all_visible(self) -> bool:
        """Whether decoding sees every column."""
        see = self.visibility
        return all(len(slow_decode(see, sample)) == see.columns for sample in range(see.batch))

    @cached_property
    def all_live(self) -> bool:
        """Whether no text comes before the first image."""
        if "cross_attention_mask" not in self.inputs:
            return True
        return bool((self.visibility.live | ~self.inputs["attention_mask"].bool()).all())


def _forward(model: Any, inputs: dict[str, Tensor]) -> Any:
    if model.config.is_encoder_decoder:
        start = torch.full((len(inputs["input_ids"]), 1), model.config.decoder_start_token_id)
        inputs = {**inputs, "decoder_input_ids": start}
    return model(**inputs, use_cache=True).past_key_values


def cross_layers(model: Any, cache: Any) -> dict[int, Any]:
    """Return the cache layers of cross-attention, by layer index."""
    if model.config.is_encoder_decoder:
        return dict(enumerate(cache.cross_attention_cache.layers))
    return {i: cache.layers[i] for i in model.config.text_config.cross_attention_layers}


def _run(policy: CrossKVPolicy, setting: Setting) -> tuple[Compression, _Generated]:
    model = setting.model
    with compress(model, policy, seed=setting.seed) as run:
        return run, setting.generate(model)


def _kept(run: Compression, setting: Setting) -> Iterator[tuple[str, int, set[int]]]:
    """Yield what decoding keeps, by layer, head and sample, beams included."""
    for layer_idx, selection in run.selections.items():
        rows = kept_sets(selection)
        if selection.columns != setting.visibility.columns:
            raise Violation(
                f"layer {layer_idx} to select out of {setting.visibility.columns} columns",
                str(selection.columns),
            )
        for row, heads in enumerate(rows):
            for head, kept in enumerate(heads):
                sample = row * setting.visibility.batch // len(rows)
                yield f"layer {layer_idx}, sample {sample}, head {head}", sample, kept


def check_columns(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV01: what decoding uses are strictly increasing columns of the unpruned cache."""
    run, _ = _run(policy, setting)
    for layer_idx, selection in run.selections.items():
        for row, valid in zip(selection.indices.flatten(0, 1), selection.valid.flatten(0, 1), strict=True):
            kept = row[valid].tolist()
            if kept != sorted(set(kept)) or not set(kept) <= set(range(setting.visibility.columns)):
                raise Violation(
                    f"layer {layer_idx} to hold strictly increasing columns below "
                    f"{setting.visibility.columns}",
                    f"{kept}",
                )


def check_counts(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV02: decoding sees exactly the budget."""
    run, _ = _run(policy, setting)
    see = setting.visibility
    whole = None if isinstance(policy, ScoringPolicy) else _left_whole(run)
    for where, sample, kept in _kept(run, setting):
        visible = slow_strata(see, sample)[0]
        if where.startswith(f"layer {whole},") and visible <= kept:
            continue
        groups = sum(bool(group & visible) for group in slow_groups(see, sample))
        wanted = max(allowance(policy, len(visible)), groups)
        if len(kept & visible) != wanted:
            raise Violation(
                f"{where} to keep {wanted} of {len(visible)} visible tokens at {policy.spec}",
                f"{len(kept & visible)}: {sorted(kept & visible)}",
            )


def _left_whole(run: Compression) -> int | None:
    """Return the layer that decided for later ones, which may leave its own cache whole."""
    early = list(run.prefill_selections.items())
    for (layer_idx, before), (_, after) in itertools.pairwise(early):
        if before is None and after is not None:
            return layer_idx
    return None


def check_images(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV03: each sample keeps a token of each image that decoding sees."""
    run, _ = _run(policy, setting)
    see = setting.visibility
    for where, sample, kept in _kept(run, setting):
        visible = slow_decode(see, sample)
        for group in slow_groups(see, sample):
            if group & visible and not group & kept:
                raise Violation(f"{where} to keep one of {sorted(group)}", f"{sorted(kept)}")
        if not kept:
            raise Violation(f"{where} to keep a token at least", "none kept")


def check_padding(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV04: decoding holds no padding while something visible was dropped."""
    run, _ = _run(policy, setting)
    for where, sample, kept in _kept(run, setting):
        visible = slow_decode(setting.visibility, sample)
        if visible and kept - visible and visible - kept:
            raise Violation(
                f"{where} to drop unseen columns before visible ones",
                f"{sorted(kept - visible)} kept, {sorted(visible - kept)} dropped",
            )


def check_prefill_rows(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV05: in each layer's prefill, a row that saw a token still sees one."""
    run, _ = setting.prefill(policy)
    see = setting.visibility
    for layer_idx, selection in run.prefill_selections.items():
        if selection is None:
            continue
        for sample, heads in enumerate(kept_sets(selection)):
            for row in live_rows(see, sample):
                seen = seen_by_row(see, sample, row)
                if seen and not all(seen & kept for kept in heads):
                    raise Violation(
                        f"layer {layer_idx}, sample {sample}: text row {row} to see one of {sorted(seen)}",
                        "none of them reached the layer",
                    )


def check_mask_width(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV06: at each step, each layer's mask is as wide as what the layer attends to."""
    model = setting.model
    wrong: list[str] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states: Any = kwargs.get("cross_attention_states", kwargs.get("key_value_states"))
        cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
        layer_idx = module.layer_idx
        held = cross_layers(model, cache)[layer_idx]
        filled = getattr(held, "is_filled", False)
        width = (held.keys if filled else states).shape[-2]
        if mask is not None and mask.shape[-1] != width:
            wrong.append(f"layer {layer_idx} has a mask of {mask.shape[-1]} for {width} columns")

    handles = []
    with compress(model, policy, seed=setting.seed):
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
    run, generated = _run(unlimited, setting)
    if not torch.equal(generated.sequences, setting.stock.sequences) or not torch.equal(
        generated.logits, setting.stock.logits
    ):
        raise Violation(
            f"logits of {unlimited.spec} bit-identical to the untouched model",
            f"a difference of {_difference(generated, setting.stock)}",
        )
    if run.report.bytes_held != run.report.bytes_full:
        raise Violation(
            f"{unlimited.spec} to hold all {run.report.bytes_full} bytes", f"{run.report.bytes_held}"
        )


def check_lossless(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV08: dropping only what decoding cannot see changes nothing."""
    unlimited = keeping_all(policy) or policy
    run, generated = _run(unlimited, setting)
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
    with compress(model, policy, seed=setting.seed), torch.no_grad():
        expected = model(**step, past_key_values=cache).logits
        got = model(**step, past_key_values=shuffled).logits
    if not (expected - got).abs().max() <= setting.tolerance:
        raise Violation(
            "the same logits in any order of kept tokens",
            f"a difference of {float((expected - got).abs().max()):.2e}",
        )


def check_alignment(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV11: after a whole search, the cache holds the keys and values of the columns that were selected."""
    run, generated = _run(policy, setting)
    _require_aligned(run, cross_layers(setting.pristine, generated.cache), setting)


def _require_aligned(run: Compression, layers: dict[int, Any], setting: Setting) -> None:
    for layer_idx, layer in layers.items():
        slots, valid = layer.entries()
        heads = layer.keys.shape[1]
        stock = setting.stock_layers[layer_idx]
        samples = torch.arange(len(slots)) * setting.visibility.batch // len(slots)
        if not torch.equal(layer.held_columns(), run.selections[layer_idx].to_mask()):
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


def check_repeatable(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV10: the same seed selects the same; inputs and global generators stay as they were."""
    batch, before = setting.batch(), random_state()["torch"]
    first, _ = setting.prefill(policy, batch)
    for name, tensor in batch.items():
        if not torch.equal(tensor, setting.inputs[name]):
            raise Violation(f"the model's input {name!r} to stay as it was", "another content")
    if not torch.equal(before, random_state()["torch"]):
        raise Violation("torch's global generator to stay as it was", "it was moved or seeded")
    again, _ = setting.prefill(policy)
    for layer_idx, selection in first.selections.items():
        if selection != again.selections[layer_idx]:
            raise Violation(f"the same selection again in layer {layer_idx}, for the same seed", "another")


def check_alone_in_model(policy: CrossKVPolicy, setting: Setting) -> None:
    """KV10: a sample selects alone what it selects in a batch."""
    together, _ = setting.prefill(policy)
    for sample in range(setting.visibility.batch):
        if not slow_prefill(setting.visibility, sample):
            continue  # without an image, the model is called without one
        alone, _ = setting.prefill(policy, _alone(setting.inputs, sample))
        for layer_idx, selection in alone.selections.items():
            # Columns beyond are there only because other samples have more images.
            present = set(range(selection.columns))
            kept = [columns & present for columns in kept_sets(together.selections[layer_idx])[sample]]
            if not same_by_head(kept_sets(selection)[0], kept):
                raise Violation(
                    f"layer {layer_idx} to keep of sample {sample} alone what it keeps in the batch, "
                    f"{[sorted(columns) for columns in kept]}",
                    f"{[sorted(columns) for columns in kept_sets(selection)[0]]}",
                )


def _alone(inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """Cut the inputs to one sample, without the padding that its batch needs."""
    alone = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
    real = alone["attention_mask"][0].bool()
    for name in ("input_ids", "attention_mask", "cross_attention_mask"):
        if name in alone:
            alone[name] = alone[name][:, real]
    if "cross_attention_mask" in alone:
        images = int(alone["cross_attention_mask"].any(-1).any(1).sum())
        alone["cross_attention_mask"] = alone["cross_attention_mask"][:, :, :images]
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            alone[name] = alone[name][:, :images]
    return alone


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
    run, generated = _run(policy, setting)
    with masked_oracle(setting.pristine, run.selections, run.prefill_selections):
        expected = setting.generate(setting.pristine)
    _require_close("generation equal to the masked oracle", generated, expected, setting)


def _require_close(what: str, got: _Generated, expected: _Generated, setting: Setting) -> None:
    apart = _difference(got, expected)
    if not apart <= setting.tolerance:
        raise Violation(f"{what}, to {setting.tolerance:g}", f"logits that differ by {apart:.2e}")
    if not torch.equal(got.sequences, expected.sequences):
        raise Violation(what, f"tokens {got.sequences.tolist()} instead of {expected.sequences.tolist()}")


def _difference(one: _Generated, other: _Generated) -> float:
    if one.logits.shape != other.logits.shape:
        return float("inf")
    return float((one.logits - other.logits).abs().max())
