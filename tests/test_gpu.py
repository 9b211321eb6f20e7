"""On a CUDA device: the same selections as on the CPU, and the master oracle."""

from __future__ import annotations

import copy

import pytest
import torch
from generation import POLICIES, difference_to_oracle, mllama

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
