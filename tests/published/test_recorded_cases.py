"""What is recorded says where it comes from, and its specs name policies that exist."""

import re

import pytest
from published import KINDS, load, names, unverified

import kvprune


@pytest.mark.parametrize("name", names())
def test_every_case_names_its_source_its_procedure_and_a_policy(name):
    cases = load(name)
    assert cases
    assert isinstance(unverified(name), str)
    for case in cases:
        assert case.source["kind"] in KINDS
        assert re.fullmatch(r"[^/\s]+/[^/\s]+|arXiv \d{4}\.\d{5}", case.source["repository"])
        if case.source["kind"] != "transcription":
            assert re.fullmatch("[0-9a-f]{7,40}", case.source["commit"])
        assert case.source["where"]
        assert case.procedure.endswith(".")
        assert case.kept
        assert kvprune.get_policy(case.spec).name == name
