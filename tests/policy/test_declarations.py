"""What a policy says about itself: anything impossible is an error that names the policy and the property."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import make_view, make_visibility

import kvprune
from kvprune.errors import BudgetError, ConformanceError, PolicyFailedError, ScoreError
from kvprune.policy.declarations import require_declarations
from kvprune.testing import check_policy, tiny_bart


def saying(**properties: Any) -> kvprune.CrossKVPolicy:
    """Return a policy whose properties have these values; those that are exceptions are raised."""

    @dataclass(frozen=True, kw_only=True)
    class Odd(kvprune.ScoringPolicy):
        name = "odd"

        def score(self, view: Any) -> torch.Tensor:
            return view.values.norm(dim=-1)  # type: ignore[no-any-return]

    policy = Odd(keep_ratio=0.5)
    for what, value in properties.items():

        def read(self: Any, value: Any = value) -> Any:
            if isinstance(value, BaseException):
                raise value
            return value

        setattr(Odd, what, property(read))
    return policy


def run(policy: kvprune.CrossKVPolicy, what: str) -> None:
    """Put a model under a policy with odd needs, and ask about other properties directly, which is fast."""
    if what == "needs":
        kvprune.compress(tiny_bart(), policy)
    else:
        require_declarations(policy)


WRONG = [
    (
        "needs",
        "queries",
        r"""the needs 'queries'; expected a frozenset .*; write needs = frozenset\({'queries'}\)""",
    ),
    ("needs", ["text", "queries"], r"write needs = frozenset\({'queries', 'text'}\)"),
    ("needs", None, r"the needs None; expected a frozenset of some of 'queries', 'raw_keys'"),
    ("needs", frozenset({"query"}), r"did you mean 'queries'\?"),
    ("needs", "query", r"did you mean 'queries'\?"),
    ("needs", frozenset({7, None}), r"expected a frozenset"),
    ("needs", {"queries": True}, r"expected a frozenset"),
    ("name", 7, r"the name 7; expected text"),
    ("spec", "odd", r"the spec 'odd'; expected a kvprune\.PolicySpec"),
    ("exact_budget", 0.5, r"the exact_budget 0\.5; expected a kvprune\.Budget, or None"),
    ("requested", 0.5, r"the requested 0\.5; expected finite numbers by name"),
    ("requested", {"keep_ratio": float("nan")}, r"expected finite numbers by name"),
    ("requested", {"keep_ratio": "0.5"}, r"expected finite numbers by name"),
    ("requested", {3: 0.5}, r"expected finite numbers by name"),
    ("budget_scope", "heads", r"""the budget_scope 'heads'; expected "head", "layer" or "model\""""),
    ("keeps_invisible", 1, r"the keeps_invisible 1; expected True or False"),
    ("ranks_tokens", None, r"the ranks_tokens None; expected True or False"),
    ("reads_answer", "no", r"the reads_answer 'no'; expected True or False"),
]


@pytest.mark.parametrize(("what", "value", "message"), WRONG, ids=[f"{w}-{v!r}" for w, v, _ in WRONG])
def test_a_wrong_declaration_is_refused_before_anything_runs(what: str, value: Any, message: str) -> None:
    policy = saying(**{what: value})
    with pytest.raises(PolicyFailedError, match=f"(?i:policy 'odd') .*{message}"):
        run(policy, what)


@pytest.mark.parametrize("what", sorted({what for what, _, _ in WRONG}))
@pytest.mark.parametrize("error", [ZeroDivisionError("within"), RuntimeError("\x1b[2J"), AttributeError("x")])
def test_a_declaration_that_raises_is_named_after_its_policy(what: str, error: Exception) -> None:
    policy = saying(**{what: error})
    named = f"(?i:policy 'odd') raised {type(error).__name__}: .*, when it was asked for its {what}"
    with pytest.raises(PolicyFailedError, match=named) as refusal:
        run(policy, what)
    assert refusal.value.__cause__ is error
    assert "\x1b" not in str(refusal.value)


def test_errors_of_ours_and_interrupts_pass() -> None:
    for error in (BudgetError("no such budget"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            require_declarations(saying(exact_budget=error))


def test_the_policy_among_the_options_is_blamed_and_not_the_one_around_it() -> None:
    inner = saying(needs="queries")

    @dataclass(frozen=True, kw_only=True)
    class Outer(kvprune.CrossKVPolicy):
        name = "outer"
        scorer: kvprune.CrossKVPolicy = field(default_factory=lambda: inner)

        @property
        def needs(self) -> Any:
            return frozenset({"text"}) | self.scorer.needs

        def select(self, view: Any) -> kvprune.Decision:
            return kvprune.Decision()

    with pytest.raises(PolicyFailedError, match=r"policy 'odd' has the needs 'queries'"):
        require_declarations(Outer())


@pytest.mark.parametrize("name", kvprune.list_policies())
def test_built_in_policies_say_what_is_right(name: str) -> None:
    require_declarations(kvprune.get_policy(name))


def test_the_conformance_suite_refuses_the_same() -> None:
    for policy in (saying(needs=frozenset({"query"})), saying(budget_scope="heads")):
        with pytest.raises(ConformanceError, match=r"(?s)class.*policy 'odd' has the"):
            check_policy(type(policy), only=["class"])


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        (
            (2, 4, 6),
            "; scores by query head become scores by KV head with "
            "kvprune.scoring.by_kv_head(scores, view.heads)",
        ),
        ((2, 6), "; if all heads share them, write scores[:, None]"),
        ((2, 3, 6), ""),
        ((2, 0, 6), ""),
        ((6,), ""),
        ((), ""),
    ],
)
def test_a_common_wrong_shape_is_answered_with_the_way_to_the_right_one(
    shape: tuple[int, ...], hint: str
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Shaped(kvprune.ScoringPolicy):
        name = "shaped"

        def score(self, view: Any) -> torch.Tensor:
            return torch.zeros(shape)

    view = make_view(make_visibility([[[1]], [[1]]], 6))
    expected = re.escape(f"score returned shape {list(shape)}, expected [2, 2 or 1, 6]{hint}")
    with pytest.raises(ScoreError, match=f"{expected}$"):
        Shaped().select(view)
