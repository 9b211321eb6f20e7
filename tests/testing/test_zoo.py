"""The suite is tested by policies that break one thing each: every one is caught, by the id it names."""

from __future__ import annotations

import pytest
from zoo import ALL

from kvprune.errors import ConformanceError
from kvprune.testing import check_policy

CASES = [(cls, invariant) for cls in ALL for invariant in cls.caught_by]


@pytest.mark.parametrize(("cls", "invariant"), CASES, ids=lambda case: getattr(case, "name", case))
def test_it_is_caught_and_the_reproducer_shows_it(cls, invariant):
    with pytest.raises(ConformanceError, match=rf"breaks {invariant} \(failed\)") as failure:
        check_policy(cls, only=[invariant])
    (result,) = failure.value.report.results
    assert (result.id, result.outcome) == (invariant, "failed")
    with pytest.raises(ConformanceError, match=rf"breaks {invariant} \(failed\)"):
        exec(compile(result.reproducer, "reproducer", "exec"), {})


def test_every_invariant_that_a_policy_can_break_has_its_animal():
    assert {invariant for _, invariant in CASES} == {f"KV{number:02d}" for number in range(1, 15)} | {"class"}
    assert len(ALL) >= 22
    assert len({cls.name for cls in ALL}) == len(ALL)
