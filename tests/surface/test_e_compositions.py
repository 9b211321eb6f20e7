"""What a model under compression may be combined with, and what may happen to it."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from families import SPECS, compressed, inputs_of, model_of
from generation import difference_to_oracle, generate
from surface_table import refused, works

import kvprune
from kvprune.errors import (
    CompressionStateError,
    PolicyNeverRanError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from kvprune.testing import masked_oracle, tiny_bart, tiny_mllama, tiny_whisper

AREA = "Compositions"
ENCODER_DECODERS = ("BART", "Whisper")
TINY = {"Mllama": tiny_mllama, "BART": tiny_bart, "Whisper": tiny_whisper}


@works(AREA, "self-speculation (assistant_early_exit)", "greedy under the same policy", ENCODER_DECODERS)
def test_self_speculation(family):
    model, inputs = model_of(family), inputs_of(family, "one")
    for spec in SPECS:
        greedy = compressed(model, inputs, spec, steps=10)[0]
        assert torch.equal(compressed(model, inputs, spec, steps=10, assistant_early_exit=2)[0], greedy)


@works(AREA, "teacher forcing with any logits_to_keep", "the whole logits under the same policy", ("Mllama",))
def test_logits_to_keep(family):
    model, inputs = model_of(family), inputs_of(family)
    for spec in SPECS:
        with torch.no_grad(), kvprune.compress(model, spec) as run:
            whole = model(**inputs).logits
            chosen = run.selections
            for keep in (1, 3, 5, 40, torch.tensor([0, 2])):
                logits = model(**inputs, logits_to_keep=keep).logits
                rows = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
                assert (logits - whole[:, rows]).abs().max() <= 1e-12  # another matrix product
                assert run.selections == chosen


@works(AREA, "encoder outputs by hand", "the input that they were made from", ENCODER_DECODERS)
def test_encoder_outputs(family):
    model, inputs = model_of(family), inputs_of(family)
    mask = {name: value for name, value in inputs.items() if name == "attention_mask"}
    with torch.no_grad():
        encoded = {"encoder_outputs": model.get_encoder()(**inputs), **mask}
    for spec in (*SPECS, "random:keep_ratio=0.3"):
        for options in ({}, {"num_beams": 2}):
            expected = compressed(model, inputs, spec, **options)
            found = compressed(model, copy.deepcopy(encoded), spec, **options)
            assert torch.equal(found[0], expected[0])
            assert found[2].selections == expected[2].selections


@works(
    AREA,
    "attention weights (output_attentions, eager)",
    "the oracle's, over all columns, float32; 0 at dropped ones",
)
def test_attention_weights(family):
    model = model_of(family, torch.float32, "eager")
    inputs = inputs_of(family, dtype=torch.float32)  # stock's eager attention gives NaN at padding in float64
    if family != "Mllama":
        inputs["decoder_input_ids"] = torch.tensor([[2, 5, 6]] * 3)
    name = "attentions" if family == "Mllama" else "cross_attentions"
    for spec in ("trim:keep_ratio=0.3", "norm:keep_ratio=0.3,reach=onward"):
        with torch.no_grad(), kvprune.compress(model, spec) as run:
            found = getattr(model(**inputs, use_cache=True, output_attentions=True), name)
        with torch.no_grad(), masked_oracle(model, run.selections, run.prefill_selections):
            expected = getattr(model(**inputs, use_cache=True, output_attentions=True), name)
        for layer_idx in run.selections:
            mine, theirs = found[layer_idx], expected[layer_idx]
            assert mine.shape == theirs.shape
            seen = torch.ones(mine.shape[0], mine.shape[2], dtype=torch.bool)
            if family == "Mllama":  # in stock, rows before the image attend to all columns, dropped or not
                seen &= inputs["cross_attention_mask"].flatten(2).any(-1)
            assert (mine - theirs).transpose(1, 2)[seen].abs().max() <= 1e-5


@works(AREA, "word timestamps (return_token_timestamps)", "stock's if nothing is dropped", ("Whisper",))
def test_word_timestamps(family):
    model = tiny_whisper(1, dtype=torch.float64, attn_implementation="eager")
    model.generation_config.alignment_heads = [[0, 0], [1, 1], [2, 2]]
    model.generation_config.no_timestamps_token_id = 50
    wanted = {"return_token_timestamps": True, "return_timestamps": False, "return_dict_in_generate": True}

    def times():
        return model.generate(**inputs_of(family), do_sample=False, max_new_tokens=8, **wanted)[
            "token_timestamps"
        ]

    stock = times()
    for spec in (*SPECS, "divprune:keep_ratio=0.3"):
        with kvprune.compress(model, spec):
            found = times()
        assert spec != "full" or torch.equal(found, stock)
        assert found.isfinite().all()
        assert (found.diff() >= 0).all()


@works(AREA, "deep copies of the model in a block", "stock; the copy is free")
def test_deep_copy(family):
    model, inputs = model_of(family), inputs_of(family)
    stock = generate(model, inputs)[1]
    with kvprune.compress(model, "norm:keep_ratio=0.1") as run:
        expected = generate(model, inputs)[1]
        free = copy.deepcopy(model)
        assert torch.equal(generate(free, inputs)[1], stock)
        assert torch.equal(generate(model, inputs)[1], expected)  # and the model is still under the policy
        assert run.report.prefills == 2
    assert difference_to_oracle(free, inputs, "trim:keep_ratio=0.3") <= 1e-6


@works(AREA, "pickles of the model in a block", "stock; what is read back is free")
def test_pickle(family):
    model, inputs, file = TINY[family](1, dtype=torch.float64), inputs_of(family), io.BytesIO()
    stock = generate(model, inputs)[1]
    with kvprune.compress(model, "norm:keep_ratio=0.1"):
        generate(model, inputs)
        pickle.dump(model, file)
    file.seek(0)
    assert torch.equal(generate(pickle.load(file), inputs)[1], stock)


@works(AREA, "the call after an interrupted one (Ctrl-C)", "a fresh block")
def test_interruption(family):
    def interrupt(*call):
        raise KeyboardInterrupt

    model, inputs = model_of(family), inputs_of(family)
    decoder = model.model.language_model if family == "Mllama" else model.get_decoder()
    for spec in (*SPECS, "norm:keep_ratio=0.3,reach=onward"):
        expected, _, fresh = compressed(model, inputs, spec)
        with kvprune.compress(model, spec) as run:
            hook = decoder.layers[-1].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                generate(model, inputs_of(family, "one"))
            hook.remove()
            assert run.report.prefills == run.report.encoder_inputs == 0
            assert not run.selections
            assert torch.equal(generate(model, inputs)[0], expected)
        assert run.selections == fresh.selections
        assert run.report.kept_fraction == fresh.report.kept_fraction


@refused(AREA, "a second thread in the middle of a call", "one thread at a time; use a lock, or copies")
def test_second_thread(family):
    model, inputs = model_of(family), inputs_of(family)
    decoder = model.model.language_model if family == "Mllama" else model.get_decoder()
    refusals = []

    def call():
        with pytest.raises(CompressionStateError, match="inside a forward call") as refusal:
            generate(model, inputs)
        refusals.append(refusal)

    def meanwhile(*call_of_the_layer):
        if threading.current_thread() is threading.main_thread() and not refusals:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    expected = compressed(model, inputs, "trim:keep_ratio=0.3")[1]
    hook = decoder.layers[1].register_forward_hook(meanwhile)
    found = compressed(model, inputs, "trim:keep_ratio=0.3")[1]
    hook.remove()
    assert refusals
    assert torch.equal(found, expected)


class Attention(torch.nn.Module):
    """Reads a cache layer as attention does."""

    def forward(self, layer):
        return layer.keys


@refused(
    AREA, "a pruned cache outside its block", "continue inside a block; nobody cuts masks", ("Mllama", "BART")
)
def test_cache_outside_its_block(family):
    model, inputs = model_of(family), inputs_of(family)
    with kvprune.compress(model, "norm:keep_ratio=0.3"):
        cache = generate(model, inputs)[2]
        flat = cache if family == "Mllama" else cache.cross_attention_cache
        held = flat.layers[1].keys.shape[-2]
    attention = Attention()
    for other in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat)), flat):
        with pytest.raises(UnsupportedCacheError, match="outside the block"):
            attention(other.layers[1])
        assert other.layers[1].keys.shape[-2] == held  # anybody may look


@refused(AREA, "a prompt in compiled code", "let `generate` compile decode steps (compile_config)", ("BART",))
def test_compiled_prompt(family):
    model = tiny_bart(1, dtype=torch.float64)
    for part in (model.model.encoder, model.model.decoder):
        part.layers = part.layers[:1]  # compiling takes long
    call = {"input_ids": inputs_of(family)["input_ids"], "decoder_input_ids": torch.tensor([[2]] * 3)}
    for spec in ("trim:keep_ratio=0.3", "quest"):
        torch._dynamo.reset()
        with kvprune.compress(model, spec) as run, torch.no_grad():
            model.model.decoder.compile(backend="eager")
            with pytest.raises(
                UnsupportedModelError, match=r"cannot be compiled.*compile_config=CompileConfig"
            ):
                model(**call)
            with torch.compiler.set_stance("force_eager"):
                model(**call)
            assert run.report.prefills == 1
        model.model.decoder._compiled_call_impl = None


@refused(AREA, "a model that was compiled before the block", "call the model itself", ("BART",))
def test_compiled_before(family):
    torch._dynamo.reset()
    model = tiny_bart(1, dtype=torch.float64)
    for part in (model.model.encoder, model.model.decoder):
        part.layers = part.layers[:1]  # compiling takes long
    compiled = torch.compile(model, backend="eager")
    call = {"input_ids": inputs_of(family)["input_ids"], "decoder_input_ids": torch.tensor([[2]] * 3)}
    with torch.no_grad():
        compiled(**call)
        with pytest.raises(PolicyNeverRanError, match="compile"), kvprune.compress(model, "norm"):
            compiled(**call)
