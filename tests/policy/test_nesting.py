"""Policies as options of policies: from text, from JSON and from Python, at the budget of the outer one."""

import copy
import dataclasses
import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from command_line import kvprune_command
from helpers import conversations, kept_sets, make_view, make_visibility
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import Full, Norm, Random

import kvprune
from kvprune import CrossKVPolicy, Decision, PolicySpec, ScoringPolicy, require_scorer
from kvprune.comparison.plan.grid import exactly, expand
from kvprune.comparison.storage.identity import policy_identities
from kvprune.errors import BudgetError, PolicyOptionError, ScoreError, SpecError, UnknownPolicyError
from kvprune.policy.nesting import make_nested, parts
from kvprune.policy.options import check_option, describe_type, is_option_type, parse_option
from kvprune.testing import check_policy
from kvprune.testing.conformance.common.reproducers import snippet

PAGE = (Path(__file__).parents[2] / "docs" / "write-a-policy.md").read_text("utf-8")
EXAMPLE = re.search(r"<!-- test: composed -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1]

PLUGIN = (
    EXAMPLE
    + '''

from dataclasses import field
from typing import Literal

from kvprune_strategies import Norm


@dataclass(frozen=True, kw_only=True)
class Wrap(kvprune.CrossKVPolicy):
    """Ask another policy.

    Args:
        inner: Which.
        scorer: Not asked.
        made: Not asked either.
        label: For nothing.
    """

    name = "wrap"
    inner: kvprune.CrossKVPolicy | None = None
    scorer: kvprune.ScoringPolicy = Norm(of="keys")
    made: Norm = field(default_factory=lambda: Norm(keep="low"))
    label: str = field(default_factory=lambda: "Plain")

    def select(self, view):
        return kvprune.Decision() if self.inner is None else self.inner.select(view)


@kvprune.hookimpl
def kvprune_policies():
    return [ByRank, Wrap]
'''
)


@pytest.fixture
def toys(install, monkeypatch):
    monkeypatch.delenv("KVPRUNE_PLUGINS", raising=False)
    install("toy-prune", toy=PLUGIN)
    policies = kvprune.session.registry.load().policies
    return policies["by-rank"].cls, policies["wrap"].cls


@dataclass(frozen=True, kw_only=True)
class Around(CrossKVPolicy):
    """A policy that is not installed."""

    name = "around"
    scorer: ScoringPolicy = Norm(of="keys")
    spare: ScoringPolicy | None = None

    def select(self, view):
        return self.scorer.select(view)


@dataclass(frozen=True, kw_only=True)
class Given(ScoringPolicy):
    """Scores that cannot rank tokens."""

    name = "given"

    def score(self, view):
        return view.random() * torch.nan


# from text and back


@pytest.mark.parametrize(
    "text",
    [
        "by-rank:scorer=norm(of=keys;keep=low),keep_ratio=0.25",
        "by-rank(scorer=norm(of=keys,keep=low),keep_ratio=0.25)",
        " by-rank ( scorer = norm ( of = keys ; keep = low ) ; keep_ratio = 0.25 ) ",
    ],
)
def test_a_policy_is_composed_by_its_spec(toys, text):
    by_rank, _ = toys
    policy = kvprune.get_policy(text)
    assert policy == by_rank(scorer=Norm(of="keys", keep="low"), keep_ratio=0.25)
    assert str(policy.spec) == "by-rank:keep_ratio=0.25,scorer=norm(of=keys;keep=low)"


def test_a_bare_name_is_a_policy_too(toys):
    by_rank, wrap = toys
    assert kvprune.get_policy("by-rank:scorer=random").scorer == Random()
    assert kvprune.get_policy("wrap").inner is None
    assert kvprune.get_policy("wrap:inner=None").inner is None
    assert kvprune.get_policy("wrap:inner=by-rank(scorer=norm)") == wrap(inner=by_rank(scorer=Norm()))


@pytest.mark.parametrize(
    "text",
    [
        "by-rank:scorer=norm",
        "by-rank:keep_tokens=7,scorer=norm(of=keys)",
        "by-rank:scorer=by-rank(scorer=norm(of=keys))",
        "wrap:inner=full",
        "wrap:inner=random(keep_ratio=0.5)",
        "wrap:inner=trim(k_ratio=0.1;crop_first=false),label=x",
        "wrap:scorer=norm",
        "wrap:made=norm",
    ],
)
def test_the_spec_of_a_composed_policy_makes_it_again(toys, text):
    policy = kvprune.get_policy(text)
    assert kvprune.get_policy(policy.spec) == policy
    assert kvprune.get_policy(str(policy.spec)) == policy
    assert kvprune.get_policy(PolicySpec.from_json(policy.spec.to_json())) == policy
    for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), dataclasses.replace(policy)):
        assert (copied, hash(copied), copied.spec) == (policy, hash(policy), policy.spec)


def test_defaults_are_left_out_and_inner_versions_are_kept(toys):
    by_rank, wrap = toys
    assert wrap().spec == PolicySpec("wrap", {}, 1)
    assert wrap(scorer=Norm(of="keys"), made=Norm(keep="low"), label="Plain").spec == wrap().spec
    spec = by_rank(scorer=Norm()).spec
    assert spec.options == {"keep_ratio": 0.5, "scorer": PolicySpec("norm", {}, Norm.version)}
    data = json.loads(spec.to_json())
    assert data["options"]["scorer"] == {"name": "norm", "options": {}, "version": Norm.version}
    data["options"]["scorer"]["version"] = Norm.version + 1
    with pytest.raises(SpecError, match=f"version {Norm.version + 1} of policy 'norm', but version"):
        kvprune.get_policy(PolicySpec.from_dict(data))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("by-rank:scorer=nrom", UnknownPolicyError, "unknown policy 'nrom'; did you mean 'norm'"),
        ("by-rank:scorer=nrom(of=keys)", UnknownPolicyError, "unknown policy 'nrom'; did you mean 'norm'"),
        (
            "by-rank:scorer=full",
            PolicyOptionError,
            r"'scorer' of policy 'by-rank' must be policy that ranks tokens, got 'full' "
            r"\(installed: .*by-rank, .*norm, .*random, .*uniform, vatp\)$",
        ),
        ("by-rank:scorer=trim(k_ratio=2)", PolicyOptionError, r"got 'trim\(k_ratio=2\)'"),
        ("wrap:made=random", PolicyOptionError, r"must be policy 'norm', got 'random' \(installed: norm\)"),
        ("by-rank:scorer=none", UnknownPolicyError, "unknown policy 'none'"),
        ("by-rank:scorer=Norm", SpecError, "'Norm' is not a policy name"),
        ("by-rank:scorer=norm:of=keys", PolicyOptionError, r"such as scorer=norm\(key=value;key=value\)"),
        ("by-rank:scorer=norm(off=keys)", PolicyOptionError, "'norm' has no option 'off'; did you mean 'of'"),
        ("by-rank:scorer=norm(of=hair)", PolicyOptionError, "'of' of policy 'norm' must be values"),
        ("by-rank:scorre=norm(of=keys)", PolicyOptionError, "no option 'scorre'; did you mean 'scorer'"),
        ("by-rank", PolicyOptionError, "needs option 'scorer'"),
        ("norm:of=norm(of=keys)", PolicyOptionError, r"'of' of policy 'norm' must be values \| keys"),
        (
            "norm:keep_ratio=half(x=1)",
            PolicyOptionError,
            r"must be number or none, got the spec 'half\(x=1\)'",
        ),
        ("trim:k_ratio=half(x=1)", PolicyOptionError, r"must be number or none, got the spec 'half\(x=1\)'"),
        (
            "wrap:label=a(b=1)",
            PolicyOptionError,
            r"'label' of policy 'wrap' must be text, got the spec 'a\(b=1\)'",
        ),
    ],
)
def test_a_wrong_composition_is_refused_and_says_what_would_be_right(toys, text, error, message):
    with pytest.raises(error, match=message):
        kvprune.get_policy(text)


def test_an_inner_policy_of_a_broken_plugin_is_its_plugins_fault(install, toys):
    install("bad-prune", bad="raise RuntimeError('no weights')")
    with pytest.raises(kvprune.errors.PluginError, match=r"plugin 'bad' of bad-prune is broken.*no weights"):
        kvprune.get_policy("by-rank:scorer=bad")


# from Python


def test_in_python_the_option_is_a_policy_and_nothing_else():
    assert Around(scorer=Norm(of="keys"), spare=Random()).spare == Random()
    for wrong, shown in [
        ("norm", "got 'norm'"),
        (Full(), "got Full"),
        (None, "got None"),
        (Norm, "got <class"),
    ]:
        with pytest.raises(
            PolicyOptionError, match=f"'scorer' of policy 'around' must be policy that.*{shown}"
        ):
            Around(scorer=wrong)
    for wrong in (PolicySpec("norm"), PolicySpec("norm", {"of": "keys"})):
        with pytest.raises(
            PolicyOptionError, match=r"got the spec 'norm.*get_policy builds a policy from a spec"
        ):
            Around(scorer=wrong)
    with pytest.raises(PolicyOptionError, match="must be policy that ranks tokens, got 'norm'"):
        Around.from_options({"scorer": "norm"})


def test_a_spec_for_a_plain_option_is_refused_before_the_authors_code_meets_it():
    @dataclass(frozen=True, kw_only=True)
    class Hasty(Around):
        width: float = 1.0

        def __post_init__(self):
            assert self.width * 2.0 > 0
            super().__post_init__()

    with pytest.raises(
        PolicyOptionError, match=r"'width' of policy 'around' must be number, got the spec 'a"
    ):
        Hasty.from_options({"width": PolicySpec("a", {"b": 1})})


def test_a_policy_too_deep_for_a_spec_is_refused_when_it_is_made():
    @dataclass(frozen=True, kw_only=True)
    class Deep(CrossKVPolicy):
        name = "deep"
        inner: CrossKVPolicy | None = None

        def select(self, view):
            return Decision()

    policy = Norm(of="keys")
    for _ in range(3):
        policy = Deep(inner=policy)
    assert str(policy.spec) == "deep:inner=deep(inner=deep(inner=norm(of=keys)))"
    with pytest.raises(SpecError, match="at most 4 deep"):
        Deep(inner=policy)


def test_a_policy_called_none_is_refused_where_none_may_stand():
    none = type("None_", (Norm,), {"name": "none"})
    none = dataclass(frozen=True, kw_only=True)(none)
    assert Around(scorer=none()).scorer.name == "none"
    with pytest.raises(PolicyOptionError, match="cannot be the policy 'none'"):
        Around(spare=none())


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (ScoringPolicy, "policy that ranks tokens"),
        (CrossKVPolicy, "policy"),
        (Norm, "policy 'norm'"),
        (ScoringPolicy | None, "policy that ranks tokens or none"),
        (Norm | Random, "policy 'norm' or policy 'random'"),
    ],
)
def test_an_option_may_be_a_policy_and_is_described(annotation, words):
    assert is_option_type(annotation)
    assert describe_type(annotation) == words


@pytest.mark.parametrize(
    "annotation",
    [
        Norm | str,
        ScoringPolicy | int,
        ScoringPolicy | bool | None,
        Norm | Literal["x"],
        type,
        object,
        list[Norm],
    ],
)
def test_beside_a_policy_stands_nothing_that_its_name_could_be(annotation):
    assert not is_option_type(annotation)


def test_text_is_read_as_none_or_not_at_all():
    assert parse_option("p", "o", ScoringPolicy | None, "none") is None
    with pytest.raises(PolicyOptionError, match="must be policy that ranks tokens or none, got 'norm'"):
        parse_option("p", "o", ScoringPolicy | None, "norm")
    assert check_option("p", "o", ScoringPolicy | None, Norm()) is None
    with pytest.raises(PolicyOptionError, match="must be number, got Norm"):
        check_option("p", "o", float, Norm())


# budgets


def test_a_scorer_that_states_no_budget_passes():
    for scorer in (Norm(), Norm(of="keys"), dataclasses.replace(Norm(), of="keys"), copy.deepcopy(Norm())):
        assert require_scorer("outer", scorer) is None
        assert require_scorer("outer", pickle.loads(pickle.dumps(scorer))) is None


@pytest.mark.parametrize(
    ("options", "stated"),
    [
        ({"keep_ratio": 0.25}, "keep_ratio"),
        ({"keep_ratio": 0.5}, "keep_ratio"),
        ({"keep_tokens": 8}, "keep_tokens"),
        ({"reach": "onward"}, "reach"),
        ({"keep_tokens": 8, "reach": "onward"}, "keep_tokens and reach"),
    ],
)
def test_a_scorer_that_states_what_the_outer_policy_decides_is_refused(options, stated):
    scorer = Norm(of="keys", **options)
    written = re.escape(str(scorer.nested_spec).partition(":")[2].replace(",", ";"))
    with pytest.raises(
        PolicyOptionError,
        match=rf"'outer' .*scorer 'norm\({written}\)' sets {stated}, .*write 'norm\(of=keys\)',.*'outer'",
    ):
        require_scorer("outer", scorer)


def test_what_is_no_scorer_is_refused():
    with pytest.raises(PolicyOptionError, match="'outer' needs a policy that ranks tokens, got Full"):
        require_scorer("outer", Full())


@pytest.mark.parametrize("text", ["pyramid", "vlcache", "prefixkv", "adakv"])
def test_a_scorer_that_decides_in_decode_steps_is_refused(text):
    with pytest.raises(
        PolicyOptionError, match=r"'h2o\(steps=2\)' also decides in decode steps, which would be"
    ):
        kvprune.get_policy(f"{text}:scorer=h2o(steps=2)")
    kvprune.get_policy(f"{text}:scorer=h2o(normalize=false)")


def test_a_stated_inner_budget_is_refused_from_text(toys):
    with pytest.raises(PolicyOptionError, match=r"'norm\(keep_ratio=0.5\)' sets keep_ratio.*write 'norm'"):
        kvprune.get_policy("by-rank:scorer=norm(keep_ratio=0.5)")


def test_the_default_budget_is_written_outside_and_not_inside():
    assert str(Norm().spec) == "norm:keep_ratio=0.5"
    assert str(Norm().nested_spec) == "norm"
    assert type(Norm().spec.options["keep_ratio"]) is float
    assert Norm(keep_ratio=0.5).nested_spec.options == {"keep_ratio": 0.5}
    assert str(Around(scorer=Norm(), spare=Norm(keep_ratio=0.5)).spec) == (
        "around:scorer=norm,spare=norm(keep_ratio=0.5)"
    )
    assert Norm() == Norm(keep_ratio=0.5)
    assert dataclasses.replace(Norm(), keep_tokens=8) == Norm(keep_tokens=8)
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.5 and keep_tokens=8"):
        dataclasses.replace(Norm(keep_ratio=0.5), keep_tokens=8)


@given(conversations(max_batch=2), st.integers(1, 9), st.sampled_from(["keys", "values"]))
def test_the_example_keeps_what_its_scorer_would_at_the_outer_budget(visibility, tokens, of):
    space = {"__name__": "example"}
    exec(compile(EXAMPLE, "example", "exec", dont_inherit=True), space)
    view = make_view(visibility)
    composed = space["ByRank"](scorer=Norm(of=of), keep_tokens=tokens)
    assert composed.needs == frozenset()
    assert space["ByRank"](scorer=Norm(of="raw_keys")).needs == {"raw_keys"}
    alone = Norm(of=of, keep_tokens=tokens)
    assert kept_sets(composed.select(view).cache) == kept_sets(alone.select(view).cache)


def test_scores_asked_for_by_an_outer_policy_are_checked():
    view = make_view(make_visibility([[[1, 0]]], 4), layer_idx=13)
    with pytest.raises(ScoreError, match="'given' at layer 13: score returned NaN for 4 tokens"):
        Given().checked_scores(view, view.strata)
    assert bool(Norm().checked_scores(view, view.strata).isfinite().all())


# what else meets a composed policy


def test_parts_are_the_policy_and_all_in_it(toys):
    by_rank, wrap = toys
    policy = wrap(inner=by_rank(scorer=Norm()))
    assert [part.name for part in parts(policy)] == ["wrap", "by-rank", "norm", "norm", "norm"]
    assert list(parts(Norm())) == [Norm()]


def test_options_without_policies_are_left_as_they_are():
    options = {"of": "keys", "keep_ratio": 0.25}
    assert make_nested(Norm, options, pytest.fail, {}) == options


def test_show_explains_options_that_are_policies(toys):
    out = kvprune_command("show", "wrap")
    options = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.strip()}
    assert options["inner"] == "inner policy or none none Which."
    assert options["scorer"] == "scorer policy that ranks tokens norm(of=keys) Not asked."
    assert options["made"] == "made policy 'norm' norm(keep=low) Not asked either."
    assert options["label"] == "label text Plain For nothing."
    assert "scorer policy that ranks tokens required" in " ".join(kvprune_command("show", "by-rank").split())


def test_a_comparison_crosses_the_outer_budget_and_names_both(toys):
    _, half, tenth, tokens = expand(
        ["by-rank:scorer=norm(of=keys;keep=low)", "by-rank(scorer=random,keep_tokens=3)"], [0.5, 0.1]
    )
    assert half.spec == "by-rank:keep_ratio=0.5,scorer=norm(of=keys;keep=low)"
    assert tenth.spec == "by-rank:keep_ratio=0.1,scorer=norm(of=keys;keep=low)"
    assert half.label == tenth.label == "by-rank:scorer=norm(of=keys;keep=low)"
    assert (half.budget, tenth.keep_ratio) == ("keep_ratio=0.5", 0.1)
    assert (tokens.label, tokens.budget) == ("by-rank:scorer=random", "keep_tokens=3")
    assert [one.policy for one in exactly([half.spec, tokens.spec])] == [half.policy, tokens.policy]
    assert (half.distribution, half.inner) == ("toy-prune", ("kvprune",))


def test_a_manifest_records_the_inner_policy_its_source_and_its_distribution(toys, install):
    install(
        "inner-prune",
        inner=PLUGIN.replace("by-rank", "by-rank-2").replace("return [ByRank, Wrap]", "return [ByRank]"),
    )
    inner = policy_identities(expand(["wrap:inner=by-rank-2(scorer=norm)"], [0.5]))
    assert "inner-prune" in json.dumps(inner)
    configurations = expand(["by-rank:scorer=norm", "by-rank:scorer=random", "norm"], [0.5])
    run = policy_identities(configurations)
    _, norm, other, plain = run
    assert norm["options"] == {
        "keep_ratio": 0.5,
        "scorer": {"name": "norm", "options": {}, "version": Norm.version},
    }
    assert len({one["source_sha256"] for one in (norm, other, plain)}) == 3
    assert "toy-prune" in json.dumps(run)
    json.dumps(run, allow_nan=False)


def test_composed_policies_pass_the_class_check_installed_or_not(toys):
    report = check_policy("by-rank:scorer=norm(of=keys)", only=["class", "KV02", "KV10"])
    assert report.passed
    assert check_policy(Around, only=["class"]).passed
    assert check_policy(Around(spare=Norm(of="keys")), only=["class"]).passed
    with pytest.raises(PolicyOptionError, match="'by-rank' needs the option 'scorer'"):
        check_policy("by-rank")


def test_a_reproducer_of_a_composed_policy_can_be_pasted(toys):
    installed = snippet("KV02", kvprune.get_policy("by-rank:scorer=norm(of=keys)"), None)
    assert "kvprune.get_policy('by-rank:keep_ratio=0.5,scorer=norm(of=keys)')" in installed
    _, wrap = toys
    assert "get_policy" not in snippet("KV02", wrap(inner=Around(spare=None)), None)
    text = snippet("KV02", Around(spare=Norm(of="keys")), None)
    space = {}
    exec(text.rpartition("from kvprune.testing")[0], space)
    made = re.search(r"recheck\('KV02', (.*)\)$", text)[1]
    assert eval(made, space) == Around(spare=Norm(of="keys"))


def test_a_default_made_by_a_factory_counts_as_a_default():
    @dataclass(frozen=True, kw_only=True)
    class Made(CrossKVPolicy):
        name = "made"
        scorer: ScoringPolicy = field(default_factory=Norm)
        width: int = field(default_factory=lambda: 3)

        def select(self, view):
            return Decision()

    assert Made().spec == PolicySpec("made", {}, 1)
    assert Made(width=4).spec == PolicySpec("made", {"width": 4}, 1)
    assert str(Made(scorer=Norm(of="keys")).spec) == "made:scorer=norm(of=keys)"
