"""Part A of the known defects, continued: values, files and the conformance suite.

Each test asserts what is right, and failed before the defect was cured; what is still open is a strict
expected failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from defect_helpers import chats, generate, on_models
from helpers import make_view, make_visibility
from PIL import Image
from sharing import concluded

import kvprune
from kvprune.comparison.data.pictures import read_picture
from kvprune.errors import ConformanceError, DataError, KVPruneError
from kvprune.testing import check_policy, tiny_mllama

ROOT = Path(__file__).parents[2]

# A8: budgets of layers whose attention is peaked.


def prefixes(mass: torch.Tensor, total: int) -> list[int]:
    """Return how many tokens each layer keeps: those whose better ones hold least, in plain Python.

    Args:
        mass: ``[L, S]``, attention that sums to 1 in each layer.
        total: Tokens of all layers.
    """
    found = []
    for layer, of_layer in enumerate(mass.tolist()):
        remaining = 0.0  # from the least token up, so that small numbers are added first
        for place, weight in reversed(list(enumerate(sorted(of_layer, reverse=True)))):
            remaining += weight
            found.append((-remaining, place, layer))
    counts = [0] * len(mass)
    for _, _, layer in sorted(found)[:total]:
        counts[layer] += 1
    return counts


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_a8_prefixkv_gives_layers_their_budgets_when_attention_is_peaked(ratio: float) -> None:
    columns, layers = 400, 4
    base = make_view(make_visibility([[[1]]], columns), width=8)
    views = [
        make_view(
            base.visibility,
            width=8,
            seed=rank,
            rank=rank,
            num_layers=layers,
            keys=make_view(base.visibility, width=8, seed=rank).keys * (6 + 2 * rank),
            captured_queries=base.queries,
        )
        for rank in range(layers)
    ]
    decisions = concluded(kvprune.get_policy(f"prefixkv:keep_ratio={ratio}"), views)
    counts = [int(decision.cache.counts[0, 0]) for decision in decisions]
    mass = torch.stack([view.attention_mass().mean(1)[0] for view in views])
    expected = prefixes(mass / mass.sum(-1, keepdim=True), round(ratio * layers * columns))
    off = max(abs(got - right) for got, right in zip(counts, expected, strict=True))
    assert off <= 1, f"keeps {counts}, expected {expected}"


# A10: a policy that changes its class.


@pytest.mark.parametrize(
    "module",
    [
        "abcd",
        pytest.param("builtins_of_mine", marks=pytest.mark.slow),
        pytest.param("kvprune.policy_of_mine", marks=pytest.mark.slow),
        pytest.param("kvprune.policy.mine", marks=pytest.mark.slow),
        "kvprune.policy",
    ],
)
def test_a10_a_policy_that_changes_its_class_fails_whatever_its_module_is_called(module: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counter(kvprune.ScoringPolicy):
        name = "counter"
        calls = 0

        def score(self, view: Any) -> torch.Tensor:
            type(self).calls += 1
            return view.values.norm(dim=-1)  # type: ignore[no-any-return]

    Counter.__module__ = module
    with pytest.raises(ConformanceError, match="KV10"):
        check_policy(Counter, only=["KV10"])


def test_a10_a_policy_that_changes_a_class_of_ours_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvprune.ScoringPolicy, "calls", 0, raising=False)

    @dataclass(frozen=True, kw_only=True)
    class Counter(kvprune.ScoringPolicy):
        name = "counter"

        def score(self, view: Any) -> torch.Tensor:
            kvprune.ScoringPolicy.calls += 1  # type: ignore[attr-defined]
            return view.values.norm(dim=-1)  # type: ignore[no-any-return]

    with pytest.raises(ConformanceError, match=r"changed: class attribute ScoringPolicy\.calls"):
        check_policy(Counter, only=["KV10"])


@pytest.mark.parametrize("held", [deque([0]), torch.zeros(1), bytearray(b"0")], ids=lambda held: type(held))
def test_a10_a_policy_that_changes_what_its_class_holds_fails(held: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counter(kvprune.ScoringPolicy):
        name = "counter"
        calls = held

        def score(self, view: Any) -> torch.Tensor:
            self.calls[0] += 1
            return view.values.norm(dim=-1)  # type: ignore[no-any-return]

    with pytest.raises(ConformanceError, match=r"changed: class attribute Counter\.calls"):
        check_policy(Counter, only=["KV10"])


def test_a10_a_policy_that_replaces_a_number_twice_fails() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Sum(kvprune.ScoringPolicy):
        name = "sum"
        total = 0.5

        def score(self, view: Any) -> torch.Tensor:
            for _ in range(2):  # the second number may get the memory, and so the id, of the first one
                type(self).total += 1.0
            return view.values.norm(dim=-1)  # type: ignore[no-any-return]

    with pytest.raises(ConformanceError, match=r"changed: class attribute Sum\.total"):
        check_policy(Sum, only=["KV10"])


# A11: pictures of more than 8 bits.


def grey_or_refused(path: Path) -> int | None:
    """Return the one grey value of a picture as it is read; None if it is refused."""
    try:
        (_, (red, green, blue)), *others = read_picture(path)[0].getcolors()
    except DataError:
        return None
    assert not others
    assert red == green == blue
    return int(red)


def test_a11_a_16_bit_picture_is_scaled_or_refused(tmp_path: Path) -> None:
    picture = Image.new("I;16", (4, 4), 30_000)
    picture.save(tmp_path / "grey.png")
    assert grey_or_refused(tmp_path / "grey.png") in (None, 116, 117)


def test_a11_a_picture_of_floats_is_scaled_or_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "grey.tiff")
    assert grey_or_refused(tmp_path / "grey.tiff") in (None, 127, 128)


# A12: a policy that writes to its view.


@dataclass(frozen=True, kw_only=True)
class Writer(kvprune.ScoringPolicy):
    """Ranks by values, and doubles some tensor of its view."""

    writes_to: str

    name = "writer"

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset({"queries"})

    def score(self, view: Any) -> torch.Tensor:
        getattr(view, self.writes_to).mul_(2)
        return view.values.norm(dim=-1)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class LateWriter(kvprune.PrefillPolicy):
    """Keeps everything, and writes when all layers have attended."""

    name = "late-writer"

    def observe(self, view: Any) -> None:
        return None

    def conclude(self, views: Sequence[Any], observed: Sequence[None]) -> list[kvprune.Decision]:
        views[0].values.mul_(2)
        return [kvprune.Decision() for _ in views]


@on_models
@pytest.mark.parametrize("policy", [Writer(writes_to="keys"), Writer(writes_to="values"), LateWriter()])
def test_a12_a_run_refuses_a_policy_that_writes_to_its_view(policy: kvprune.CrossKVPolicy) -> None:
    model = tiny_mllama(1, dtype=torch.float64)
    with pytest.raises(KVPruneError, match=policy.name), kvprune.compress(model, policy):
        generate(model, chats("tt4ttt"))
