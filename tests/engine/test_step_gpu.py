"""Decode steps on a CUDA device: the oracle, no host synchronisation, one graph, and what they cost."""

from __future__ import annotations

import copy

import pytest
import torch
from families import MODELS, OLD, inputs_of, model_of
from generation import generate, tiny_bart, tiny_mllama
from step_costs import measure, policies, ratios, wide_inputs, wide_mllama
from step_policies import Fixed, Hashes, ReadsAll, ReadsLogits, Remembers
from stepping import against_oracle, recorded
from test_steps import copied
from transformers import CompileConfig

import kvprune
from kvprune.adapters.stepping import stepped
from kvprune.errors import SelectionError
from kvprune.tokens.selection import Selection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUEST = kvprune.get_policy("quest:keep_ratio=0.3,page=2")
H2O = kvprune.get_policy("h2o:keep_ratio=0.3,steps=3")
STEPPING = (
    ReadsAll(),
    ReadsLogits(),
    Remembers(),
    Remembers(least=4),
    Hashes(),
    Fixed(keep_ratio=0.3),
    QUEST,
    H2O,
)
COMPILING = (ReadsAll(), ReadsLogits(), Fixed(keep_ratio=0.3), QUEST)


def on_gpu(family):
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(family).items()}
    return copy.deepcopy(model_of(family)).cuda(), inputs


def steps_that_may_not_wait(family, monkeypatch):
    """Let each decode step of a layer raise if it waits for the device; return their arguments."""
    calls = []

    def watched(*args):
        calls.append(args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return stepped(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    where = "mllama.adapter" if family == "Mllama" else "encoder_decoder"
    monkeypatch.setattr(f"kvprune.adapters.{where}.stepped", watched)
    return calls


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", STEPPING, ids=lambda policy: str(policy.spec))
def test_generation_equals_the_oracle_that_masks_per_step(family, policy, beams):
    model, inputs = on_gpu(family)
    assert against_oracle(model, inputs, policy, num_beams=beams) <= 1e-6


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", STEPPING, ids=lambda policy: str(policy.spec))
def test_steps_read_what_they_read_on_the_cpu(family, policy):
    model, inputs = on_gpu(family)
    here = recorded(model_of(family), inputs_of(family), policy)[2]
    there = recorded(model, inputs, policy)[2]
    for one, other in zip(here.step_reads, there.step_reads, strict=True):
        assert torch.equal(one.columns, other.columns.cpu())
    assert there.report.steps == here.report.steps


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", STEPPING, ids=lambda policy: str(policy.spec))
def test_no_step_waits_for_the_device(family, policy, monkeypatch):
    calls, (model, inputs) = steps_that_may_not_wait(family, monkeypatch), on_gpu(family)
    for beams in (1, 2):
        with kvprune.compress(model, policy):
            generate(model, inputs, num_beams=beams)
    assert len(calls) == 2 * 3 * 5  # layers and steps


@pytest.mark.parametrize("policy", COMPILING, ids=lambda policy: str(policy.spec))
@pytest.mark.parametrize("family", ["Mllama", "BART"])
def test_decoding_compiles_into_one_graph(family, policy):
    if OLD and family == "Mllama":
        pytest.skip("this release branches on the device in its cross-attention")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = (tiny_mllama if family == "Mllama" else tiny_bart)(1, dtype=torch.float64).cuda()
    inputs = on_gpu(family)[1]
    expected, own = recorded(model, inputs, policy)[1:]
    how = CompileConfig(fullgraph=True, dynamic=False)
    with kvprune.compress(model, policy) as run:
        for _ in range(2):
            logits = generate(model, inputs, cache_implementation="static", compile_config=how)[1]
            assert (logits - expected).abs().max() <= 1e-6
            assert run.report.steps == own.report.steps
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_wrong_answer_is_raised_when_the_report_is_read():
    """Not in the step, which would have to wait for its values."""

    def attend(self, step, state):
        places = torch.tensor([[[1, 50]]]).to(step.keys.device).expand(step.text_rows, 1, -1)
        return Selection.trusted(places, torch.ones_like(places, dtype=torch.bool), step.entries)

    model, inputs = on_gpu("BART")
    run = kvprune.compress(model, copied(ReadsAll(), attend=attend)).attach()
    generate(model, inputs, steps=3)
    run.detach()
    with pytest.raises(SelectionError, match="KV01: it selects entries that the layer does not hold"):
        run.report  # noqa: B018


def test_what_a_step_costs_at_the_dimensions_of_11b(capsys):
    """What it costs is told, not asserted: kernel launches decide it, and so does the machine.

    All policies make equally many tokens, and a fixed choice reads exactly what the prefill policy keeps.
    """
    model, inputs = wide_mllama("cuda"), wide_inputs("cuda", rows=8)
    found = measure(model, inputs, policies(0.1), 7)
    by_prefill, by_full = ratios(found, "prefill"), ratios(found, "full")
    with capsys.disabled():
        for name, times in found.items():
            print(
                f"\n{name:<8} {1000 * sorted(times)[len(times) // 2]:.3f} ms per token, "
                f"x{by_prefill[name][0]:.3f} of prefill, x{by_full[name][0]:.3f} of full"
            )
    steps = {}
    for name in ("prefill", "fixed"):
        with kvprune.compress(model, policies(0.1)[name]) as run:
            model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)
        steps[name] = run.report
    for layer, step in zip(steps["prefill"].layers, steps["fixed"].steps, strict=True):
        assert step.steps == 3
        assert step.entries_read == layer.width
