"""A policy that writes to its view is refused, whichever tensor it writes to, and in inference mode, too."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from generation import mllama

import kvprune
from kvprune import CrossKVPolicy, Decision
from kvprune.engine.read_only import unchanged
from kvprune.errors import PolicyFailedError
from kvprune.testing import mllama_inputs


@dataclass(frozen=True)
class Inner:
    numbers: torch.Tensor


@dataclass(frozen=True)
class Outer:
    mask: torch.Tensor
    inner: Inner
    nothing: None = None


def made():
    return Outer(torch.tensor([True, False]), Inner(torch.arange(4.0)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_tensor_of_a_view_is_watched(mode):
    with mode():
        for write, name in (
            (lambda view: view.mask.logical_not_(), "view.mask"),
            (lambda view: view.inner.numbers[1:].zero_(), "view.inner.numbers"),
        ):
            view = made()
            with (
                pytest.raises(PolicyFailedError, match=f"'p' changed {name} in place at layer 3.*clone"),
                unchanged("p", "at layer 3", [view]),
            ):
                write(view)
        view = made()
        with unchanged("p", "at layer 3", [view]):
            assert view.inner.numbers.add(1).sum() == 10  # reading is fine


def test_what_the_policy_raises_itself_comes_first():
    view = made()

    def write_and_raise():
        with unchanged("p", "", [view]):
            view.mask.zero_()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_raise()


@dataclass(frozen=True, kw_only=True)
class Writer(CrossKVPolicy):
    name = "writer"
    needs = frozenset({"queries", "features"})
    place: str = "queries"

    def select(self, view):
        {"queries": view.queries, "features": view.features, "live": view.visibility.live}[self.place].zero_()
        return Decision()


@pytest.mark.parametrize("place", ["queries", "features", "live"])
def test_a_run_stops_at_the_first_layer(place):
    with (
        pytest.raises(PolicyFailedError, match=f"changed view.*{place} in place at layer 1"),
        kvprune.compress(mllama(), Writer(place=place)),
        torch.inference_mode(),
    ):
        mllama()(**mllama_inputs(["tt4ttt"]), use_cache=True)
