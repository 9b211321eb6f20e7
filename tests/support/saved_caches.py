"""Prompts that are read once and asked later: from a file, and by hand."""

from __future__ import annotations

import copy

import torch
from generation import generate, mllama

import kvprune
from kvprune.testing import mllama_inputs

LAYOUT = ["tt4ttt", "t1tt", "tt2tttt"]  # left padding, padding tiles, ragged selections


def questions(rows, seed=3, length=4):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def by_hand(inputs, cache, question, repeats=1):
    """Return the arguments of generate that continue a cache, without what is tested here."""
    cache = copy.deepcopy(cache)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    mask = inputs["cross_attention_mask"]
    return {
        "input_ids": torch.cat([inputs["input_ids"], question], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(question)], 1),
        "cross_attention_mask": torch.cat([mask, mask[:, -1:].expand(-1, question.shape[1], -1, -1)], 1),
        "past_key_values": cache,
    }


def answer(model, arguments, **way):
    torch.manual_seed(0)
    way |= {name: arguments.pop(name) for name in ("do_sample", "num_beams") if name in arguments}
    sequences, logits, _ = generate(model, arguments, steps=3, **way)
    return sequences, logits


def saved_mllama(path, spec="keydiff:keep_ratio=0.3", layout=LAYOUT, **options):
    """Return a model, the inputs of its prompt, the run, the cache, and the cache from a file."""
    model, inputs = mllama(), mllama_inputs(layout, dtype=torch.float32)
    with kvprune.compress(model, spec, seed=5, **options) as run:
        cache = model(**inputs).past_key_values
        run.save(cache, path, inputs)
    return model, inputs, run, cache, kvprune.load_cache(path, model)
