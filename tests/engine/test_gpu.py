"""On a CUDA device: the same selections as on the CPU, and the master oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from families import OLD
from generation import POLICIES, difference_to_oracle, generate, mllama, tiny_mllama
from transformers import CompileConfig

import kvprune
from kvprune.testing import mllama_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUTS = ("tt4ttt", "t1tt", "t2t4tt")


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("spec", POLICIES)
def test_the_oracle_holds(spec):
    model = copy.deepcopy(mllama(torch.float64)).cuda()
    inputs = on_gpu(mllama_inputs(LAYOUTS, dtype=torch.float64))
    assert difference_to_oracle(model, inputs, spec) <= 1e-6


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_return_sequences": 3, "do_sample": True}])
def test_copies_of_a_sample_are_held_once(options):
    model = copy.deepcopy(mllama(torch.float64)).cuda()
    inputs = on_gpu(mllama_inputs(LAYOUTS, dtype=torch.float64))
    with kvprune.compress(model, "trim") as one:
        generate(model, inputs)
    with kvprune.compress(model, "trim") as several:
        cache = generate(model, inputs, **options)[2]
    assert cache is not None
    assert several.report.verify() == one.report.bytes_held


@pytest.mark.skipif(OLD, reason="stock Mllama of this release branches on the length of its static cache")
def test_decoding_compiles_as_one_graph():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = tiny_mllama(1, dtype=torch.float64).cuda()
    inputs = on_gpu(mllama_inputs(LAYOUTS, dtype=torch.float64))
    with kvprune.compress(model, "trim"):
        expected = generate(model, inputs)[1]
        for _ in range(2):
            how = CompileConfig(fullgraph=True, dynamic=False)
            logits = generate(model, inputs, cache_implementation="static", compile_config=how)[1]
            assert (logits - expected).abs().max() <= 1e-6
            assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("spec", [spec for spec in POLICIES if spec not in ("full", "lossless")])
def test_kv10_selections_do_not_depend_on_the_device(spec):
    inputs = mllama_inputs(LAYOUTS, dtype=torch.float64)
    model = mllama(torch.float64)
    twin = copy.deepcopy(model).cuda()
    with kvprune.compress(model, spec) as here, torch.no_grad():
        model(**inputs, use_cache=True)
    with kvprune.compress(twin, spec) as there, torch.no_grad():
        twin(**on_gpu(inputs), use_cache=True)
    for layer_idx, selection in here.selections.items():
        assert torch.equal(selection.to_mask(), there.selections[layer_idx].to_mask().cpu())
