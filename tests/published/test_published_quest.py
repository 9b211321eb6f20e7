"""`quest` reads in a decode step what the authors' code attends to."""

import pytest
import torch
from attention_problems import layer_view
from published import load

import kvprune
from kvprune import StepView
from kvprune.policy import HeldView


@pytest.mark.parametrize("case", load("quest"), ids=str)
def test_the_same_tokens_as_the_published_code(case):
    policy, layer = kvprune.get_policy(case.spec), layer_view(case.problem)
    slots = torch.arange(layer.columns)[None, None]  # [1, 1, S]
    valid = torch.ones_like(slots, dtype=torch.bool)
    held = HeldView(
        layer=layer, keys=layer.keys, values=layer.keys, slots=slots, valid=valid, columns=layer.columns
    )
    for unrestricted in (True, False):
        step = StepView(
            queries_of=lambda: layer.queries[:, :, -1],
            text_rows=1,
            keys=layer.keys,
            values=layer.keys,
            slots_of=lambda: slots,
            readable_of=lambda: valid,
            number_of=lambda: torch.zeros((), dtype=torch.int64),
            taken=0,
            layer_idx=0,
            rank=0,
            num_layers=1,
            scaling=layer.scaling,
            unrestricted=unrestricted,
        )
        read = policy.attend(step, policy.prepare(held))
        assert read.valid.all()
        assert read.indices[0].tolist() == case.kept
