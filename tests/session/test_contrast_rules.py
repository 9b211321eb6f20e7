"""Rules of contrast by name: from plugins, on the command line, and what they promise as mathematics."""

from __future__ import annotations

import pytest
import torch
from command_line import kvprune_command
from families import inputs_of, model_of

import kvprune
from kvprune.errors import ContrastError, NameClashError, PolicyOptionError
from kvprune.session.contrast_rules import Mint, Mod
from kvprune.session.registry import load
from kvprune.session.rules import get_rule

RULE = '''
    from dataclasses import dataclass
    import kvprune

    @dataclass(frozen=True, kw_only=True)
    class Mean(kvprune.CombineRule):
        """The mean of both branches."""

        name = "{name}"
        bibtex = "@misc{{mean}}"
        weight: float = 0.5

        def combine(self, full, pruned, decided):
            return (1 - self.weight) * full + self.weight * pruned

    @kvprune.hookimpl
    def kvprune_combine_rules():
        return [Mean]
'''


def test_a_rule_of_a_plugin_is_found_by_name(install):
    install("means", mean=RULE.format(name="mean"))
    assert get_rule("mean:weight=0.25").weight == 0.25
    model = model_of("BART")
    with kvprune.contrast(model, "divprune:keep_ratio=0.3", "mean:weight=0.25") as run:
        model.generate(**inputs_of("BART"), max_new_tokens=2, do_sample=False)
    assert run.report.combine == "mean:weight=0.25"
    with pytest.raises(PolicyOptionError, match="option 'weight' of rule 'mean' must be number, got 'much'"):
        get_rule("mean:weight=much")


def test_a_rule_of_a_plugin_is_listed_shown_and_cited(install):
    install("means", mean=RULE.format(name="mean"))
    assert "mean (means)" in kvprune_command("list")
    assert "a rule of kvprune.contrast, from plugin mean" in kvprune_command("show", "mean")
    assert kvprune_command("cite", "mean").strip() == "@misc{mean}"
    assert "arXiv:2502.00717" in kvprune_command("cite", "mint")


def test_two_rules_of_one_name_are_refused(install):
    install("means", mean=RULE.format(name="mint"))
    with pytest.raises(NameClashError, match="rule 'mint' is provided by plugin 'kvprune'"):
        load()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("frozen=True", "frozen=False"), "frozen dataclass"),
        (('name = "mean"', "pass"), "has no name"),
        (("weight: float", "weight: list"), "option 'weight'"),
        (("return [Mean]", "return [int]"), "derived from CombineRule"),
    ],
)
def test_a_bad_rule_breaks_its_plugin_only(install, change, words):
    install("means", mean=RULE.format(name="mean").replace(*change))
    found = load()
    (broken,) = found.broken
    assert words in broken.problem
    assert set(found.rules) == {"mint", "mod"}


def generated(model, inputs):
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, output_scores=True, **options)


@pytest.mark.parametrize("family", ["BART", "Whisper", "Mllama"])
def test_mint_without_strength_and_limit_is_the_compressed_model(family):
    model, inputs, spec = model_of(family), inputs_of(family), "fastv:keep_ratio=0.3"
    with kvprune.compress(model, spec, reread=True):
        alone = generated(model, inputs)
    with kvprune.contrast(model, spec, "mint:alpha=0,beta=0"):
        mint = generated(model, inputs)
    assert torch.equal(alone.sequences, mint.sequences)


@pytest.mark.parametrize("rule", [Mint(), Mint(expert="full", alpha=0.5), Mod()])
def test_a_constant_added_to_the_logits_of_a_branch_changes_nothing(rule):
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 4, 9, generator=random, dtype=torch.float64)

    def said(more, less):
        full, pruned = (one + more).log_softmax(-1), (other + less).log_softmax(-1)
        return rule.combine(full, pruned, rule.begin(full, pruned)).log_softmax(-1)

    torch.testing.assert_close(said(0.0, 0.0), said(3.0, -7.0))


@pytest.mark.parametrize("family", ["BART", "Whisper", "Mllama"])
def test_a_policy_may_choose_anew_at_each_step(family):
    model, inputs = model_of(family), inputs_of(family)
    stock = generated(model, inputs)
    with kvprune.contrast(model, "quest:keep_ratio=0.3,page=1", "mint") as run:
        mint = generated(model, inputs)
    report = run.report.against
    assert report.kept_fraction == 1
    assert report.read_of_visible < 0.7
    # The last prompt token is read again, so even the first token is predicted from what a step reads.
    assert {step.steps for step in report.steps} == {run.report.steps}
    allowed = mint.scores[0] > -50
    assert not torch.allclose(mint.scores[0][allowed], stock.scores[0].log_softmax(-1)[allowed], atol=1e-6)


def test_a_policy_whose_first_step_reads_everything_is_refused():
    model = model_of("BART")
    with (
        kvprune.contrast(model, "quest:keep_ratio=1,page=1", "mint"),
        pytest.raises(ContrastError, match="reads all of it at the first token"),
    ):
        model.generate(**inputs_of("BART"), max_new_tokens=3)


@pytest.mark.parametrize(
    "rule", [Mint(), Mint(expert="full", alpha=0.5, beta=0.0), Mod(), Mod(agree=0.0, beta=0.0)]
)
def test_a_rule_that_takes_logits_answers_them_as_it_answers_probabilities(rule):
    assert rule.takes_logits
    random = torch.Generator().manual_seed(0)
    one, other = 9 * torch.randn(2, 4, 9, generator=random)
    one[:, 2] = other[:, 2] = -torch.inf  # a token that no branch ever says
    full, pruned = one.log_softmax(-1), other.log_softmax(-1)
    decided = rule.begin(full, pruned)
    expected = rule.combine(full, pruned, decided).log_softmax(-1)
    torch.testing.assert_close(rule.combine(one, other, decided).log_softmax(-1), expected)
    assert bool(expected[:, 2].isneginf().all())
