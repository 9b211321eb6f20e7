"""A policy that writes to what it is shown is caught in a run, at each moment, however it writes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvprune import CrossKVPolicy, Decision, FeaturePolicy, PrefillPolicy
from kvprune.errors import PolicyFailedError
from kvprune.testing import ModelProblem
from kvprune.testing.conformance.common.results import Violation
from kvprune.testing.conformance.models.history import check_views_in_runs
from kvprune.testing.conformance.models.scenario import Scenario


def past_versions(tensor):
    tensor.data.mul_(0.5)


def in_numpy(tensor):
    tensor.numpy()[:] = 0


def in_place(tensor):
    tensor.mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class Select(CrossKVPolicy):
    name = "writing-select"
    write = staticmethod(past_versions)

    def select(self, view):
        self.write(view.values)
        return Decision()


@dataclass(frozen=True, kw_only=True)
class Captured(CrossKVPolicy):
    name = "writing-captured"
    write = staticmethod(past_versions)

    @property
    def needs(self):
        return frozenset({"queries"})

    def select(self, view):
        self.write(view.captured.queries)
        return Decision()


@dataclass(frozen=True, kw_only=True)
class SelectText(CrossKVPolicy):
    name = "writing-select-text"
    write = staticmethod(past_versions)

    @property
    def needs(self):
        return frozenset({"text_cache"})

    def select(self, view):
        return Decision()

    def select_text(self, view):
        self.write(view.values)


@dataclass(frozen=True, kw_only=True)
class Observe(PrefillPolicy):
    name = "writing-observe"
    write = staticmethod(past_versions)

    def observe(self, view):
        self.write(view.keys)

    def conclude(self, views, observed):
        return [Decision() for _ in views]


@dataclass(frozen=True, kw_only=True)
class Conclude(Observe):
    name = "writing-conclude"

    def observe(self, view):
        return None

    def conclude(self, views, observed):
        self.write(views[0].values)
        return super().conclude(views, observed)


@dataclass(frozen=True, kw_only=True)
class Choose(FeaturePolicy):
    name = "writing-choose"
    write = staticmethod(past_versions)

    def choose(self, view):
        self.write(view.captured.features)
        return Decision()


MOMENTS = {
    Select: r"view\.values unchanged by select",
    Captured: r"view\.queries unchanged by select",
    SelectText: r"view\.values unchanged by select_text",
    Observe: r"view\.keys unchanged by observe",
    Conclude: r"view\.values unchanged by conclude",
    Choose: r"view\.features unchanged by choose",
}


@pytest.mark.parametrize("write", [past_versions, in_numpy, in_place])
@pytest.mark.parametrize("cls", MOMENTS)
def test_writing_is_caught_at_each_moment(cls, write, monkeypatch):
    monkeypatch.setattr(cls, "write", staticmethod(write))
    with pytest.raises(Violation, match=MOMENTS[cls]):
        check_views_in_runs(cls(), Scenario.of(ModelProblem(layouts=("tt4t", "1t"))))


@pytest.mark.parametrize("cls", MOMENTS)
def test_a_run_refuses_writing_in_place(cls, monkeypatch):
    monkeypatch.setattr(cls, "write", staticmethod(in_place))
    with pytest.raises(PolicyFailedError, match="in place"):
        Scenario.of(ModelProblem(layouts=("tt4t", "1t"))).prefill(cls())
