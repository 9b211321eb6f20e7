"""Off-load with prefetch on a CUDA device: the same results, no wait in a step, and less device memory."""

from __future__ import annotations

import pytest
import torch
from families import MODELS
from generation import generate
from step_costs import wide_inputs, wide_mllama
from stepping import recorded
from test_offload import SPECS, WAYS, Rotates, both, require_same
from test_step_gpu import on_gpu, steps_that_may_not_wait

import kvprune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("spec", "options"), WAYS, ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_it_generates_and_reads_the_same(family, spec, options):
    model, inputs = on_gpu(family)
    both(model, inputs, spec, **options)


@pytest.mark.parametrize("family", MODELS)
def test_a_policy_that_observes_nothing_may_take_drafts(family):
    model, inputs = on_gpu(family)
    inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    for options in ({"prompt_lookup_num_tokens": 3, "steps": 12}, {"reread": True, "num_beams": 2}):
        here = recorded(model, inputs, Rotates(), **options)
        require_same(here, recorded(model, inputs, Rotates(offload=True), **options))


@pytest.mark.parametrize("family", MODELS)
def test_the_cache_lies_in_pinned_host_memory(family):
    model, inputs = on_gpu(family)
    with kvprune.compress(model, f"{SPECS[0]},offload=true") as run:
        cache = generate(model, inputs)[2]
    flat = getattr(cache, "cross_attention_cache", cache)
    for receipt in run.report.steps:
        layer = flat.layers[receipt.layer_idx]
        for side in (layer.keys, layer.values):
            assert side.device.type == "cpu"
            assert side.is_pinned()
        assert layer.place.type == "cuda"
        assert receipt.bytes_on_host == layer.bytes_held
    assert not run.report.warnings


@pytest.mark.parametrize("family", MODELS)
def test_no_step_waits_for_the_device(family, monkeypatch):
    """As torch sees it; a step waits for the thread, which waits for what the step before has chosen."""
    calls, (model, inputs) = steps_that_may_not_wait(family, monkeypatch), on_gpu(family)
    with kvprune.compress(model, f"{SPECS[0]},offload=true"):
        generate(model, inputs)
    assert len(calls) == 3 * 5  # layers and steps


def test_decoding_takes_less_device_memory(capsys):
    """At the dimensions of the 11B model's layers: all but the blocks of a step are away."""
    model, inputs = wide_mllama("cuda"), wide_inputs("cuda", rows=8)
    peaks, held = {}, 0
    for offload in ("false", "true"):
        seen: list[int] = []

        def note(input_ids, scores, seen=seen, **_):
            if not seen:  # the prompt was read
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            seen.append(len(input_ids))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        spec = f"attnpred:keep_ratio=0.1,predictor=ema,interval=0,offload={offload}"
        with kvprune.compress(model, spec) as run:
            model.generate(
                **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, stopping_criteria=[note]
            )
        torch.cuda.synchronize()
        peaks[offload], held = torch.cuda.max_memory_allocated(), run.report.bytes_held
    with capsys.disabled():
        print(f"\npeak {peaks['false'] / 2**20:.0f} MiB, off-loaded {peaks['true'] / 2**20:.0f} MiB")
        print(f"cache {held / 2**20:.0f} MiB")
    assert peaks["false"] - peaks["true"] > 0.7 * held
