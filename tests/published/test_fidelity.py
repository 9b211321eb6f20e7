"""docs/fidelity.md is what classes and recorded cases say, and no class claims more than was compared."""

import pytest
from fidelity_table import DOCUMENT, render
from policies_table import policies
from published import DATA, load

METHODS = {name: policy for name, policy in policies().items() if policy.paper}


def test_the_page_is_up_to_date():
    assert DOCUMENT.read_text("utf-8") == render(), "run: python tests/fidelity_table.py"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_was_compared(name):
    policy = METHODS[name]
    assert policy.fidelity in ("faithful", "adapted", "inspired-by")
    assert policy.checked_against
    assert len(policy.differs) <= 200
    assert "\n" not in policy.differs + policy.checked_against
    assert (DATA / f"{name}.json").exists() or policy.checked_against.startswith("unverified")


@pytest.mark.parametrize("name", METHODS)
def test_faithful_is_a_method_whose_whole_procedure_was_compared(name):
    if METHODS[name].fidelity != "faithful":
        assert METHODS[name].differs
        return
    assert any(case.whole and case.source["kind"] == "authors' code" for case in load(name))
