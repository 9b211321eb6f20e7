"""`then`: a policy by features and one at the layers, its spelling, its budget, and what it refuses."""

import math
from fractions import Fraction

import pytest
from generation import generate, mllama
from helpers import kept_sets
from kvprune_strategies import H2O, DivPrune, Random, Then

import kvprune
from kvprune import PolicySpec
from kvprune.errors import PolicyOptionError, SpecError, UnknownPolicyError
from kvprune.testing import LayerProblem, ModelProblem, mllama_inputs, recheck
from kvprune.testing.conformance import INVARIANTS
from kvprune.testing.conformance.policies.runner import Runner

PAIR = "divprune:keep_ratio=0.5 then h2o:keep_ratio=0.2"


@pytest.mark.parametrize(
    "text",
    [
        PAIR,
        "  divprune:keep_ratio=0.5   then\th2o:keep_ratio=0.2 ",
        "divprune(keep_ratio=0.5) then h2o(keep_ratio=0.2)",
        "divprune then h2o:keep_ratio=0.2",
        "then:first=divprune(keep_ratio=0.5),second=h2o(keep_ratio=0.2)",
        "then:second=h2o(keep_ratio=0.2)",
    ],
)
def test_a_pair_is_read_and_written(text):
    policy = kvprune.get_policy(text)
    assert policy == Then(first=DivPrune(keep_ratio=0.5), second=H2O(keep_ratio=0.2))
    assert str(policy.spec) == PAIR
    assert kvprune.get_policy(policy.spec) == policy
    assert kvprune.get_policy(PolicySpec.from_json(policy.spec.to_json())) == policy


@pytest.mark.parametrize(
    "text",
    [
        "topv:keep_tokens=9 then adakv:keep_ratio=0.2,scorer=snapkv(window=8;kernel=3)",
        "visionzip:keep_ratio=0.5,merge=sum then zipvl",
        "prumerge then trim:k_ratio=0.1",
        "guided:keep_ratio=0.5 then random:keep_tokens=4,reach=onward",
    ],
)
def test_options_of_both_survive_the_round_trip(text):
    policy = kvprune.get_policy(text)
    assert kvprune.get_policy(str(policy.spec)) == policy
    assert kvprune.get_policy(PolicySpec.from_json(policy.spec.to_json())) == policy
    assert str(PolicySpec.parse(str(policy.spec))) == str(policy.spec)


def test_the_name_alone_is_the_default_pair():
    assert kvprune.get_policy("then") == Then()
    assert str(Then().spec) == "divprune:keep_ratio=0.5 then h2o:keep_ratio=0.5"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("divprune then", SpecError, "expected a policy before and after 'then', got 'divprune then'"),
        ("then h2o", SpecError, "expected a policy before and after 'then', got 'then h2o'"),
        ("divprune then trim then h2o", SpecError, "at most two policies may follow each other, got 3"),
        ("divprune then h3o", UnknownPolicyError, "unknown policy 'h3o'"),
        ("divprune:keep=1 then h2o", PolicyOptionError, "'divprune' has no option 'keep'"),
        (
            "h2o:keep_ratio=0.5 then divprune",
            PolicyOptionError,
            r"'first' of policy 'then' must be policy that decides before the first cross-attention layer, "
            r"got 'h2o\(keep_ratio=0\.5\)' \(installed: divprune, guided",
        ),
        (
            "divprune then topv",
            PolicyOptionError,
            "'topv' decides before the first cross-attention layer, too",
        ),
        (
            "divprune then aircache",
            PolicyOptionError,
            "'aircache' decides only when all layers have attended",
        ),
        (
            "quest then divprune",
            PolicyOptionError,
            "'first' of policy 'then' must be policy that decides before the first cross-attention layer, "
            r"got 'quest' \(installed: divprune, guided",
        ),
        (
            "h2o:steps=4 then quest",
            PolicyOptionError,
            "must be policy that decides before the first cross-attention layer",
        ),
        (
            "divprune then adakv:scorer=h2o(steps=2)",
            PolicyOptionError,
            r"'h2o\(steps=2\)' also decides in decode steps, which would be ignored",
        ),
        ("divprune then answer-attention", PolicyOptionError, "'answer-attention' has seen the answer"),
        ("divprune then full", PolicyOptionError, "'full' keeps all that there is"),
        (
            "then:first=then(first=divprune),second=h2o",
            PolicyOptionError,
            "'then' is such a pair itself, and only two policies",
        ),
        ("adakv:scorer=then", PolicyOptionError, "must be policy that ranks tokens, got 'then'"),
    ],
)
def test_what_cannot_follow_is_refused_with_what_can(text, error, message):
    with pytest.raises(error, match=message):
        kvprune.get_policy(text)


def test_the_word_is_no_part_of_a_value():
    with pytest.raises(SpecError, match=r"'now then'; the word 'then' stands between two policies"):
        PolicySpec("norm", {"of": "now then"})
    with pytest.raises(SpecError, match="between two policies, in lower case"):
        PolicySpec.parse("divprune:keep_ratio=0.5 THEN h2o")
    assert PolicySpec("norm", {"of": "strengthen"}).options["of"] == "strengthen"
    assert str(PolicySpec.parse("adakv:scorer=then")) == "adakv:scorer=then"


def counts(policy, inputs):
    """Return the kept columns by layer, sample and head, and the run."""
    with kvprune.compress(mllama(), policy) as run:
        generate(mllama(), inputs, steps=2)
    return {layer: kept_sets(selection) for layer, selection in run.selections.items()}, run


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.2), (0.3, 0.3), (0.7, 0.1), (1.0, 0.25), (0.25, 1.0)])
def test_what_is_kept_is_the_second_fraction_of_the_first(first, second):
    inputs = mllama_inputs(["t4ttt", "1ttt"])  # 20 and 5 columns are visible
    kept, run = counts(f"divprune:keep_ratio={first} then h2o:keep_ratio={second}", inputs)
    alone, _ = counts(f"divprune:keep_ratio={first}", inputs)
    ratio = [Fraction(str(number)) for number in (first, second)]
    for layer, samples in kept.items():
        for sample, (heads, visible) in enumerate(zip(samples, (20, 5), strict=True)):
            wanted = math.ceil(ratio[1] * math.ceil(ratio[0] * visible))
            for head in heads:
                assert len(head) == wanted
                assert head <= alone[layer][sample][0]
    assert run.report.requested == {"keep_ratio": float(ratio[0] * ratio[1])}


def test_layers_receive_what_the_first_one_keeps():
    inputs = mllama_inputs(["t4ttt"])
    _, pair = counts(PAIR, inputs)
    _, alone = counts("divprune:keep_ratio=0.5", inputs)
    assert pair.prefill_selections == alone.prefill_selections
    assert all(selection.counts.tolist() == [[10]] for selection in pair.prefill_selections.values())
    assert pair.report.kept_fraction == pytest.approx(0.1)
    assert pair.report.bytes_held < alone.report.bytes_held


def test_a_second_one_that_keeps_all_is_the_first_one_alone():
    inputs = mllama_inputs(["t4ttt", "1ttt"])
    assert counts("topv:keep_ratio=0.4 then h2o:keep_ratio=1", inputs)[0] == {
        layer: [heads * 2 for heads in samples]
        for layer, samples in counts("topv:keep_ratio=0.4", inputs)[0].items()
    }


def test_what_is_asked_for_says_which_one_where_it_is_no_product():
    assert Then(first=DivPrune(keep_tokens=9), second=H2O(keep_ratio=0.2)).requested == {
        "first keep_tokens": 9,
        "second keep_ratio": 0.2,
    }


def test_needs_are_those_of_both():
    policy = kvprune.get_policy("divprune then norm:of=raw_keys")
    assert policy.needs == policy.first.needs | {"raw_keys"}


def test_a_first_one_that_decides_at_a_layer_is_refused_there():
    policy = kvprune.get_policy("guided:start=1 then h2o")
    with (
        kvprune.compress(mllama(), policy, guide=mllama()),
        pytest.raises(PolicyOptionError, match=r"guided:.*start=1 also decides at layer 1"),
    ):
        generate(mllama(), mllama_inputs(["t4ttt"]), steps=1)


def test_the_second_draws_other_numbers_in_each_layer():
    kept, _ = counts(Then(second=Random(keep_ratio=0.3)), mllama_inputs(["t4ttt"]))
    assert len({str(samples) for samples in kept.values()}) > 1


QUICK = (
    LayerProblem(layouts=("tt4tt1tt", "t2tt", "14ttt")),
    LayerProblem(layouts=("4tt", "1t"), family="encoder-decoder", patches=3),
    ModelProblem(layouts=("tt4ttt", "t1tt"), beams=2),
    ModelProblem(layouts=("tttt", "tt"), model="bart"),
)


@pytest.mark.parametrize(
    "spec",
    [
        "divprune:keep_ratio=0.5 then trim:keep_ratio=0.3",
        "topv:keep_ratio=0.6 then snapkv:keep_ratio=0.5,reach=onward",
        pytest.param("visionzip:keep_ratio=0.5 then zipvl", marks=pytest.mark.slow),
        pytest.param("topv:keep_tokens=3 then adakv:keep_ratio=0.5", marks=pytest.mark.slow),
        pytest.param("divprune:keep_ratio=0.7 then elastic:keep_ratio=0.5", marks=pytest.mark.slow),
        pytest.param("prumerge:keep_ratio=0.5 then elastic:keep_ratio=0.5", marks=pytest.mark.slow),
        pytest.param("divprune:keep_ratio=0.5 then csp:keep_ratio=0.5,text_keep=0.5", marks=pytest.mark.slow),
    ],
)
def test_pairs_pass_the_conformance_suite_on_a_few_problems(spec):
    policy, runner = kvprune.get_policy(spec), Runner(seed=0, examples=0)
    assert recheck("class", policy).outcome == "passed"
    for row in INVARIANTS:
        for problem in QUICK:
            if row.on_layers if isinstance(problem, LayerProblem) else row.on_models:
                result = runner.check(row, [policy], problem)
                assert result.outcome in ("passed", "not applicable"), (result, problem)
