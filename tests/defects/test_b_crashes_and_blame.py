"""Part B of the known defects: crashes, users who are blocked, and errors that blame somebody else.

Each test asserts what is right, and failed before the defect was cured; what is still open is a strict
expected failure.

Left out or elsewhere:
    B0, B6, B8 (doctor, show) and B11 are in test_b_commands.py; B5, B7, B8 (scores) and B12 in
        test_b_contracts.py.
    B10 (shape of the cross keys under `full` with beams) is right, and only wants a sentence in the docs.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from defect_helpers import (
    chats,
    copied,
    followed_by,
    generate,
    on_models,
    or_refused,
    sounds,
    texts,
)

import kvprune
from kvprune.testing import tiny_bart, tiny_mllama, tiny_whisper

# B1: a sample that is nothing but padding.


def require_rows_as_alone(model: Any, batch: Any, rest: Any, rows: list[int], spec: str) -> None:
    """Generate from a batch with an empty sample; the other rows get what they get without it."""
    with kvprune.compress(model, spec):
        together = generate(model, batch)
    with kvprune.compress(model, spec):
        apart = generate(model, rest)
    assert torch.equal(together[rows], apart)


@on_models
@pytest.mark.parametrize(
    "spec", ["lossless", "norm:keep_ratio=0.5", "trim:keep_ratio=0.5", "divprune:keep_ratio=0.5"]
)
def test_b1_a_sample_that_is_all_padding_leaves_the_others_alone(spec: str) -> None:
    model, ids = tiny_bart(1, dtype=torch.float64), texts(3)
    mask = torch.ones_like(ids)
    mask[2] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    require_rows_as_alone(model, batch, {"input_ids": ids[:2], "attention_mask": mask[:2]}, [0, 1], spec)


@on_models
def test_b1_a_chat_that_is_all_padding_leaves_the_others_alone() -> None:
    model, batch = tiny_mllama(1, dtype=torch.float64), chats("tt4ttt", "t1tt", "tt2tttt")
    batch["attention_mask"][1] = 0
    rest = {name: value[[0, 2]] for name, value in batch.items()}
    require_rows_as_alone(model, batch, rest, [0, 2], "norm")


# B2: another decoder batch than audio batch (cured: refused by name).


@on_models
@pytest.mark.parametrize("spec", ["full", "norm:keep_ratio=0.5", "trim:keep_ratio=0.5"])
def test_b2_another_decoder_batch_than_audio_batch_passes_through_or_is_refused(spec: str) -> None:
    model = tiny_whisper(1, dtype=torch.float64)
    call = {"input_features": sounds(3), "decoder_input_ids": torch.tensor([[3, 5]])}
    with torch.no_grad():
        stock = model(**call).logits
        with or_refused(), kvprune.compress(model, spec):
            logits = model(**call, use_cache=True).logits
            assert spec != "full" or torch.equal(logits, stock)


# B3: a pruned cache outside its block.


def held_outside(
    model: Any, inputs: Any, *, mask: bool, spec: str = "norm:keep_ratio=0.3"
) -> tuple[Any, Any]:
    """Return the logits of a next step of Mllama within its block, and a function for those after it."""
    step = followed_by(inputs)
    if not mask:
        del step["cross_attention_mask"]
    with torch.no_grad(), kvprune.compress(model, "norm:keep_ratio=0.3"):
        cache = model(**inputs, use_cache=True).past_key_values
        inside = model(**step, past_key_values=copied(cache)).logits

    @torch.no_grad()
    def outside() -> torch.Tensor:
        logits: torch.Tensor = model(**step, past_key_values=cache).logits
        return logits

    return inside, outside


@on_models
def test_b3_a_pruned_cache_outside_its_block_is_read_rightly_or_refused() -> None:
    inside, outside = held_outside(tiny_mllama(1, dtype=torch.float64), chats("tt4ttt"), mask=True)
    with or_refused(match="block"):
        assert (outside() - inside).abs().max() <= 1e-6


@on_models
def test_b3_a_ragged_pruned_cache_outside_its_block_is_read_rightly_or_refused() -> None:
    inside, outside = held_outside(tiny_mllama(1, dtype=torch.float64), chats("tt4ttt", "t1tttt"), mask=False)
    with or_refused(match="block"):
        assert (outside() - inside).abs().max() <= 1e-6


@on_models
@pytest.mark.parametrize("masked", [True, False])
def test_b3_a_pruned_cache_of_bart_outside_its_block_is_read_rightly_or_refused(masked: bool) -> None:
    model, ids = tiny_bart(1, dtype=torch.float64), texts(2)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        with kvprune.compress(model, "norm:keep_ratio=0.5"):
            first = torch.tensor([[2], [2]])
            out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=first, use_cache=True)
            step = {"encoder_outputs": (out.encoder_last_hidden_state,), "decoder_input_ids": first + 3}
            cache = copied(out.past_key_values)
            inside = model(**step, attention_mask=mask, past_key_values=out.past_key_values).logits
        if masked:
            step["attention_mask"] = mask
        with or_refused(match="block"):
            assert (model(**step, past_key_values=cache).logits - inside).abs().max() <= 1e-6


# B4: copies and pickles of an attached model.

MODELS = {"mllama": (tiny_mllama, chats("tt4ttt")), "bart": (tiny_bart, {"input_ids": texts()})}


@on_models
@pytest.mark.parametrize("family", MODELS)
def test_b4_a_deep_copy_of_an_attached_model_is_free(family: str) -> None:
    make, inputs = MODELS[family]
    model = make(1, dtype=torch.float64)
    stock = generate(model, inputs, max_new_tokens=8)
    with kvprune.compress(model, "norm:keep_ratio=0.1"):
        free = copy.deepcopy(model)
        generate(model, inputs)
    with kvprune.compress(free, "full"):
        assert torch.equal(generate(free, inputs, max_new_tokens=8), stock)


@on_models
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_b4_a_pickle_of_an_attached_model_is_clean_or_refused(family: str, save: Callable[..., Any]) -> None:
    make, inputs = MODELS[family]
    model, file = make(1, dtype=torch.float64), io.BytesIO()
    stock = generate(model, inputs)
    with kvprune.compress(model, "norm:keep_ratio=0.1"):
        generate(model, inputs)
        with or_refused():
            save(model, file)
    if file.tell():
        file.seek(0)
        read = pickle.load(file) if save is pickle.dump else torch.load(file, weights_only=False)
        assert torch.equal(generate(read, inputs), stock)


# B9: compiled models, and prefill in chunks.


def compiled_before(compile_it: Callable[[Any], Any]) -> Any:
    """Compile a BART, run it once, run it under a policy, and return the compression."""
    torch._dynamo.reset()
    model = tiny_bart(1, dtype=torch.float64)
    for part in (model.model.encoder, model.model.decoder):
        part.layers = part.layers[:1]  # compiling takes long
    called = compile_it(model)
    call = {"input_ids": texts(), "decoder_input_ids": torch.tensor([[2]])}
    with torch.no_grad():
        called(**call, use_cache=True)
        with kvprune.compress(model, "norm:keep_ratio=0.5") as run:
            called(**call, use_cache=True)
    return run


def compile_decoder(model: Any) -> Any:
    """Compile the decoder in place."""
    model.model.decoder.compile(backend="eager")
    return model


@on_models
def test_b9_a_decoder_compiled_before_is_pruned_or_the_error_says_so() -> None:
    with or_refused(match="compile"):
        assert compiled_before(compile_decoder).report.prefills == 1


@on_models
def test_b9_a_model_compiled_before_is_pruned_or_the_error_says_so() -> None:
    with or_refused(match="compile"):
        assert compiled_before(lambda model: torch.compile(model, backend="eager")).report.prefills == 1


@on_models
@pytest.mark.parametrize("spec", ["full", "norm:keep_ratio=0.5"])
def test_b9_prefill_in_chunks_works_or_the_error_names_the_option(spec: str) -> None:
    model, ids = tiny_bart(1, dtype=torch.float64), texts(2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["decoder_input_ids"] = torch.tensor([[2, 5, 6, 7]] * 2)
    stock = generate(model, inputs, prefill_chunk_size=2)
    with or_refused(match="chunk"), kvprune.compress(model, spec):
        chunked = generate(model, inputs, prefill_chunk_size=2)
        assert spec != "full" or torch.equal(chunked, stock)
