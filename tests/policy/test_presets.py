"""Presets: published settings by name, which a spec expands into options."""

from dataclasses import dataclass

import pytest

import kvprune
from kvprune import CrossKVPolicy, Decision
from kvprune.errors import PolicyOptionError


@dataclass(frozen=True, kw_only=True)
class Windowed(CrossKVPolicy):
    name = "windowed"
    window: int = 1
    side: str = "left"
    presets = {"published": {"window": 32}, "script": {"window": "8", "side": "right"}}  # noqa: RUF012

    def select(self, view):
        return Decision()


def test_a_preset_stands_for_its_options_as_data_or_as_text():
    assert Windowed.from_options({"preset": "published"}) == Windowed(window=32)
    assert Windowed.from_options({"preset": "script"}) == Windowed(window=8, side="right")


def test_options_beside_a_preset_win_and_the_spec_has_the_options():
    policy = Windowed.from_options({"preset": "script", "side": "left"})
    assert policy == Windowed(window=8)
    assert str(policy.spec) == "windowed:window=8"


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (
            "publishd",
            r"policy 'windowed' has no preset 'publishd'; did you mean 'published'.*published, script",
        ),
        (3, r"policy 'windowed' has no preset 3 \(presets: published, script\)"),
        (None, r"has no preset None"),
    ],
)
def test_an_unknown_preset_is_refused_and_the_known_are_listed(preset, message):
    with pytest.raises(PolicyOptionError, match=message):
        Windowed.from_options({"preset": preset})


def test_a_policy_without_presets_says_so():
    with pytest.raises(PolicyOptionError, match=r"'random' has no preset 'x' \(presets: none\)"):
        kvprune.get_policy("random:preset=x")


def test_a_preset_works_in_a_nested_policy():
    policy = kvprune.get_policy("adakv:scorer=snapkv(preset=published;window=9)")
    assert policy == kvprune.get_policy("adakv:scorer=snapkv(window=9;kernel=7;reduction=max)")


def test_an_option_called_preset_is_the_authors_own():
    @dataclass(frozen=True, kw_only=True)
    class Own(Windowed):
        name = "own"
        preset: str = "a"

    assert Own.from_options({"preset": "b"}).preset == "b"


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        (None, "has the presets None; they are options by name"),
        ({"a": 3}, r"has the presets .*'a': 3.*; they are options by name"),
        ({"a": {"windw": 3}}, r"preset 'a' of .*Wrong sets 'windw', which is no option \(options: window"),
    ],
)
def test_a_class_with_wrong_presets_is_refused(presets, message):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Windowed):
        name = "wrong"

    Wrong.presets = presets
    with pytest.raises(TypeError, match=message):
        Wrong()


def test_every_preset_of_a_built_in_builds():
    for name in kvprune.list_policies():
        for preset in type(kvprune.get_policy(name)).presets:
            policy = kvprune.get_policy(f"{name}:preset={preset}")
            assert kvprune.get_policy(str(policy.spec)) == policy
