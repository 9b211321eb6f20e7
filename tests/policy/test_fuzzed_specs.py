"""Thousands of specs made from the options of the built-in policies, right ones and damaged ones.

Whatever the text: a policy comes out of it that decides about a small problem, or a typed error.
"""

from __future__ import annotations

import random
import typing
from collections.abc import Iterator

import pytest
from test_hostile_specs import NUMBERS, ODD, outcome

import kvprune
from kvprune.errors import KVPruneError
from kvprune.policy.options import policy_types
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry
from kvprune.testing.conformance.layers.answers import answer, pose
from kvprune.testing.problems import LayerProblem

INSTALLED = registry.load()
NAMES = list(INSTALLED.policies)
PROBLEMS = (LayerProblem(layouts=("tt4tt",), patches=3), LayerProblem(layouts=("t1t", "tt2tt"), patches=2))
USUAL = ["0.5", "0.1", "1", "1.0", "2", "3", "8", "0", "-1", "none", "true", "false", "1e-3", "0.999"]
KEYS = ["preset", "keep_ratio", "keep_tokens", "k_ratio", "reach", "scorer", "name", "version", "needs", "x"]


def value_of(draw: random.Random, annotation: typing.Any, depth: int) -> str:
    """Return text that may fit an option of this type, and often does."""
    choices = [str(one) for part in (annotation, *typing.get_args(annotation)) for one in _literals(part)]
    inner = policy_types(annotation)
    kind = draw.random()
    if inner and kind < 0.7 and depth < 5:
        return nested(draw, depth + 1)
    if choices and kind < 0.7:
        return draw.choice(choices)
    if kind < 0.9:
        return draw.choice(USUAL)
    return draw.choice([*NUMBERS, *ODD, *NAMES])


def _literals(annotation: typing.Any) -> tuple[typing.Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def options_of(draw: random.Random, name: str, depth: int) -> list[str]:
    """Return some options of a policy, presets among them."""
    cls = INSTALLED.policies[name].cls
    types = cls.option_types()
    found = []
    for option in draw.sample(list(types), draw.randint(0, min(4, len(types)))):
        found.append(f"{option}={value_of(draw, types[option], depth)}")
    if draw.random() < 0.25:
        right = bool(cls.presets) and draw.random() < 0.6
        preset = draw.choice([*cls.presets] if right else ["published", "none", "3", *ODD, *USUAL])
        found.insert(draw.randint(0, len(found)), f"preset={preset}")
    if draw.random() < 0.1:
        found.append(f"{draw.choice(KEYS)}={draw.choice([*USUAL, *ODD])}")
    return found


def nested(draw: random.Random, depth: int) -> str:
    """Return a policy as an option of another one."""
    name = draw.choice(NAMES)
    options = options_of(draw, name, depth)
    return f"{name}({draw.choice(';,').join(options)})" if options else name


def damaged(draw: random.Random, text: str) -> str:
    """Change, drop, double or insert some characters."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randint(0, len(text))
        kind = draw.randrange(4)
        if kind == 0:
            text = text[:place] + text[place + draw.randint(1, 3) :]
        elif kind == 1:
            text = text[:place] + draw.choice([*":=,;() ", *ODD, *NUMBERS[:8]]) + text[place:]
        elif kind == 2:
            text = text[:place] + text[place // 2 :]
        else:
            text = text[:place] + chr(draw.randrange(0x300)) + text[place + 1 :]
    return text


def fuzzed(number: int, seed: int) -> Iterator[str]:
    """Yield specs: about half of them as they were made, half damaged."""
    draw = random.Random(seed)
    for _ in range(number):
        name = draw.choice(NAMES)
        options = options_of(draw, name, 0)
        text = f"{name}:{','.join(options)}" if options else name
        yield damaged(draw, text) if draw.random() < 0.5 else text


def check(text: str) -> bool:
    """Check one spec; return whether it makes a policy."""
    spec = outcome(PolicySpec.parse, text)
    policy = outcome(INSTALLED.get_policy, text)
    if not isinstance(policy, kvprune.CrossKVPolicy):
        assert isinstance(policy, KVPruneError)
        return False
    assert isinstance(spec, PolicySpec)
    assert INSTALLED.get_policy(str(policy.spec)) == policy
    assert "preset" not in policy.spec.options
    for problem in PROBLEMS:
        outcome(decide, policy, problem)
    return True


def decide(policy: kvprune.CrossKVPolicy, problem: LayerProblem) -> object:
    """Return what a policy decides about a problem."""
    return answer(policy, pose(policy, problem))


@pytest.mark.parametrize(
    ("number", "seed"),
    [(400, 0), *(pytest.param(1000, seed, marks=pytest.mark.slow) for seed in range(1, 13))],
)
def test_fuzzed_specs_make_policies_that_decide_or_typed_errors(number: int, seed: int) -> None:
    made = 0
    for text in fuzzed(number, seed):
        try:
            made += check(text)
        except Exception as error:
            raise AssertionError(f"{text!r}: {type(error).__name__}: {error}") from error
    assert number * 0.1 < made < number * 0.9, (
        "the generator makes too few right specs, or too few wrong ones"
    )


def test_the_fuzzer_uses_presets() -> None:
    texts = list(fuzzed(6000, 0))
    assert sum("preset=" in text for text in texts) > 600
    with_presets = [name for name in NAMES if INSTALLED.policies[name].cls.presets]
    assert with_presets
    for name in with_presets:
        assert any(text.startswith(f"{name}:") and "preset=" in text and check(text) for text in texts)
