"""Re-reading: the first answer token comes from the pruned cache, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from families import SPECS, inputs_of, model_of
from generation import LAYOUTS, TOLERANCE, bart, generate, mllama
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_text import SomeText, turns
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import kvprune
from kvprune.adapters.arguments import cache_argument, returned_cache
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.families.whisper import WhisperAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.errors import CompressionStateError, UnsupportedCacheError, UnsupportedModelError
from kvprune.session.compression import Compression
from kvprune.testing import masked_oracle, mllama_inputs, strategies, tiny_bart
from kvprune.testing.conformance.models.moments import acting_at

FAMILIES = ("Mllama", "BART", "Whisper")
ADAPTERS = {"Mllama": MllamaAdapter, "BART": BartAdapter, "Whisper": WhisperAdapter}
families = pytest.mark.parametrize("family", FAMILIES)
MOMENTS = (
    "full",
    "lossless",
    "random:keep_ratio=0.3",
    "norm:keep_ratio=0.3",
    "norm:keep_ratio=0.3,reach=onward",
    "trim:keep_ratio=0.3",
    "fastv:keep_ratio=0.3",
    "divprune:keep_ratio=0.3",
    "prefixkv:keep_ratio=0.3",
    "adakv:keep_ratio=0.3",
    "csp:keep_ratio=0.5,text_keep=0.5",
    "elastic:keep_ratio=0.3",
    "zipvl",
)
"""Policies of each moment, some that merge, quantize, or prune text."""


def oracle_of(model, run):
    texts = {"text_selections": run.text_selections} if run.text_selections else {}
    return masked_oracle(model, run.selections, run.prefill_selections, reread=True, **texts)


def apart(model, inputs, policy, steps=4, **options):
    """Largest difference to the oracle, relative to the largest logit; tokens are the same."""
    torch.manual_seed(0)
    with kvprune.compress(model, policy, reread=True) as run:
        sequences, logits, _ = generate(model, inputs, steps, **options)
    torch.manual_seed(0)
    with oracle_of(model, run):
        expected_sequences, expected, _ = generate(model, inputs, steps, **options)
    assert not logits.isnan().any()
    assert torch.equal(sequences, expected_sequences)
    assert run.report.rereads == run.report.prefills == 1
    return float((logits - expected).abs().max() / expected.abs().max())


def supported(family, spec):
    return family == "Mllama" or "text" not in spec


CASES = [(family, spec) for family in FAMILIES for spec in MOMENTS if supported(family, spec)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_generation_equals_the_oracle(family, spec, options):
    model, inputs = model_of(family), inputs_of(family)
    assert apart(model, inputs, spec, **options) <= 1e-12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "spec"), CASES)
def test_generation_equals_the_oracle_in_float32(family, spec, attention):
    model = model_of(family, torch.float32, attention)
    assert apart(model, inputs_of(family, dtype=torch.float32), spec) <= 2e-6


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("policy", ["trim:keep_ratio=0.3", "norm:keep_ratio=0.3", SomeText()], ids=str)
def test_several_images_padding_tiles_left_padding_and_text_only_rows(layouts, policy):
    inputs = mllama_inputs(layouts, dtype=torch.float64)
    assert apart(mllama(torch.float64), inputs, policy) <= 1e-12


@settings(max_examples=15, deadline=None)
@given(
    layouts=strategies.layouts(),
    policy=st.sampled_from([*MOMENTS, SomeText(), SomeText(by_head=False)]),
    beams=st.sampled_from([1, 2]),
)
def test_any_batch_equals_the_oracle(layouts, policy, beams):
    inputs = mllama_inputs(layouts, dtype=torch.float64)
    assert apart(mllama(torch.float64), inputs, policy, steps=3, num_beams=beams) <= 1e-12


def by_hand(model, inputs, run, steps):
    """Greedy logits of calls of the outer model alone: read the prompt, take its last token back, decode."""
    prompt, whole, extra = by_hand_prompt(model, inputs)
    logits = []
    masked = masked_oracle(
        model, run.selections, run.prefill_selections, text_selections=run.text_selections or None
    )
    with masked, torch.no_grad():
        out = model(**prompt, **extra, use_cache=True)
        cache, token = returned_cache(out), whole["tokens"][:, -1:]
        text = getattr(cache, "self_attention_cache", cache)
        cross = () if text is not cache else run.selections
        for layer_idx, layer in enumerate(text.layers):
            if layer_idx not in cross:
                layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        for _ in range(steps):
            logits.append(
                model(**whole["step"](token), **cache_argument(model, cache), use_cache=True).logits[:, -1]
            )
            token = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


def by_hand_prompt(model, inputs):
    if model.config.is_encoder_decoder:
        start = torch.full(
            (len(next(iter(inputs.values()))), 1), model.generation_config.decoder_start_token_id
        )
        mask = {k: v for k, v in inputs.items() if k == "attention_mask"}
        states = model.get_encoder()(**inputs)

        def step(token):
            return {"encoder_outputs": states, "decoder_input_ids": token, **mask}

        return step(start), {"tokens": start, "step": step}, {}
    seen = [inputs["attention_mask"][:, :-1]]
    positions = inputs["attention_mask"].cumsum(-1) - 1
    positions = positions.masked_fill(inputs["attention_mask"] == 0, 0)
    at = [positions[:, -1:] - 1]

    def step(token):
        seen.append(torch.ones_like(seen[0][:, :1]))
        at[0] = at[0] + 1
        tiles = inputs["cross_attention_mask"]  # of the whole text: transformers 5.17 looks up its own rows
        written = tiles[:, -1:].expand(-1, len(seen) - 2, -1, -1)
        return {
            "input_ids": token,
            "attention_mask": torch.cat(seen, 1),
            "position_ids": at[0],
            "cross_attention_mask": torch.cat([tiles, written], 1),
        }

    return inputs, {"tokens": inputs["input_ids"], "step": step}, {"position_ids": positions}


@families
@pytest.mark.parametrize(
    "spec", ["norm:keep_ratio=0.3", "trim:keep_ratio=0.3", "csp:keep_ratio=0.5,text_keep=0.5"]
)
def test_generation_equals_calls_of_the_stock_model_by_hand(family, spec):
    """No hook of the oracle takes part but the mask."""
    if not supported(family, spec):
        return
    model, inputs = model_of(family), inputs_of(family, "one" if family == "Whisper" else "ragged")
    if family == "Whisper":  # its generation begins with more tokens than one
        inputs = {"input_features": inputs["input_features"]}
    with kvprune.compress(model, spec, reread=True) as run:
        logits = generate(model, inputs, 3)[1]
    if family == "Whisper":
        logits = logits[:1]
    expected = by_hand(model, inputs, run, len(logits))
    assert (logits - expected).abs().max() <= 1e-6  # generate returns float32


@families
def test_the_first_answer_shows_what_was_dropped_and_full_changes_nothing(family):
    model, inputs = model_of(family), inputs_of(family)
    stock = generate(model, inputs)[1]
    for spec, changes in (("full", False), ("norm:keep_ratio=0.3", True)):
        with kvprune.compress(model, spec) as plain:
            without = generate(model, inputs)[1]
        with kvprune.compress(model, spec, reread=True) as run:
            logits = generate(model, inputs)[1]
        assert torch.equal(without[0], stock[0])
        assert bool((logits[0] - stock[0]).abs().max() > 1e-2) == changes
        assert changes or (logits - stock).abs().max() <= TOLERANCE[torch.float64]
        assert run.selections == plain.selections
        assert (run.report.rereads, plain.report.rereads) == (1, 0)
        assert run.report.to_dict()["rereads"] == 1
        assert run.report.bytes_held == plain.report.bytes_held
        assert run.report.kept_fraction == plain.report.kept_fraction
        line = "the last token of 1 prompt was read again from the pruned cache"
        assert line in str(run.report)
        assert line not in str(plain.report)


def test_pruned_text_is_held_as_without():
    model, inputs = mllama(), mllama_inputs(LAYOUTS[2])
    caches, runs = [], []
    for reread in (False, True):
        with kvprune.compress(model, SomeText(), reread=reread) as run, torch.no_grad():
            caches.append(returned_cache(model(**inputs, use_cache=True)))
            assert run.report.verify() == run.report.bytes_held
        runs.append(run)
    assert runs[0].text_selections == runs[1].text_selections
    assert runs[0].report.text_bytes_held == runs[1].report.text_bytes_held
    assert runs[0].report.to_dict()["text_layers"] == runs[1].report.to_dict()["text_layers"]
    for layer_idx in runs[0].text_selections:
        one, other = (cache.layers[layer_idx] for cache in caches)
        assert (one.seen, one.held) == (other.seen, other.held)
        assert torch.equal(one.tokens().expand(-1, 2, -1), other.tokens().expand(-1, 2, -1))
        assert torch.equal(one.is_real(), other.is_real())
        assert torch.equal(one.keys[..., :-1, :], other.keys[..., :-1, :])
        assert layer_idx == 0 or not torch.equal(one.keys[..., -1:, :], other.keys[..., -1:, :])


@pytest.mark.parametrize(
    "policy", ["trim:keep_ratio=0.3", "norm:keep_ratio=0.3", SomeText(cross=False)], ids=str
)
def test_a_later_image_is_read_again_and_a_turn_of_text_is_not(policy):
    model = mllama(torch.float64)
    whole = mllama_inputs(("tt4tt1tt", "t1tt2ttt"), dtype=torch.float64)
    first, second = turns(whole, 5, 1)
    calls = []
    with kvprune.compress(model, policy, reread=True) as run, torch.no_grad():
        cache = returned_cache(model(**first, use_cache=True))
        one = run.selections, run.prefill_selections
        text = run.text_selections
        handle = model.model.register_forward_hook(lambda *call: calls.append(call[0]))
        logits = generate(model, second, past_key_values=cache)[1]
        handle.remove()
    assert (run.report.rereads, run.report.prefills) == (2, 2)
    assert len(calls) == 2 + len(logits) - 1  # the prompt, its last token, and the answer
    with masked_oracle(model, *one, text_selections=text, reread=True), torch.no_grad():
        cache = returned_cache(model(**first, use_cache=True))
    oracle = masked_oracle(
        model,
        run.selections,
        run.prefill_selections,
        text_selections=run.text_selections,
        prefill_text_selections=text,
        reread=True,
    )
    with oracle:
        expected = generate(model, second, past_key_values=cache)[1]
    assert (logits - expected).abs().max() <= 1e-9
    only_text = {
        name: value for name, value in second.items() if "pixel" not in name and "aspect" not in name
    }
    only_text["cross_attention_mask"] = only_text["cross_attention_mask"][:, :, :1]
    with kvprune.compress(model, policy, reread=True) as run, torch.no_grad():
        cache = returned_cache(model(**first, use_cache=True))
        generate(model, only_text, past_key_values=cache)
    assert run.report.rereads == 1


@families
@pytest.mark.parametrize("spec", SPECS)
def test_draft_tokens_give_the_tokens_of_greedy_search(family, spec):
    model, inputs = model_of(family), inputs_of(family, "one")
    with kvprune.compress(model, spec, reread=True):
        greedy = generate(model, inputs, 12)[0]
    with kvprune.compress(model, spec, reread=True):
        drafted = generate(model, inputs, 12, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(greedy, drafted)


def prompt_of(family, dtype=torch.float64):
    inputs = inputs_of(family, dtype=dtype)
    if family != "Mllama":
        inputs["decoder_input_ids"] = torch.tensor([[2, 5, 6]] * 3)
    return {**inputs, "use_cache": True}


@families
@pytest.mark.parametrize(
    "options",
    [
        {"return_dict": False},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    ],
)
def test_all_that_a_call_returns_has_the_row_that_was_read_again(family, options):
    model = model_of(family, torch.float32, "eager")
    prompt = prompt_of(family, torch.float32)
    parts = {"hidden_states", "decoder_hidden_states", "attentions", "decoder_attentions", "cross_attentions"}
    with torch.no_grad(), kvprune.compress(model, "norm:keep_ratio=0.3", reread=True) as run:
        got = model(**prompt, **options)
    plain = {name: value for name, value in options.items() if name != "return_dict"}
    with torch.no_grad(), kvprune.compress(model, "norm:keep_ratio=0.3"):
        before = model(**prompt, **plain)
    with torch.no_grad(), oracle_of(model, run):
        expected = model(**prompt)
    logits = got[0] if isinstance(got, tuple) else got.logits
    assert (logits - expected.logits).abs().max() <= TOLERANCE[torch.float32]
    if isinstance(got, tuple):
        got = dict(zip(before.keys(), got, strict=True))
    for name in parts & set(before.keys()):
        assert len(got[name]) == len(before[name])
        for mine, theirs in zip(got[name], before[name], strict=True):
            assert mine.shape == theirs.shape
            assert torch.equal(mine[..., :-1, :], theirs[..., :-1, :])
        assert any(not torch.equal(*pair) for pair in zip(got[name], before[name], strict=True))


@families
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_hooks_of_others_count_once(family, first):
    """A hook that steers the model, added before or after ours, changes each row once."""
    model, prompt = copy.deepcopy(model_of(family)), prompt_of(family)
    inner = model.model if family == "Mllama" else model.get_decoder()

    def before(module, args, kwargs):
        ids = kwargs.pop("input_ids")
        return args, {**kwargs, "inputs_embeds": model.get_input_embeddings()(ids) * 1.5}

    def steer(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + 0.3}

    def after(module, args, output):
        output.last_hidden_state = output.last_hidden_state * 2 + 0.1
        return output

    def hook():
        return [
            inner.register_forward_pre_hook(steer, with_kwargs=True),
            inner.register_forward_hook(after),
        ]

    embed = inner.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    run = kvprune.compress(model, "norm:keep_ratio=0.3", reread=True)
    handles = hook() if first else []
    with run, torch.no_grad():
        handles += [] if first else hook()
        got = model(**prompt).logits
    with torch.no_grad(), oracle_of(model, run):
        for handle in (*handles, embed):
            handle.remove()
        steered = model(**prompt).logits
    reference = Steered(model, inner, before, steer, after)
    with reference.hooked(), torch.no_grad():
        expected = reference.by_hand(prompt, run)
    assert (got - steered).abs().max() > 1e-3
    assert (got - expected).abs().max() <= 1e-9


class Steered:
    """The steered stock model, whose prompt's last token is read again by calls of the inner module."""

    def __init__(self, model, inner, *hooks):
        self.model, self.inner, self.hooks = model, inner, hooks

    @contextlib.contextmanager
    def hooked(self):
        before, steer, after = self.hooks
        handles = [
            self.inner.register_forward_pre_hook(before, with_kwargs=True),
            self.inner.register_forward_pre_hook(steer, with_kwargs=True),
            self.inner.register_forward_hook(after),
        ]
        yield
        for handle in handles:
            handle.remove()

    def by_hand(self, prompt, run):
        with masked_oracle(self.model, run.selections, run.prefill_selections):
            out = self.model(**prompt)
            cache, step = returned_cache(out), dict(prompt)
            text = getattr(cache, "self_attention_cache", None)
            for layer_idx, layer in enumerate((text or cache).layers):
                if text is not None or layer_idx not in run.selections:
                    layer.crop(-1)
            name = "input_ids" if text is None else "decoder_input_ids"
            step[name] = step[name][:, -1:]
            if text is None:
                for image in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                    del step[image]
            again = self.model(**step, **cache_argument(self.model, cache)).logits
        return torch.cat([out.logits[:, :-1], again], 1)


@families
def test_gradients_are_those_of_the_oracle(family):
    """Training with a cache is allowed: the loss sees the row that was read again."""
    model, prompt = copy.deepcopy(model_of(family)), prompt_of(family)
    model.train()
    found = []
    torch.manual_seed(0)
    with kvprune.compress(model, "norm:keep_ratio=0.3", reread=True) as run:
        model(**prompt).logits[:, -1].square().sum().backward()
    found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    torch.manual_seed(0)
    with oracle_of(model, run):
        model(**prompt).logits[:, -1].square().sum().backward()
    found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].norm() > 0.1
    assert (found[0] - found[1]).abs().max() <= 1e-9 * found[1].abs().max()


def refused(family, message, error=UnsupportedCacheError, *, model=None, **call):
    model = model or model_of(family)
    with pytest.raises(error, match=message), kvprune.compress(model, "trim", reread=True), torch.no_grad():
        model(**{**prompt_of(family), **call})


@families
def test_a_call_without_a_cache_is_refused(family):
    refused(family, r"was called without one \(use_cache=False.* use_cache=True", use_cache=False)


@families
def test_a_prompt_that_ends_with_padding_is_refused(family):
    name = "attention_mask" if family == "Mllama" else "decoder_attention_mask"
    if family == "Whisper":
        name = "decoder_attention_mask"
    prompt = prompt_of(family)
    tokens = prompt["input_ids" if family == "Mllama" else "decoder_input_ids"]
    mask = torch.ones_like(tokens)
    mask[1, -1] = 0
    refused(family, r"rows \[1\] of this .* batch end with padding; pad on the left", **{name: mask})


def test_a_sample_that_is_all_padding_is_no_reason_to_refuse():
    model, inputs = mllama(torch.float64), mllama_inputs(("tt4ttt", "t1tt"), dtype=torch.float64)
    inputs["attention_mask"][1] = 0
    with torch.no_grad():
        stock = model(**inputs).logits
        with kvprune.compress(model, "full", reread=True):
            got = model(**inputs).logits
    assert (got - stock)[0].abs().max() <= 1e-9


@families
def test_a_cache_that_cannot_be_cut_is_refused(family):
    model, inputs = model_of(family), inputs_of(family)
    with (
        pytest.raises(UnsupportedCacheError, match="cannot be removed from a StaticLayer, at layer 0"),
        kvprune.compress(model, "trim", reread=True),
    ):
        generate(model, inputs, cache_implementation="static")


def sliding(window):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.layers = [
        DynamicSlidingWindowLayer(window) for _ in bart().model.decoder.layers
    ]
    return cache


def test_a_sliding_window_is_refused_once_it_is_full():
    refused("BART", "a sliding window of 3 after 3 tokens, at layer 0", past_key_values=sliding(3))
    model, prompt = model_of("BART"), prompt_of("BART")
    with torch.no_grad(), kvprune.compress(model, "norm:keep_ratio=0.3", reread=True):
        expected = model(**prompt).logits
        got = model(**prompt, past_key_values=sliding(4)).logits
    assert torch.equal(got, expected)


def test_an_offloaded_text_cache_is_refused():
    config = model_of("BART").config
    cache = EncoderDecoderCache(DynamicCache(config=config, offloading=True), DynamicCache())
    refused("BART", "from a DynamicCache that offloads its layers", past_key_values=cache)


def test_layers_that_are_skipped_in_training_are_refused():
    model = tiny_bart(1, dtype=torch.float64).train()
    model.model.decoder.layerdrop = 0.5
    refused("BART", r"skips layers in training \(layerdrop is 0.5\)", UnsupportedModelError, model=model)


def test_an_argument_of_which_nobody_knows_its_last_row_is_refused():
    message = r"nobody says how the argument 'bias' \(Tensor\) looks then"
    model, prompt = model_of("BART"), prompt_of("BART")
    decoder, states = model.get_decoder(), torch.zeros(3, 9, model.config.d_model, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match=message), kvprune.compress(model, "trim", reread=True):
        decoder(prompt["decoder_input_ids"], encoder_hidden_states=states, use_cache=True, bias=states)


def test_an_output_without_a_last_row_is_refused():
    model, prompt = copy.deepcopy(model_of("Mllama")), prompt_of("Mllama")

    def cut(module, args, output):
        output.last_hidden_state = (
            output.last_hidden_state[:, :, :-1]
            if output.last_hidden_state.shape[1] > 1
            else output.last_hidden_state
        )
        return output

    with (
        model.model.register_forward_hook(cut),
        pytest.raises(UnsupportedModelError, match="MllamaModel returns, but last_hidden_state has none"),
        kvprune.compress(model, "trim", reread=True),
        torch.no_grad(),
    ):
        model(**prompt)


class Unaware(BartAdapter):
    """A third party's adapter that knows nothing of re-reading."""

    rereads = False


def test_an_adapter_that_cannot_is_refused_by_name():
    assert not ModelAdapter.rereads
    model = bart()
    with pytest.raises(UnsupportedModelError, match="the adapter Unaware for BART cannot do"):
        Compression(Unaware(model), kvprune.get_policy("trim"), 0, reread=True)


class Forgets(BartAdapter):
    """An adapter that says it can, and does not."""

    def _after_decoder(self, module, args, kwargs, output):
        self.finish_call(completed=output is not None)


def test_an_adapter_that_does_not_read_again_is_no_silent_no_op():
    model = model_of("BART")
    run = Compression(Forgets(model), kvprune.get_policy("trim"), 0, reread=True)
    with (
        pytest.raises(CompressionStateError, match="did not read the last token again"),
        run,
        torch.no_grad(),
    ):
        model(**prompt_of("BART"))


def test_reread_is_true_or_false():
    with pytest.raises(CompressionStateError, match="reread is True or False, got 'yes'"):
        kvprune.compress(bart(), "trim", reread="yes")


@families
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("spec", ["norm:keep_ratio=0.3", "prefixkv:keep_ratio=0.3"])
def test_a_broken_second_call_leaves_nothing_behind(family, error, spec):
    """Broken off at the start, in the middle and at the end of the second call."""
    model, prompt = copy.deepcopy(model_of(family)), prompt_of(family)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with torch.no_grad(), kvprune.compress(model, spec, reread=True) as run:
        expected, kept = model(**prompt).logits, run.selections

    def fail():
        raise error

    calls = leaf_calls(model, prompt, spec, reread=True)
    second = calls - leaf_calls(model, prompt, spec, reread=False)
    with torch.no_grad(), kvprune.compress(model, spec, reread=True) as run:
        for number in (calls - second, calls - second // 2, calls - 1):
            with pytest.raises(error), acting_at(model, number, fail):
                model(**prompt)
            assert (run.report.prefills, run.report.rereads) == (0, 0)
        assert torch.equal(model(**prompt).logits, expected)
        assert run.selections == kept
        assert (run.report.prefills, run.report.rereads) == (1, 1)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def leaf_calls(model, prompt, spec, *, reread):
    counted = []
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(lambda *call: counted.append(1)) for leaf in leaves]
    with torch.no_grad(), kvprune.compress(model, spec, reread=reread):
        model(**prompt)
    for handle in handles:
        handle.remove()
    return len(counted)


def test_another_thread_is_refused_while_the_last_token_is_read_again():
    model, prompt = copy.deepcopy(model_of("BART")), prompt_of("BART")
    errors = []

    def call():
        try:
            model(**prompt)
        except CompressionStateError as error:
            errors.append(str(error))

    def from_another_thread(module, args, kwargs):
        if kwargs["input_ids"].shape[1] == 1:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    with torch.no_grad(), kvprune.compress(model, "norm:keep_ratio=0.3", reread=True) as run:
        expected = model(**prompt).logits
        with model.get_decoder().register_forward_pre_hook(from_another_thread, with_kwargs=True):
            got = model(**prompt).logits
    assert len(errors) == 1
    assert "is inside a forward call" in errors[0]
    assert torch.equal(got, expected)
    assert run.report.rereads == 2


def test_a_copy_of_the_model_is_free_and_a_pause_reads_nothing_again():
    model, prompt = copy.deepcopy(model_of("BART")), prompt_of("BART")
    with torch.no_grad():
        stock = model(**prompt).logits
        with kvprune.compress(model, "norm:keep_ratio=0.3", reread=True) as run:
            assert torch.equal(copy.deepcopy(model)(**prompt).logits, stock)
            with run._adapter.paused():
                assert torch.equal(model(**prompt).logits, stock)
            assert run.report.rereads == 0
            model(**prompt)
    assert run.report.rereads == 1


@pytest.mark.parametrize("family", ["Mllama", "BART"])
def test_a_model_that_guides_itself_reads_only_its_own_prompt_again(family):
    model, inputs = model_of(family), inputs_of(family)
    with kvprune.compress(model, "guided:keep_ratio=0.3") as plain:
        generate(model, inputs)
    with kvprune.compress(model, "guided:keep_ratio=0.3", reread=True) as run:
        logits = generate(model, inputs)[1]
    assert run.selections == plain.selections
    assert (run.report.rereads, run.report.guide.forward_calls) == (1, plain.report.guide.forward_calls)
    with oracle_of(model, run):
        expected = generate(model, inputs)[1]
    assert (logits - expected).abs().max() <= 1e-9


def test_a_hook_that_others_put_before_ours_is_refused():
    model, prompt = copy.deepcopy(model_of("BART")), prompt_of("BART")
    with (
        pytest.raises(UnsupportedModelError, match=r"added with prepend=True inside the block"),
        kvprune.compress(model, "trim", reread=True),
        torch.no_grad(),
        model.get_decoder().register_forward_pre_hook(lambda *call: None, prepend=True),
    ):
        model(**prompt)
