"""Without hypothesis: what needs it says so in one line, and everything else works.

One process answers all questions, because it takes seconds to import torch and transformers.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import contextlib, io, json, runpy, sys

sys.modules["hypothesis"] = None
import kvprune.testing as testing
from kvprune.adapters.families.texts import BartAdapter

answers = {}
testing.tiny_bart(), testing.LayerProblem().view()
try:
    testing.check_policy("full")
except ModuleNotFoundError as error:
    answers["check_policy"] = str(error)
answers["check_adapter"] = testing.check_adapter(BartAdapter, only=["KV06"]).passed
sys.argv = ["kvprune", "check", "full"]
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        runpy.run_module("kvprune", run_name="__main__")
    except SystemExit as end:
        answers["code"] = end.code
answers["command"] = err.getvalue()
print(json.dumps(answers))
"""
MESSAGE = 'the conformance suite needs hypothesis, which is not installed: pip install "kvprune[test]"'


@pytest.fixture(scope="module")
def answers():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_needs_hypothesis_says_so_and_the_rest_works(answers):
    assert answers["check_policy"] == MESSAGE
    assert answers["check_adapter"] is True
    assert answers["code"] == 2
    assert answers["command"] == f"kvprune: error: {MESSAGE}\n"
