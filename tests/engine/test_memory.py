"""Memory: what scoring holds alive at the dimensions of Llama-3.2-11B-Vision, and what caches really free."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from generation import generate, mllama

import kvprune
from kvprune import StepView
from kvprune.adapters.features import gather_features
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.policy import HeldView
from kvprune.session.answer_guide import AnswerGuide
from kvprune.testing import mllama_inputs
from kvprune.testing.cost import LLAMA_11B, PeakMemory, ask, make_problem, peak_memory

MIB = 1024 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    ["trim:k_ratio=0.05", "random", "uniform", "norm", "norm:of=raw_keys", "zipvl", "zipvl:low_bits=4"],
)
def test_scoring_needs_at_most_32_mib_at_11b_dimensions(spec, dtype):
    policy = kvprune.get_policy(spec)
    problem = make_problem(policy, dtype=dtype)
    peak = peak_memory(lambda: ask(policy, problem))
    assert peak <= 32 * MIB, f"{peak / MIB:.1f} MiB"


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [
        "fastv",
        "fastv:rows=mean",
        "csp",
        "h2o",
        "h2o:reach=onward",
        "vatp:preset=published",
        "expected:preset=published",
        "keydiff",
        "snapkv",
        "snapkv:pool=2d,reduction=max",
        "divprune:keep_tokens=8",
        "cdpruner:keep_tokens=8",
        pytest.param("topv:steps=1", marks=pytest.mark.slow),  # each further step repeats the same blocks
        "visionzip",
        "visionzip:keep_ratio=0.1,merge=sum",
        "prumerge",
        "prumerge:keep_ratio=0.5,plus=true",
        "adakv",
        "pyramid",
        "vlcache",
        "prefixkv",
        "aircache",
        "aircache:strength=output,alpha=0",
    ],
)
def test_scoring_of_published_methods_needs_at_most_64_mib_at_11b_dimensions(spec, dtype):
    policy = kvprune.get_policy(spec)
    problem = make_problem(policy, dtype=dtype)
    peak = peak_memory(lambda: ask(policy, problem))
    assert peak <= 64 * MIB, f"{peak / MIB:.1f} MiB"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressing_needs_at_most_96_mib_at_11b_dimensions_beside_its_weights(dtype):
    policy = kvprune.get_policy("quecc:weights=fresh")
    view = make_problem(policy, dtype=dtype)
    held = sum(tensor.nbytes for tensor in view.weights(policy).values())
    assert held <= 160 * MIB
    peak = peak_memory(lambda: policy.choose(view))
    assert peak <= 96 * MIB, f"{peak / MIB:.1f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choosing_in_steps_needs_at_most_4_mib_at_11b_dimensions(dtype):
    policy = kvprune.get_policy("quest:keep_ratio=0.1")
    layer = make_problem(policy, dtype=dtype).layer
    slots = torch.arange(layer.columns).expand(layer.batch, 1, -1)
    valid = torch.ones_like(slots, dtype=torch.bool)
    held = HeldView(
        layer=layer, keys=layer.keys, values=layer.values, slots=slots, valid=valid, columns=layer.columns
    )
    queries = torch.randn(layer.batch, LLAMA_11B.query_heads, LLAMA_11B.width, dtype=dtype)
    step = StepView(
        queries_of=lambda: queries,
        text_rows=layer.batch,
        keys=layer.keys,
        values=layer.values,
        slots_of=lambda: slots,
        readable_of=lambda: valid,
        number_of=lambda: torch.zeros((), dtype=torch.int64),
        taken=0,
        layer_idx=0,
        rank=0,
        num_layers=1,
        scaling=1.0,
        unrestricted=True,
    )
    state = policy.prepare(held)
    assert sum(tensor.nbytes for tensor in state.values()) <= 2 * layer.keys.nbytes / policy.page + MIB / 64
    for what in (lambda: policy.prepare(held), lambda: policy.attend(step, state)):
        peak = peak_memory(what)
        assert peak <= 4 * MIB + sum(tensor.nbytes for tensor in state.values()), f"{peak / MIB:.1f} MiB"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_needs_at_most_64_mib_at_11b_dimensions_beside_what_it_keeps(dtype):
    policy = kvprune.get_policy("elastic:keep_ratio=0.25,renormalize_keys=true,size_bias=true")
    view = make_problem(policy, dtype=dtype)
    layer = CrossKVLayer()
    layer.update(view.keys, view.values)
    with PeakMemory() as memory:
        selection = policy.select(view).cache
    assert memory.peak <= 32 * MIB, f"{memory.peak / MIB:.1f} MiB"
    with PeakMemory() as memory:
        layer.retain(selection)
    assert memory.peak - layer.bytes_held <= 64 * MIB, f"{memory.peak / MIB:.1f} MiB"
    features = torch.randn(1, 6404, 4096).to(dtype)
    with PeakMemory() as memory:
        merged = gather_features(features, selection)
    assert memory.peak - 2 * merged.nbytes <= 64 * MIB, f"{memory.peak / MIB:.1f} MiB"


def test_attention_is_never_held_as_a_whole():
    many = dataclasses.replace(LLAMA_11B, rows=256)  # all heads and rows at once would be 200 MiB
    view = make_problem(kvprune.get_policy("trim"), many, dtype=torch.float32)
    with PeakMemory() as memory:
        view.attention_mass()
    assert memory.largest <= 32 * 64 * 6404 * 4 // 8
    assert memory.peak <= 32 * MIB


def test_dropped_tokens_are_freed():
    """The cache owns its memory: no kept tensor is a window onto the full one."""
    with kvprune.compress(mllama(), "trim:keep_ratio=0.25") as run:
        _, _, cache = generate(mllama(), mllama_inputs(["t4ttt", "1ttt"]), steps=2)
    layers = [cache.layers[layer_idx] for layer_idx in (1, 3, 5)]
    owned = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
    assert run.report.bytes_held == owned
    assert run.report.bytes_held == sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert (
        run.report.bytes_full == 2 * 2 * 20 * 8 * 2 * 4 * 3
    )  # B, Hkv, S, D, keys and values, float32, layers
    assert (
        run.report.bytes_held == 2 * 2 * 5 * 8 * 2 * 4 * 3
    )  # a quarter of the 20 columns of the first sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["guided:keep_ratio=0.1", "guided:keep_ratio=0.1,start=1"])
def test_ranking_by_guidance_needs_at_most_4_mib_at_11b_dimensions(spec, dtype):
    policy = kvprune.get_policy(spec)
    before = make_problem(policy, dtype=dtype)
    layer = make_problem(kvprune.get_policy("full"), dtype=dtype)
    layer = layer.capturing(guidance=before.guidance)
    decisions = []
    peak = peak_memory(lambda: decisions.extend((policy.choose(before), policy.select(layer))))
    assert peak <= 4 * MIB, f"{peak / MIB:.1f} MiB"
    assert [one.onward for one in decisions].count(None) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reach", ["onward", "layer"])
def test_ranking_by_the_answer_needs_at_most_4_mib_at_11b_dimensions(reach, dtype):
    policy = kvprune.get_policy(f"answer-attention:keep_ratio=0.1,reach={reach}")
    view = make_problem(policy, dtype=dtype)
    peak = peak_memory(lambda: policy.select(view))
    assert peak <= 4 * MIB, f"{peak / MIB:.1f} MiB"


def test_reading_a_known_answer_holds_no_attention_of_a_whole_layer():
    """Of 256 rows of an answer and 20 image tokens, what is added up is as small as its result."""
    weights = 3 * 4 * 256 * 20 * 4  # layers, heads, rows, columns, bytes
    guide = AnswerGuide(MllamaAdapter(mllama()), torch.full((256,), 5))
    prompt, _ = guide.prompt_of(mllama_inputs(["4tt"]))
    with kvprune.compress(mllama(), "full"), torch.no_grad():
        as_long = mllama_inputs(["4" + "t" * 257])
        plain = peak_memory(lambda: mllama()(**as_long, use_cache=False))
    assert peak_memory(lambda: guide.ask(prompt)) - plain < weights / 2


def test_a_guide_holds_no_attention_of_a_whole_layer():
    """Of 256 rows and 16 image tokens a tile, what a guide adds up is as small as its result."""
    inputs = mllama_inputs(["4" + "t" * 255])
    weights = 3 * 4 * 256 * 20 * 4  # layers, heads, rows, columns, bytes

    def peak(spec):
        with kvprune.compress(mllama(), spec), torch.no_grad():
            return peak_memory(lambda: mllama()(**inputs, use_cache=True))

    assert peak("guided:keep_ratio=1") - peak("full") < weights / 2
