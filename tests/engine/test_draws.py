"""The report says whether the policy drew random numbers."""

from dataclasses import dataclass

import pytest
import torch

import kvprune
from kvprune.adapters.families.whisper import WhisperAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.testing import mllama_inputs, tiny_mllama
from kvprune.tokens.decision import Decision


@dataclass(frozen=True, kw_only=True)
class _Generator(CrossKVPolicy):
    """Keeps everything, and takes the generator."""

    name = "takes-generator"

    def select(self, view):
        _ = view.generator
        return Decision()


@pytest.mark.parametrize(
    ("policy", "drew"),
    [
        ("full", False),
        ("trim:keep_ratio=0.5", False),
        ("random:keep_ratio=0.5", True),
        ("random:keep_ratio=0.5,reach=onward", True),
        ("zipvl:keep_ratio=0.5,recent=1", True),
        ("zipvl:keep_ratio=0.5,probe=0", False),
        ("divprune:keep_ratio=0.5", False),
    ],
)
def test_a_report_says_whether_the_policy_drew(policy, drew):
    model = tiny_mllama()
    with kvprune.compress(model, policy) as run:
        assert not run.report.drew
        model.generate(**mllama_inputs(["t2tttt"]), max_new_tokens=2)
    assert run.report.drew is drew
    assert run.report.to_dict()["drew"] is drew


def test_taking_the_generator_is_a_draw():
    model, inputs = WhisperAdapter.example(torch.float32)
    with kvprune.compress(model, _Generator()) as run:
        model.generate(**inputs, max_new_tokens=2)
    assert run.report.drew
