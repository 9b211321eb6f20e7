"""Steps in unusual calls: rejected drafts, broken-off calls, threads, wrappers, pipelines and contrast."""

from __future__ import annotations

import copy
import itertools
import threading

import pytest
import torch
from families import MODELS, inputs_of, model_of
from generation import generate
from step_policies import ReadsAll, ReadsLogits, Remembers
from stepping import against_oracle, recorded
from test_steps import copied
from torch import nn

import kvprune
from kvprune.errors import CompressionStateError, ContrastError
from kvprune.session.registry import find_adapter

DRAFTS = {"steps": 12, "prompt_lookup_num_tokens": 3}


@pytest.mark.parametrize("family", MODELS)
def test_rejected_drafts_are_no_steps(family):
    model, inputs = model_of(family), inputs_of(family, "one")
    alone = recorded(model, inputs, ReadsLogits(), steps=12)[2].report
    report = recorded(model, inputs, ReadsLogits(), **DRAFTS)[2].report
    drafts = inside_drafts(model, inputs)
    for own, receipt in zip(alone.steps, report.steps, strict=True):
        calls = receipt.steps + receipt.rejected
        assert calls == drafts.rows  # each token that was read is a step, or one of a rejected draft
        # Only the drafts of the last call are still counted as steps, and only if nobody takes them back.
        late = 0 if family == "Mllama" else drafts.last - 1
        assert own.steps <= receipt.steps <= own.steps + late
        assert receipt.entries_read == 3
    assert any(receipt.rejected for receipt in report.steps) or family == "BART"
    if report.steps[0].rejected:
        assert "rejected draft" in str(report)


class Drafts(nn.Module):
    """Counts the tokens that the decoder reads at once after the prompt."""

    def __init__(self):
        super().__init__()
        self.rows = self.last = 0

    def see(self, module, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        self.last = hidden.shape[1]
        self.rows += self.last


def inside_drafts(model, inputs):
    """Return how many tokens one layer reads after its prefill, and how many in the last call."""
    seen, site = Drafts(), find_adapter(model)(model).sites[0]
    with kvprune.compress(model, ReadsLogits()):
        handle = site.module.register_forward_pre_hook(seen.see, with_kwargs=True)
        generate(model, inputs, **DRAFTS)
        handle.remove()
    prompt = inputs["input_ids"].shape[1] if "cross_attention_mask" in inputs else 1
    seen.rows -= prompt
    return seen


def test_the_number_of_a_step_does_not_count_rejected_drafts():
    """What a policy does by step number is the same with and without an assistant."""
    for family in MODELS:
        model, inputs = model_of(family), inputs_of(family, "one")
        numbers = []

        def attend(self, step, state, numbers=numbers):
            numbers.append((step.rank, int(step.number), step.text_rows))

        with kvprune.compress(model, copied(ReadsAll(), attend=attend)):
            generate(model, inputs, **DRAFTS)
        first = [(number, rows) for rank, number, rows in numbers if rank == 0]
        assert first[0][0] == 0
        for (before, rows), (now, _) in itertools.pairwise(first):
            assert before < now <= before + rows


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", [ReadsLogits(), Remembers(), Remembers(least=4)], ids=str)
def test_a_call_after_an_interrupted_one_is_as_in_a_fresh_block(family, policy):
    model, inputs = model_of(family), inputs_of(family)
    expected, logits, fresh = recorded(model, inputs, policy)
    layers = [site.module for site in fresh._adapter.sites]
    for place, calls in ((0, 3), (2, 1), (1, 0)):  # in a decode step, and within a prefill
        left = [calls]

        def stop(module, args, kwargs, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with kvprune.compress(model, policy) as run:
            generate(model, inputs, steps=3)
            before = run.report.steps
            handle = layers[place].register_forward_pre_hook(stop, with_kwargs=True)
            with pytest.raises(KeyboardInterrupt):
                generate(model, inputs)
            handle.remove()
            if not calls:  # the prefill was broken off, and leaves no receipts
                assert run.report.steps == before
            found, own, _ = generate(model, inputs)
            assert torch.equal(found, expected)
            assert torch.equal(own, logits)
            assert run.report.steps == fresh.report.steps


def test_two_threads_are_answered_rightly_or_refused():
    model, inputs = model_of("BART"), inputs_of("BART")
    expected = recorded(model, inputs, Remembers())[1]
    together, found = threading.Barrier(2), []

    def call():
        for _ in range(5):
            together.wait(60)
            try:
                found.append(generate(model, inputs)[1])
            except Exception as error:
                found.append(error)

    with kvprune.compress(model, Remembers()):
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert len(found) == 10
    for one in found:
        assert isinstance(one, CompressionStateError) or torch.equal(one, expected), repr(one)
    assert sum(isinstance(one, torch.Tensor) for one in found) >= 1


class Wrapped(nn.Module):
    """A projection as other libraries wrap it, to add weights of their own (LoRA)."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 2, bias=False, dtype=inner.weight.dtype)
        self.up = nn.Linear(2, inner.out_features, bias=False, dtype=inner.weight.dtype)

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, hidden):
        return self.inner(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("family", MODELS)
def test_queries_are_those_of_a_wrapped_projection(family):
    """A policy sees the queries that the module computes, wrapped or not."""
    model = copy.deepcopy(model_of(family))
    for name, module in list(model.named_modules()):
        if name.endswith(("encoder_attn", "cross_attn")) and hasattr(module, "q_proj"):
            torch.manual_seed(len(name))
            module.q_proj = Wrapped(module.q_proj)
    plain = recorded(model_of(family), inputs_of(family), ReadsLogits())[2].step_reads
    assert against_oracle(model, inputs_of(family), ReadsLogits()) <= 1e-6
    reads = recorded(model, inputs_of(family), ReadsLogits())[2].step_reads
    assert any(not torch.equal(a.columns, b.columns) for a, b in zip(plain, reads, strict=True))


def test_a_hook_that_changes_the_hidden_states_of_a_step_is_seen():
    """accelerate and others hook modules; a hook that was there first runs first."""
    model = copy.deepcopy(model_of("BART"))
    for layer in model.model.decoder.layers:
        layer.encoder_attn.q_proj.register_forward_hook(lambda module, args, output: output * 1.5)
    assert against_oracle(model, inputs_of("BART"), ReadsLogits()) <= 1e-6


@pytest.mark.parametrize("family", MODELS)
def test_contrast_against_steps_that_read_everything_is_refused(family):
    model, inputs = model_of(family), inputs_of(family)
    with (
        pytest.raises(
            ContrastError,
            match="policy reads-all drops nothing of this input that the answer can see and reads all of it",
        ),
        kvprune.contrast(model, ReadsAll(), "mint"),
    ):
        model.generate(**inputs, do_sample=False, max_new_tokens=3)


def test_contrast_says_what_a_step_of_the_second_branch_reads():
    model, inputs = model_of("Whisper"), inputs_of("Whisper")
    with kvprune.contrast(model, ReadsLogits(count=5), "mint") as run:
        model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert run.report.against.read_of_visible == pytest.approx(0.1)
    assert {receipt.steps for receipt in run.report.against.steps} == {4}  # the last prompt token, and three
    assert "kept 100.0% of the encoder's tokens, and a decode step read 10.0%" in str(run.report)
