"""`h2o:steps=N`: scores that grow in decode steps, and a cache that shrinks, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from families import MODELS, inputs_of, model_of
from generation import bart, generate
from stepping import against_oracle, recorded

import kvprune
from kvprune.errors import PolicyOptionError, UnsupportedCacheError
from kvprune.session.registry import find_adapter
from kvprune.testing.oracle_steps import masked_steps

STEPS = 7


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_each_step_reads_what_plain_loops_have_kept(steps, normalize):
    """Attention is that of an untouched model which masks, at each step, what the run did not read."""
    model, inputs = bart(torch.float64, "eager"), inputs_of("BART")
    spec = f"h2o:keep_ratio=0.3,steps={steps},normalize={normalize}"
    run = recorded(model, inputs, spec, steps=STEPS)[2]
    with masked_steps(find_adapter(model)(model).sites, run.step_reads):
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    reads = [run.step_reads[place : place + 3] for place in range(0, len(run.step_reads), 3)]
    for layer in range(3):
        for sample in range(3):
            visible = inputs["attention_mask"][sample].nonzero().squeeze(1).tolist()
            budget = math.ceil(round(0.3 * len(visible), 9))
            heads = out.cross_attentions[0][layer].shape[1]
            kept = [set(visible) for _ in range(heads)]
            mass = [[0.0] * 9 for _ in range(heads)]
            count = len(visible)
            for step in range(len(reads) + 1):  # the first one is the prompt
                paid = out.cross_attentions[step][layer][sample, :, -1].tolist()
                for head in range(heads):
                    if step:
                        columns = reads[step - 1][layer].columns[sample, 0]
                        read = columns[head if len(columns) > 1 else 0].nonzero().squeeze(1).tolist()
                        assert set(read) == kept[head], (layer, sample, step, head)
                    for column in kept[head]:
                        mass[head][column] += paid[head][column]
                if 1 <= step <= steps:
                    left = steps - step
                    count = budget + (count - budget) * left // (left + 1)
                    for head in range(heads):
                        order = sorted(kept[head], key=lambda column: (-mass[head][column], column))
                        kept[head] = set(order[:count])
            if steps < len(reads):
                assert {len(head) for head in kept} == {budget}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_oracle(family, beams):
    for spec in ("h2o:keep_ratio=0.3,steps=3", "h2o:keep_tokens=2,steps=1"):
        assert against_oracle(model_of(family), inputs_of(family), spec, num_beams=beams) <= 1e-6


def test_the_cache_shrinks_to_the_budget():
    with kvprune.compress(model_of("BART"), "h2o:keep_ratio=0.3,steps=4") as run:
        cache = generate(model_of("BART"), inputs_of("BART"), steps=8)[2]
    assert cache is not None
    assert run.report.kept_fraction == 1  # after the prompt
    assert {layer.width for layer in run.report.layers} == {3}
    assert run.report.bytes_held * 3 == run.report.bytes_full
    assert run.report.verify() == run.report.bytes_held


def test_steps_0_is_what_it_was():
    policy = kvprune.get_policy("h2o")
    assert not policy.takes_steps
    assert (policy.moment, str(policy.spec)) == ("layer", "h2o:keep_ratio=0.5")
    run = recorded(model_of("BART"), inputs_of("BART"), "h2o:keep_ratio=0.3")[2]
    assert run.report.steps == run.step_reads == ()
    assert {layer.width for layer in run.report.layers} == {3}


def test_wrong_options_and_calls():
    with pytest.raises(PolicyOptionError, match="number of decode steps, got -1"):
        kvprune.get_policy("h2o:steps=-1")
    with pytest.raises(PolicyOptionError, match="leave reach=onward out"):
        kvprune.get_policy("h2o:steps=2,reach=onward")
    model, inputs = model_of("BART"), inputs_of("BART", "one")
    with pytest.raises(UnsupportedCacheError, match="observes each decode step"):
        recorded(model, inputs, "h2o:steps=2", steps=12, prompt_lookup_num_tokens=3)
