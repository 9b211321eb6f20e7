"""docs/policies.md is what its generator writes."""

from __future__ import annotations

import json
from pathlib import Path

import policies_table
import pytest
from command_line import kvprune_command

from kvprune.session import registry


def test_the_page_is_current():
    text = policies_table.DOCUMENT.read_text("utf-8")
    assert policies_table.replaced(text) == text, "run: python tests/policies_table.py"


def test_every_built_in_policy_is_described():
    page = policies_table.render()
    for name, policy in policies_table.policies().items():
        assert f"| [`{name}`](#{name}) |" in page
        assert f"\n### `{name}`\n" in page
        assert policies_table.rule(policy), name
        section = page.partition(f"### `{name}`")[2].partition("\n###")[0]
        for option in policy.option_types():
            assert f"`{option}`" in section
    assert "| - |" not in page.partition("\n###")[2], "an option without a documented meaning"


def test_docstrings_are_taken_apart():
    policy = registry.load().policy_class("trim")
    assert policies_table.rule(policy) == (
        "Keep the tokens that some head of the first cross-attention layer ranks among its best"
    )
    assert policies_table.moment(policy) == "layer"


def test_docstrings_become_markdown():
    text = "Keep\n  a * b of them.\n\nDeviations: one; ``x*y``\n    * first\n      item\n    * second"
    assert policies_table.prose(text) == [
        "Keep a \\* b of them.",
        "",
        "**Deviations:** one; ``x*y``",
        "* first item",
        "* second",
    ]


def test_measurements_say_where_and_when():
    found = policies_table.measured()
    for part in ("memory", "demo"):
        assert {"date", "machine", "versions", "policies"} <= set(found[part])
        assert set(found[part]["policies"]) <= set(registry.load().policies), "a policy that is gone"


def test_what_is_not_measured_is_a_dash(monkeypatch):
    monkeypatch.setattr(policies_table, "measured", lambda: {"memory": None, "demo": None})
    rows = [line for line in policies_table.render().splitlines() if line.startswith("| [`")]
    assert rows
    assert all(row.endswith("| - | - |") for row in rows)


@pytest.mark.parametrize("missing", [policies_table.BEGIN, policies_table.END])
def test_a_page_without_markers_is_not_written(missing):
    with pytest.raises(AssertionError, match="has no"):
        policies_table.replaced(policies_table.DOCUMENT.read_text("utf-8").replace(missing, ""))


def test_measurements_are_read_from_what_the_commands_write(tmp_path: Path, undrawn: None):
    memory = {
        "date": "2026-01-02",
        "machine": "abacus",
        "versions": {"torch": "9"},
        "measurements": [
            {"spec": "trim:keep_ratio=0.5", "dtype": "bfloat16", "peak_bytes": 3 * 2**20},
            {"spec": "trim:keep_ratio=0.5", "dtype": "float32", "peak_bytes": 2**20},
        ],
    }
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    assert policies_table.from_memory(tmp_path / "memory.json")["policies"] == {
        "trim": {"bfloat16": 3.0, "float32": 1.0}
    }
    command = ["compare", "--all", "--limit", "1", "--tasks", "read", "--max-new-tokens", "1"]
    command += ["--keep-ratios", "0.25", "--repetitions", "0", "--output", str(tmp_path / "out")]
    kvprune_command(*command)
    found = policies_table.from_results(tmp_path / "out")
    assert {"full", "lossless", "trim", "norm", "random", "uniform"} <= set(found["policies"])
    assert (found["examples"], found["reread"]) == (1, True)
    assert found["policies"]["full"]["right"] == found["full"]
