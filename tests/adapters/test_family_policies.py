"""All built-in policies on all declared classes: each equals the oracle, or is refused before it runs."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from anywhere import on_any_model
from family_checks import (
    MOST,
    adapter_of,
    apart,
    equals_oracle,
    hardest_of,
    installed,
    largest,
    pads,
    tiny_of,
)
from generation import generate

import kvprune
from kvprune.adapters.arguments import named_arguments
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import GuideError, KVPruneError, UnsupportedModelError
from kvprune.session.registry import find_adapter, load
from kvprune.testing import masked_oracle
from kvprune.testing.oracle_steps import masked_steps

STEPS = 3
POLICIES = [name for name, entry in load().policies.items() if entry.plugin == "builtin"]
STREAMS = "policy .* chooses in decode steps what each row reads, but .* takes one mask for all of them"
REFUSALS = {
    "aircache": "needs 'text', which the .* adapter does not provide",
    "prumerge": "needs 'class_attention', which the .* adapter does not provide",
    "visionzip": "needs 'class_attention', which the .* adapter does not provide",
    "answer-attention": "takes only guidance that was made from one|"
    "needs 'guidance', which the .* adapter does not provide",
    "kvzip": "needs 'reconstruction', which the .* adapter does not provide",
    "guided": "needs 'guidance', which the .* adapter does not provide",
    "meanpool": "takes means of neighbours in one picture, recording or text",
    "attnpred": STREAMS,
    "quest": STREAMS,
    "quecc": "needs 'question', which the .* adapter does not provide",
}
"""What is said when a policy is refused for a family."""


def spec_of(policy: str) -> str:
    ratio = {"keep_ratio": 0.5} if "keep_ratio" in load().policy_class(policy).option_types() else {}
    return str(on_any_model(policy, **ratio).spec)


@pytest.mark.parametrize(
    "name", installed(name for name in TINY_FAMILIES if "guidance" in adapter_of(name).provides)
)
def test_a_guide_would_give_the_decoder_what_it_was_given(name: str) -> None:
    """A guide runs the decoder again on what its layers have received."""
    tiny = tiny_of(name)
    model = tiny.model(name, torch.float32, "eager")
    adapter = adapter_of(name)(model)
    seen: list[torch.Tensor] = []
    sites = [(site.module, site.states) for site in adapter.sites]
    for module, argument in [(adapter.decoder, "encoder_hidden_states"), *sites]:
        module.register_forward_pre_hook(
            lambda module, args, kwargs, argument=argument: seen.append(
                named_arguments(module, args, kwargs)[argument].clone()
            ),
            with_kwargs=True,
        )
    generate(model, tiny.batch(torch.float32, pads(name, "eager")), 1)
    assert len(seen) == 1 + len(adapter.sites)
    assert all(torch.equal(seen[0], one) for one in seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", installed(TINY_FAMILIES))
def test_every_policy_equals_the_oracle_or_is_refused(name: str) -> None:
    attention, padded, beams = hardest_of(name)
    tiny = tiny_of(name)
    model, inputs = tiny.model(name, torch.float32, attention), tiny.batch(torch.float32, padded)
    adapter = find_adapter(model)
    ran: list[Any] = []
    for site in adapter(model).sites:
        site.module.register_forward_hook(lambda *call: ran.append(call))
    for policy in POLICIES:
        ran.clear()
        refusal: KVPruneError | None = None
        try:
            with kvprune.compress(model, spec_of(policy)) as run:
                run.record_replacements()
                run.record_steps()
                got, logits, _ = generate(model, inputs, STEPS, num_beams=beams)
        except KVPruneError as error:
            refusal = error
        if refusal is not None:
            assert isinstance(refusal, UnsupportedModelError | GuideError), policy
            assert re.search(REFUSALS[policy], str(refusal)), policy
            in_steps = REFUSALS[policy] == STREAMS  # only a decode step shows that
            assert in_steps or not ran, f"{policy} was refused after something had run"
            continue
        new_tokens, reads = run.replacements, run.step_reads
        with (
            masked_oracle(
                model, run.selections, run.prefill_selections, adapter=adapter, replacements=new_tokens
            ),
            masked_steps(adapter(model).sites, reads) if reads else nullcontext(),
        ):
            expected, wanted, _ = generate(model, inputs, STEPS, num_beams=beams)
        assert torch.equal(got, expected), policy
        assert apart(logits, wanted) <= MOST * largest(wanted), policy
        if policy not in ("full", "lossless") and not reads:  # these drop nothing that the batch needs
            assert run.report.bytes_held < run.report.bytes_full, policy


def test_a_guide_reads_one_of_each_few_beams() -> None:
    """The decoder of GPT-2 views encoder states in another shape, which every third row would not allow."""
    name = "VisionEncoderDecoderModel of GPT-2"
    tiny = tiny_of(name)
    equals_oracle(
        name, tiny.model(name), tiny.batch(torch.float32, False), "guided:keep_ratio=0.5", num_beams=3
    )


NOT_REREAD = {
    "DiaForConditionalGeneration": "its rereads is False",
    "ProphetNetForConditionalGeneration": "its rereads is False",
}
"""Classes of which the last prompt token cannot be read again, and what is said."""


@pytest.mark.parametrize("name", installed(TINY_FAMILIES))
def test_the_last_token_is_read_again_or_that_is_refused(name: str) -> None:
    attention, padded, beams = hardest_of(name)
    tiny = tiny_of(name)
    model, inputs = tiny.model(name, torch.float32, attention), tiny.batch(torch.float32, padded)
    if name in NOT_REREAD:
        with (
            pytest.raises(UnsupportedModelError, match=NOT_REREAD[name]),
            kvprune.compress(model, "full", reread=True),
        ):
            generate(model, inputs, 2, num_beams=beams)
        return
    expected, stock, _ = generate(model, inputs, 2, num_beams=beams)
    with kvprune.compress(model, "full", reread=True) as run:
        got, logits, _ = generate(model, inputs, 2, num_beams=beams)
    assert torch.equal(got, expected)
    assert apart(logits, stock) <= MOST * largest(stock)
    assert run.report.rereads == run.report.prefills
    with kvprune.compress(model, "norm:keep_ratio=0.5", reread=True):
        pruned = generate(model, inputs, 2, num_beams=beams)[1]
    assert apart(pruned[0], stock[0]) > MOST * largest(
        stock
    )  # the first answer token comes from what is kept
