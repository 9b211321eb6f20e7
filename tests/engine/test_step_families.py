"""Every declared family under policies that decide in decode steps: each step equals the oracle of that step."""

from __future__ import annotations

import pytest
import torch
from family_checks import installed, tiny_of
from decoder_pairs import PAIRS
from generation import generate
from step_policies import Fixed
from stepping import against_oracle, recorded

import kvprune
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import UnsupportedModelError

PROPHETNET = "ProphetNetForConditionalGeneration"
POLICIES = (Fixed(keep_ratio=0.5), kvprune.get_policy("quest:keep_ratio=0.5,page=2"))


def model_and_inputs(name):
    tiny = tiny_of(name)
    model = tiny.model(name, torch.float64, "sdpa" if tiny.sdpa else "eager")
    return model, tiny.batch(torch.float64, tiny.pads), {"num_beams": 3} if tiny.beams else {}


@pytest.mark.parametrize("name", installed(name for name in [*TINY_FAMILIES, *PAIRS] if name != PROPHETNET))
def test_a_class_equals_the_oracle_that_masks_per_step(name):
    model, inputs, options = model_and_inputs(name)
    for policy in POLICIES:
        assert against_oracle(model, inputs, policy, steps=4, **options) <= 1e-6, policy.spec
