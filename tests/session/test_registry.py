"""Plugins that are really installed: distributions with entry points, found by importlib.metadata."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
from kvprune_strategies import kvprune_policies

import kvprune
from kvprune import PolicySpec
from kvprune.errors import (
    KVPruneError,
    NameClashError,
    PluginError,
    PolicyOptionError,
    SpecError,
    UnknownPolicyError,
    UnsupportedModelError,
)
from kvprune.session.registry import find_adapter, load

BUILTIN = sorted(policy.name for policy in kvprune_policies())

POLICY = """
    from dataclasses import dataclass
    import kvprune

    @dataclass(frozen=True, kw_only=True)
    class Policy(kvprune.ScoringPolicy):
        name = "{name}"
        version = {version}
        sharpness: float = 2.0

        def score(self, view):
            return view.random()
"""
HOOK = """
    @kvprune.hookimpl
    def kvprune_policies():
        return [Policy]
"""
GOOD = POLICY + HOOK


@pytest.fixture(autouse=True)
def all_plugins(monkeypatch):
    monkeypatch.delenv("KVPRUNE_PLUGINS", raising=False)


def policy(name, version=1):
    return POLICY.format(name=name, version=version)


def good(name, version=1):
    return GOOD.format(name=name, version=version)


def broken_plugins():
    return {plugin.name: plugin for plugin in load().broken}


# good plugins


def test_the_built_in_policies_are_there():
    assert set(BUILTIN) <= set(kvprune.list_policies())
    assert kvprune.list_policies() == sorted(kvprune.list_policies())
    assert not load().broken


def test_a_third_party_policy_is_listed_and_built_like_any_other(install):
    install("acme-prune", acme=good("acme-policy"))
    assert kvprune.list_policies() == sorted([*BUILTIN, "acme-policy"])
    built = kvprune.get_policy("acme-policy:keep_ratio=0.25;sharpness=3")
    assert isinstance(built, kvprune.ScoringPolicy)
    assert (built.keep_ratio, built.sharpness) == (0.25, 3.0)
    entry = load().policies["acme-policy"]
    assert (entry.plugin, entry.distribution, entry.version) == ("acme", "acme-prune", 1)
    assert entry.cls is type(built)


def test_what_is_installed_later_is_found_without_a_restart(install):
    assert "late" not in kvprune.list_policies()
    install("late-prune", late=good("late"))
    assert "late" in kvprune.list_policies()


def test_one_distribution_may_have_several_plugins_and_a_plugin_several_policies(install):
    two = (
        policy("second")
        + """
    @dataclass(frozen=True, kw_only=True)
    class Other(Policy):
        name = "third"

    @kvprune.hookimpl
    def kvprune_policies():
        yield Policy
        yield Other
"""
    )
    install("acme-prune", one=good("first"), two=two)
    found = load().policies
    assert {name: found[name].plugin for name in ("first", "second", "third")} == {
        "first": "one",
        "second": "two",
        "third": "two",
    }


def test_a_third_party_adapter_supports_its_model_and_is_named_among_the_supported(install):
    source = """
        import kvprune
        from kvprune.adapters import ModelAdapter

        class ToyAdapter(ModelAdapter):
            family = "toy"
            model_classes = ("ToyModel",)
            layer_indices = (0,)

            @classmethod
            def probe(cls):
                return []

            def attach(self, manager):
                pass

        @kvprune.hookimpl
        def kvprune_adapters():
            return [ToyAdapter]
    """
    install("toy-prune", toy=source)

    class ToyModel:
        pass

    class Derived(ToyModel):
        pass

    class Stranger:
        pass

    assert find_adapter(ToyModel()).__name__ == "ToyAdapter"
    assert find_adapter(Derived()).family == "toy"
    (entry,) = [entry for entry in load().adapters if entry.plugin == "toy"]
    assert entry.distribution == "toy-prune"
    with pytest.raises(UnsupportedModelError, match=r"no adapter supports Stranger; supported:.*ToyModel"):
        find_adapter(Stranger())
    install("rival-prune", rival=source)
    claims = (
        "ToyModel is claimed by several adapters: ToyAdapter of plugin 'rival', ToyAdapter of plugin 'toy'"
    )
    with pytest.raises(UnsupportedModelError, match=claims):
        find_adapter(ToyModel())


@pytest.mark.parametrize(
    "spec",
    [
        "trim:k_ratio=0.25",
        PolicySpec("trim", {"k_ratio": 0.25}),
        PolicySpec("trim", {"k_ratio": "0.25"}, 1),
        PolicySpec.from_json('{"name": "trim", "options": {"k_ratio": 0.25}, "version": 1}'),
    ],
    ids=repr,
)
def test_every_form_of_a_spec_builds_the_same_policy(spec):
    assert kvprune.get_policy(spec) == kvprune.get_policy("trim:k_ratio=0.25")


def test_a_policy_is_returned_as_it_is():
    built = kvprune.get_policy("trim")
    assert kvprune.get_policy(built) is built
    assert load().get_policy(built) is built


def test_a_spec_is_resolved_with_where_its_policy_comes_from(install):
    install("acme-prune", acme=good("acme-policy", version=4))
    found = load()
    for spec in ("acme-policy:sharpness=3", PolicySpec("acme-policy", {"sharpness": 3.0})):
        resolved = found.resolve(spec)
        assert (resolved.plugin, resolved.distribution) == ("acme", "acme-prune")
        assert (resolved.version, resolved.cls) == (4, found.policy_class("acme-policy"))
        assert resolved.policy == resolved.cls(sharpness=3.0)
    again = found.resolve(resolved.policy)
    assert again == resolved
    assert again.policy is resolved.policy


def test_a_policy_that_no_plugin_provides_has_no_origin():
    @dataclass(frozen=True, kw_only=True)
    class Mine(kvprune.ScoringPolicy):
        name = "trim"  # the name alone does not make it the installed one
        version = 7

        def score(self, view):
            return view.random()

    mine = Mine()
    resolved = load().resolve(mine)
    assert resolved.policy is mine
    assert (resolved.cls, resolved.version) == (Mine, 7)
    assert (resolved.plugin, resolved.distribution) == ("", "")


def test_policies_among_the_options_are_resolved_first():
    resolved = load().resolve("pyramid:scorer=keydiff,keep_ratio=0.25")
    assert resolved.cls.name == "pyramid"
    assert load().resolve(resolved.policy.scorer).plugin == "builtin"


@pytest.mark.parametrize("spec", [None, 3, kvprune.ScoringPolicy], ids=repr)
def test_what_is_no_spec_is_refused_and_shown(spec):
    with pytest.raises(SpecError, match="expected a spec string, a PolicySpec or a policy, got"):
        kvprune.get_policy(spec)


def test_a_spec_may_demand_the_installed_version_and_no_other(install):
    install("acme-prune", acme=good("acme-policy", version=4))
    assert kvprune.get_policy(PolicySpec("acme-policy", version=4)).version == 4
    with pytest.raises(SpecError, match="version 3 of policy 'acme-policy', but version 4 is installed"):
        kvprune.get_policy(PolicySpec("acme-policy", version=3))


# unknown names


@pytest.mark.parametrize(
    ("wrong", "right"), [("trimm", "trim"), ("lossles", "lossless"), ("randon", "random")]
)
def test_an_unknown_name_suggests_the_closest_and_lists_all(wrong, right):
    names = ", ".join(kvprune.list_policies())
    message = rf"unknown policy '{wrong}'; did you mean '{right}'\?.*installed: {names}"
    with pytest.raises(UnknownPolicyError, match=message):
        kvprune.get_policy(wrong)


def test_a_rule_of_contrast_is_no_policy_and_the_error_says_where_it_belongs():
    with pytest.raises(
        UnknownPolicyError, match=r"'mint': it is a rule of kvprune.contrast\(.*trim:contrast=mint"
    ):
        kvprune.get_policy("mint")
    with pytest.raises(
        PolicyOptionError, match=r"'trim:contrast=mint' .*; elsewhere, call kvprune.contrast\("
    ):
        kvprune.get_policy("trim:contrast=mint")


def test_an_unknown_name_is_a_kvprune_error_and_no_key_error():
    with pytest.raises(KVPruneError, match="'zzz'") as caught:
        kvprune.get_policy("zzz:a=1")
    assert not isinstance(caught.value, KeyError)
    assert "did you mean" not in str(caught.value)
    # A KeyError would print its message in quotes.
    assert str(caught.value).startswith("unknown policy")


def test_an_unknown_name_mentions_broken_plugins(install):
    install("sad-prune", sad="raise RuntimeError('boom')\n")
    with pytest.raises(UnknownPolicyError, match=r"'zzz'.*broken plugins.*sad"):
        kvprune.get_policy("zzz")


def test_an_unknown_option_of_a_third_party_policy_suggests_the_closest(install):
    install("acme-prune", acme=good("acme-policy"))
    with pytest.raises(
        PolicyOptionError, match="'acme-policy' has no option 'sharpnes'; did you mean 'sharpness'"
    ):
        kvprune.get_policy("acme-policy:sharpnes=1")


# broken plugins


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("raise RuntimeError('boom')\n", RuntimeError, "boom"),
        ("import a_module_that_is_not_there\n", ImportError, "a_module_that_is_not_there"),
        ("def broken(:\n", SyntaxError, "invalid syntax"),
    ],
    ids=["raises", "import", "syntax"],
)
def test_a_plugin_that_cannot_be_imported_breaks_nobody_else(install, source, error, message):
    install("sad-prune", sad=source)
    install("acme-prune", acme=good("acme-policy"))
    assert set(kvprune.list_policies()) == {*BUILTIN, "acme-policy"}
    assert kvprune.get_policy("trim").name == "trim"
    (plugin,) = load().broken
    assert (plugin.name, plugin.distribution) == ("sad", "sad-prune")
    assert isinstance(plugin.error, error)
    for asked in ("sad", "sad-prune"):
        with pytest.raises(PluginError, match=f"plugin 'sad' of sad-prune is broken:.*{message}") as caught:
            kvprune.get_policy(asked)
        assert isinstance(caught.value.__cause__, error)


MISSPELT = """
    import kvprune

    @kvprune.hookimpl
    def kvprune_policy():
        return []
"""
UNDECORATED = """
    def kvprune_policies():
        return []
"""
UNDECORATED_ADAPTERS = """
    def kvprune_adapters():
        return []
"""
EMPTY = "x = 1\n"
WRONG_ARGUMENT = """
    import kvprune

    @kvprune.hookimpl
    def kvprune_policies(config):
        return []
"""
RAISING_HOOK = """
    import kvprune

    @kvprune.hookimpl
    def kvprune_policies():
        raise RuntimeError("no licence")
"""


def returning(value, hook="kvprune_policies"):
    return f"""
    import kvprune

    @kvprune.hookimpl
    def {hook}():
        return {value}
"""


NAMELESS = """
    from dataclasses import dataclass
    import kvprune

    @dataclass(frozen=True, kw_only=True)
    class Policy(kvprune.ScoringPolicy):
        def score(self, view):
            return view.random()
"""
UNDECORATED_CLASS = """
    import kvprune

    class Policy(kvprune.ScoringPolicy):
        name = "soft"

        def score(self, view):
            return view.random()
"""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (MISSPELT, ["kvprune_policy'", "the hooks are kvprune_policies and kvprune_adapters"]),
        (UNDECORATED, ["neither kvprune_policies nor", "decorate kvprune_policies with @kvprune.hookimpl"]),
        (
            UNDECORATED_ADAPTERS,
            ["neither kvprune_policies nor", "decorate kvprune_adapters with @kvprune.hookimpl"],
        ),
        (EMPTY, ["implements neither kvprune_policies nor kvprune_adapters"]),
        (WRONG_ARGUMENT, ["'bad'", "{'config'} are declared in the hookimpl but can not be found"]),
        (RAISING_HOOK, ["no licence"]),
        (returning("['trim']"), ["kvprune_policies", "'bad'", "'trim'", "derived from CrossKVPolicy"]),
        (returning("[int]"), ["'bad'", "<class 'int'>", "derived from CrossKVPolicy"]),
        (returning("[3]", "kvprune_adapters"), ["'bad'", "returned 3", "derived from ModelAdapter"]),
        (
            POLICY.format(name="p", version=1) + returning("[Policy()]"),
            ["'bad'", "derived from CrossKVPolicy"],
        ),
        (returning("[kvprune.ScoringPolicy]"), ["ScoringPolicy is abstract", "score"]),
        (NAMELESS + HOOK, ["Policy has no name"]),
        (
            UNDECORATED_CLASS + HOOK,
            ["Policy is no frozen dataclass", "@dataclass(frozen=True, kw_only=True)"],
        ),
        (good("Loud Name"), ["'Loud Name' is not a policy name"]),
    ],
    ids=[
        "misspelt hook",
        "no decorator",
        "no decorator on adapters",
        "no hook",
        "argument that does not exist",
        "hook raises",
        "hook returns text",
        "hook returns a foreign class",
        "adapter hook returns a number",
        "hook returns an instance",
        "abstract policy",
        "nameless policy",
        "undecorated policy",
        "impossible name",
    ],
)
def test_a_plugin_that_misuses_the_hooks_is_reported_with_what_to_do(install, source, words):
    install("bad-prune", bad=source)
    # Names decide the order of loading: one plugin before the broken one and one after it.
    install("acme-prune", acme=good("before"), zeta=good("after"))
    error = str(broken_plugins()["bad"].error)
    for word in words:
        assert word in error
    assert set(kvprune.list_policies()) == {*BUILTIN, "before", "after"}
    with pytest.raises(PluginError, match="plugin 'bad' of bad-prune is broken"):
        kvprune.get_policy("bad")


def test_a_hook_that_returns_nothing_is_reported(install):
    install("bad-prune", bad=returning("None"))
    assert "kvprune_policies" in str(broken_plugins()["bad"].error)


def test_several_broken_plugins_are_all_reported(install):
    install("bad-prune", bad=MISSPELT, worse=MISSPELT, worst="raise RuntimeError('boom')\n")
    assert set(broken_plugins()) == {"bad", "worse", "worst"}
    assert kvprune.list_policies() == BUILTIN


# clashes


def test_two_plugins_with_a_policy_of_one_name_are_both_named(install, monkeypatch):
    install("acme-prune", acme=good("twin"))
    install("rival-prune", rival=good("twin"))
    message = "policy 'twin'.*'acme'.*acme-prune.*'rival'.*rival-prune.*KVPRUNE_PLUGINS"
    with pytest.raises(NameClashError, match=message):
        kvprune.list_policies()
    monkeypatch.setenv("KVPRUNE_PLUGINS", "builtin,rival")
    assert load().policies["twin"].plugin == "rival"


def test_no_plugin_can_replace_a_built_in_policy(install):
    install("acme-prune", acme=good("trim"))
    with pytest.raises(NameClashError, match=r"policy 'trim'.*'acme'.*acme-prune.*'builtin'.*kvprune"):
        kvprune.get_policy("trim")


def test_two_distributions_with_an_entry_point_of_one_name_are_both_named(install):
    install("acme-prune", extra=good("one"))
    install("rival-prune", extra=good("two"))
    with pytest.raises(
        NameClashError, match=r"plugin 'extra' is provided by (acme|rival)-prune and by (acme|rival)-prune"
    ):
        kvprune.list_policies()


def test_a_distribution_that_is_listed_twice_on_the_path_is_no_clash(install, monkeypatch):
    folder = install("acme-prune", acme=good("acme-policy"))
    monkeypatch.syspath_prepend(str(folder))
    assert "acme-policy" in kvprune.list_policies()


# KVPRUNE_PLUGINS


def test_an_empty_variable_means_no_plugin_not_even_the_built_in_ones(monkeypatch):
    monkeypatch.setenv("KVPRUNE_PLUGINS", "")
    assert kvprune.list_policies() == []
    assert load().adapters == ()
    with pytest.raises(UnknownPolicyError, match=r"'trim' \(installed: none\).*KVPRUNE_PLUGINS=''"):
        kvprune.get_policy("trim")
    with pytest.raises(UnsupportedModelError, match=r"no adapter supports object.*nothing"):
        find_adapter(object())


@pytest.mark.parametrize("value", ["acme", " acme ", "acme,", "acme,acme"])
def test_the_variable_restricts_to_the_plugins_that_it_names(install, monkeypatch, value):
    install("acme-prune", acme=good("acme-policy"), other=good("other-policy"))
    monkeypatch.setenv("KVPRUNE_PLUGINS", value)
    assert kvprune.list_policies() == ["acme-policy"]


def test_built_in_policies_and_adapters_come_through_the_same_door(monkeypatch):
    monkeypatch.setenv("KVPRUNE_PLUGINS", "builtin")
    assert kvprune.list_policies() == BUILTIN
    assert load().adapters == ()
    monkeypatch.setenv("KVPRUNE_PLUGINS", "builtin-adapters")
    assert kvprune.list_policies() == []
    assert "MllamaAdapter" in [entry.cls.__name__ for entry in load().adapters]


def test_the_variable_keeps_other_plugins_from_being_imported(install, monkeypatch):
    install("sad-prune", sad="raise RuntimeError('boom')\n")
    monkeypatch.setenv("KVPRUNE_PLUGINS", "builtin,builtin-adapters")
    assert not load().broken


def test_the_variable_may_not_name_what_is_not_installed(install, monkeypatch):
    install("acme-prune", acme=good("acme-policy"))
    monkeypatch.setenv("KVPRUNE_PLUGINS", "builtin,acmee")
    message = (
        "KVPRUNE_PLUGINS='builtin,acmee' names the plugin 'acmee'"
        ".*did you mean 'acme'.*installed: acme, builtin"
    )
    with pytest.raises(PluginError, match=message):
        kvprune.list_policies()


# import


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_kvprune_loads_no_plugin_and_changes_nothing_in_transformers(install):
    folder = install("loud-prune", loud="print('loud was imported')\n" + textwrap.dedent(good("loud")))
    out = run(
        f"""
        import sys
        sys.path.insert(0, {str(folder)!r})
        import torch
        from transformers.cache_utils import DynamicCache
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def state():
            tables = [dict(table) for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
            patched = [dict(vars(owner)) for owner in (torch.nn.functional, torch.nn.Module, DynamicCache)]
            return tables, patched, torch.initial_seed()

        before = state()
        import kvprune
        public = [getattr(kvprune, name) for name in kvprune.__all__]
        assert state() == before
        plugins = ("kvprune_strategies", "plugin_under_test")
        loaded = [name for name in sys.modules if name.startswith(plugins)]
        assert not loaded, loaded
        assert "kvprune.adapters.mllama" not in sys.modules
        print("quiet so far")
        print(*kvprune.list_policies())
        assert state()[0] == before[0]
        """
    )
    first, second, third = out.splitlines()
    assert first == "quiet so far"
    assert second == "loud was imported"
    assert third.split() == sorted([*BUILTIN, "loud"])
