"""Calls that are broken off, calls from several threads, and what is handed in or told apart by hand."""

from __future__ import annotations

import random
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

import kvprune
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.families.whisper import WhisperAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.engine.manager import CrossKVManager
from kvprune.errors import CompressionStateError, UnsupportedModelError
from kvprune.testing.conformance.models.moments import acting_at

ADAPTERS = [MllamaAdapter, BartAdapter, WhisperAdapter]
families = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
encoder_decoders = pytest.mark.parametrize("adapter", ADAPTERS[1:], ids=lambda adapter: adapter.__name__)

ONWARD = "random:keep_ratio=0.3,reach=onward"


def generate(model, inputs, **options):
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 3, **options})


def answer(model, inputs, run, **options):
    """Return what a call generates, and what it keeps."""
    tokens = generate(model, inputs, **options).tolist()
    return tokens, dict(run.selections), dict(run.prefill_selections)


def in_a_fresh_block(model, inputs, spec, reread=False, **options):
    with kvprune.compress(model, spec, reread=reread) as run:
        return answer(model, inputs, run, **options)


def interrupt():
    raise KeyboardInterrupt


def leaf_calls(model, inputs):
    """Return how many calls of modules without children a generation makes."""
    counted, handles = [0], []

    def count(*call):
        counted[0] += 1

    for module in model.modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(count))
    generate(model, inputs)
    for handle in handles:
        handle.remove()
    return counted[0]


@families
@pytest.mark.parametrize(
    ("spec", "reread"),
    [
        pytest.param(ONWARD, True, id="onward-reread"),
        pytest.param("trim:keep_ratio=0.3", False, id="trim-once"),
        pytest.param(ONWARD, False, id="onward-once", marks=pytest.mark.slow),
        pytest.param("trim:keep_ratio=0.3", True, id="trim-reread", marks=pytest.mark.slow),
    ],
)
def test_after_each_of_20_random_interrupts_the_next_answer_is_that_of_a_fresh_block(adapter, spec, reread):
    """The interrupt comes in the encoder, in the prefill, while it is read again, or in a decode step."""
    model, inputs = adapter.example(torch.float64)
    other = {name: tensor.flip(0) for name, tensor in inputs.items()}
    expected = {id(batch): in_a_fresh_block(model, batch, spec, reread) for batch in (inputs, other)}
    with kvprune.compress(model, spec, reread=reread):
        calls = leaf_calls(model, inputs)
    draw = random.Random(7)
    with kvprune.compress(model, spec, reread=reread) as run:
        for _ in range(20):
            number, batch, then = draw.randint(1, calls), *draw.choices([inputs, other], k=2)
            with pytest.raises(KeyboardInterrupt), acting_at(model, number, interrupt):
                generate(model, batch)
            assert answer(model, then, run) == expected[id(then)], f"after an interrupt at {number}"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@contextmanager
def frequent_switches():
    """Let Python switch between threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@families
def test_each_of_40_calls_from_two_threads_is_right_or_refused(adapter):
    model, inputs = adapter.example(torch.float64)
    batches = [inputs, {name: tensor.flip(0)[:1] for name, tensor in inputs.items()}]
    if adapter is not MllamaAdapter:
        for batch in batches:
            batch["decoder_input_ids"] = torch.full((len(next(iter(batch.values()))), 3), 5)
    spec, expected, got = "trim:keep_ratio=0.3", [], ([], [])
    for batch in batches:
        with torch.no_grad(), kvprune.compress(model, spec):
            expected.append(model(**batch, use_cache=True).logits)
    together = threading.Barrier(2)

    def call(thread):
        for _ in range(20):
            together.wait(60)
            try:
                with torch.no_grad():
                    got[thread].append(model(**batches[thread], use_cache=True).logits)
            except Exception as error:
                got[thread].append(error)

    with frequent_switches(), kvprune.compress(model, spec):
        threads = [threading.Thread(target=call, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    assert [len(results) for results in got] == [20, 20]
    right = 0
    for results, wanted in zip(got, expected, strict=True):
        for result in results:
            if isinstance(result, Exception):
                assert isinstance(result, CompressionStateError), repr(result)
                assert "thread" in str(result)
            else:
                assert (result - wanted).abs().max() <= 1e-6
                right += 1
    assert right >= 20  # of two calls at the same time, one is answered


@pytest.mark.parametrize("adapter", [BartAdapter, MllamaAdapter], ids=["bart", "mllama"])
def test_a_call_whose_prefill_is_being_ended_is_still_a_call(adapter, monkeypatch):
    """Otherwise the next call of another thread would begin a prefill that the first one then ends."""
    model, inputs = adapter.example(torch.float64)
    if adapter is not MllamaAdapter:
        inputs["decoder_input_ids"] = torch.full((len(next(iter(inputs.values()))), 3), 5)
    with torch.no_grad(), kvprune.compress(model, "trim:keep_ratio=0.3"):
        expected = model(**inputs, use_cache=True).logits
    found, end = [], CrossKVManager.end

    def call():
        try:
            with torch.no_grad():
                found.append(model(**inputs, use_cache=True).logits)
        except CompressionStateError as error:
            found.append(error)

    def meanwhile(self, *, completed, **options):
        if completed and not found:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join(60)
        end(self, completed=completed, **options)

    monkeypatch.setattr(CrossKVManager, "end", meanwhile)
    with torch.no_grad(), kvprune.compress(model, "trim:keep_ratio=0.3") as run:
        logits = model(**inputs, use_cache=True).logits
        assert torch.equal(logits, expected)
        assert run.report.prefills == 1
        assert torch.equal(model(**inputs, use_cache=True).logits, expected)
    assert isinstance(found[0], CompressionStateError), found


@contextmanager
def rows_told_apart(model, rows):
    """Add another bias to each row of what the decoder embeds."""
    embedding = model.get_decoder().embed_tokens
    bias = torch.randn(rows, 1, embedding.embedding_dim, generator=torch.Generator().manual_seed(3))

    def add(module, args, output):
        return output + bias.to(output.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


SEQUENCES = {"num_return_sequences": 2, "do_sample": True}


@pytest.mark.parametrize(
    ("adapter", "options"),
    # Whisper repeats samples itself before it generates, so its return sequences share nothing.
    [*((adapter, {"num_beams": 2}) for adapter in ADAPTERS), *((cls, SEQUENCES) for cls in ADAPTERS[:2])],
)
def test_copies_of_a_sample_that_a_hook_tells_apart_are_refused_by_name(adapter, options):
    model, inputs = adapter.example(torch.float64)
    with (
        rows_told_apart(model, 2 * len(next(iter(inputs.values())))),
        kvprune.compress(model, "norm:keep_ratio=0.3"),
        pytest.raises(UnsupportedModelError, match=r"at layer \d+ their hidden states differ by .*hook"),
    ):
        generate(model, inputs, **options)


@families
def test_samples_that_a_hook_tells_apart_are_not_refused(adapter):
    model, inputs = adapter.example(torch.float64)
    twice = {name: torch.cat([tensor[:1]] * 2) for name, tensor in inputs.items()}
    with rows_told_apart(model, 2), kvprune.compress(model, "trim:keep_ratio=0.3") as run:
        generate(model, twice)
    kept = next(iter(run.selections.values())).to_mask()
    assert not torch.equal(kept[0], kept[1])


@encoder_decoders  # transformers itself refuses to split the pixels of an Mllama
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_prompt_in_chunks_is_refused_by_the_name_of_the_option(adapter, chunk):
    model, inputs = adapter.example(torch.float64)
    inputs["decoder_input_ids"] = torch.tensor([[3, 5, 6, 7]] * len(next(iter(inputs.values()))))
    with (
        kvprune.compress(model, "norm:keep_ratio=0.3"),
        pytest.raises(UnsupportedModelError, match=rf"prefill_chunk_size={chunk} passes the prompt"),
    ):
        generate(model, inputs, prefill_chunk_size=chunk)


@pytest.mark.parametrize("chunk", [4, 9])
def test_one_chunk_for_the_whole_prompt_is_right_unless_transformers_cuts_the_mask_of_the_encoder(chunk):
    model, inputs = BartAdapter.example(torch.float64)
    spec, inputs["decoder_input_ids"] = "norm:keep_ratio=0.3", torch.tensor([[2, 5, 6, 7]] * 3)
    short = {name: tensor[:, :4].contiguous() for name, tensor in inputs.items()}  # as long as the prompt
    whole = in_a_fresh_block(model, short, spec, prefill_chunk_size=chunk)
    assert whole == in_a_fresh_block(model, short, spec)
    with (
        kvprune.compress(model, spec),
        pytest.raises(UnsupportedModelError, match=rf"prefill_chunk_size={chunk} .* mask is cut"),
    ):
        generate(model, inputs, prefill_chunk_size=chunk)


@encoder_decoders
@pytest.mark.parametrize("spec", [ONWARD, "trim:keep_ratio=0.3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams", "two"],
)
def test_encoder_outputs_by_hand_generate_what_their_input_does(adapter, spec, options):
    if adapter is WhisperAdapter and "num_return_sequences" in options:
        pytest.skip("transformers itself repeats the features of Whisper, which are not given here")
    model, inputs = adapter.example(torch.float64)
    expected = in_a_fresh_block(model, inputs, spec, **options)
    name = model.main_input_name
    mask = {key: value for key, value in inputs.items() if key == "attention_mask"}
    with torch.no_grad():
        encoded = model.get_encoder()(inputs[name], **mask)
    with kvprune.compress(model, spec) as run:
        generate(model, {key: value.flip(0)[:1] for key, value in inputs.items()})
        by_hand = answer(model, {**mask, "encoder_outputs": encoded}, run, **options)
    assert by_hand == expected
