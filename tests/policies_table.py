"""docs/policies.md says what the installed policies say of themselves, and what was measured of them.

`python tests/policies_table.py` writes the part between the markers again; a test fails while it is older
than the classes or the measurements. Measurements are in docs/policies.json, which is written by

    kvprune bench memory --repetitions 0 --json > memory.json
    kvprune compare --all --draws 5 --repetitions 0 --output demo
    python tests/policies_table.py --memory memory.json --demo demo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from kvprune.cli.policies import read_docstrings
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import ScoringPolicy
from kvprune.policy.options import describe_type
from kvprune.policy.spec import PolicySpec
from kvprune.session import registry
from kvprune.text import REFERENCE

DOCUMENT = Path(__file__).parents[1] / "docs" / "policies.md"
MEASURED = DOCUMENT.with_suffix(".json")
BEGIN, END = "<!-- generated: python tests/policies_table.py -->", "<!-- end of what is generated -->"

RATIO = 0.25
"""The budget of which the table shows the accuracy."""


def policies() -> dict[str, type[CrossKVPolicy]]:
    """Return the built-in policies by name."""
    found = registry.load().policies
    return {name: found[name].cls for name in sorted(found) if found[name].distribution == "kvprune"}


def moment(policy: type[CrossKVPolicy]) -> str:
    """Return when a policy decides, as the class says."""
    return policy.moment


def rule(policy: type[CrossKVPolicy]) -> str:
    """Return the first sentence of the docstring."""
    first = " ".join(read_docstrings(policy)[0].partition("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".")


def prose(text: str) -> list[str]:
    """Return a docstring as Markdown: a line for each paragraph and list item, asterisks as they are."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        for part in re.split(r"\n\s*(?=[*-] )", paragraph):
            whole = re.sub(r"^Deviations:", "**Deviations:**", " ".join(part.split()))
            item = whole.startswith(("* ", "- "))
            lines += ([] if item or not lines else [""]) + [whole if item else _stars(whole)]
    return lines


def _stars(text: str) -> str:
    """Escape asterisks that are no emphasis: all outside of code, but those that make Deviations bold."""
    bold, head = text.startswith("**Deviations:**"), "**Deviations:**"
    parts = re.split("(``.*?``|`.*?`)", text.removeprefix(head) if bold else text)
    escaped = "".join(part if number % 2 else part.replace("*", "\\*") for number, part in enumerate(parts))
    return head + escaped if bold else escaped


def measured() -> dict[str, Any]:
    """Return docs/policies.json; without it, nothing is measured."""
    if not MEASURED.exists():
        return {"memory": None, "demo": None}
    return dict(json.loads(MEASURED.read_text("utf-8")))


def render() -> str:
    """Return what stands between the markers."""
    data, found = measured(), policies()
    lines = [
        "| name | rule | decides at | fidelity | paper | cost | MiB at 11B | right at 25 % |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(name, policy, data) for name, policy in found.items()),
        "",
        *_captions(data),
        "",
        "## Each of them",
    ]
    for name, policy in found.items():
        lines += ["", f"### `{name}`", "", *_describe(name, policy)]
    lines += [
        "",
        "### Options that scoring policies share",
        "",
        *_table(ScoringPolicy, list(_options(ScoringPolicy))),
    ]
    return "\n".join(lines)


def _row(name: str, policy: type[CrossKVPolicy], data: dict[str, Any]) -> str:
    kind = REFERENCE if policy.reads_answer else policy.fidelity
    cells = [f"[`{name}`](#{name})", rule(policy), moment(policy), kind, policy.paper, policy.cost]
    memory, demo = ((data[part] or {}).get("policies", {}).get(name) for part in ("memory", "demo"))
    peak = "-" if memory is None else " / ".join(f"{memory[dtype]:.0f}" for dtype in ("bfloat16", "float32"))
    right = "-" if demo is None else f"{demo['right']:.0f} [{demo['low']:.0f}, {demo['high']:.0f}]"
    return "| " + " | ".join(_cell(cell) for cell in (*cells, peak, right)) + " |"


def _captions(data: dict[str, Any]) -> list[str]:
    memory, demo, lines = data["memory"], data["demo"], []
    if memory:
        lines.append(
            "*MiB at 11B*: most memory that one decision with default options holds beside its inputs, in "
            "bfloat16 / float32, at the dimensions of Llama-3.2-11B-Vision. For a policy that decides in "
            "steps: what it prepares, one step, and the copy of what that step reads "
            f"(`kvprune bench memory`; {_where(memory)})."
        )
    if demo:
        mode = "the last prompt token read again" if demo["reread"] else "plain generate"
        lines += [
            "",
            f"*Right at 25 %*: right answers on the embedded demo in per cent of {demo['examples']}, with "
            f"95 % Wilson intervals, at `keep_ratio={RATIO}` (`reach=onward` where there is that option), "
            f"{mode}; the full cache: {demo['full']:.0f} "
            f"(`kvprune compare --all --draws 5`; {_where(demo)}).",
        ]
    return lines


def _where(one: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return f"{one['date']}, {one['machine']}, {versions}"


def _describe(name: str, policy: type[CrossKVPolicy]) -> list[str]:
    lines = prose(read_docstrings(policy)[0])
    shared = [
        option
        for option in _options(policy)
        if _options(ScoringPolicy).get(option) == _options(policy)[option]
    ]
    own = [option for option in _options(policy) if option not in shared]
    lines += ["", *_table(policy, own)] if own else []
    if shared:
        lines += [
            "",
            f"{'Also ' if own else 'Options: '}{', '.join(f'`{option}`' for option in shared)} (see below).",
        ]
    if policy.bibtex:
        lines += ["", f"To cite: `kvprune cite {name}`."]
    return lines


def _options(policy: type[CrossKVPolicy]) -> dict[str, tuple[object, ...]]:
    """Return what tells one option from another of the same name."""
    types, meanings = policy.option_types(), read_docstrings(policy)[1]
    return {
        name: (types[name], option.default, meanings.get(name))
        for name, option in ((option.name, option) for option in dataclasses.fields(policy))
    }


def _table(policy: type[CrossKVPolicy], options: list[str]) -> list[str]:
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for name in options:
        kind, default, meaning = _options(policy)[name]
        shown = "required" if default is dataclasses.MISSING else str(default).lower() or "empty"
        cells = f"`{name}`", describe_type(kind), shown, _stars(str(meaning or "-"))
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|") or "-"


def from_memory(path: Path) -> dict[str, Any]:
    """Return what docs/policies.json keeps of the output of `kvprune bench memory --json`."""
    report = json.loads(path.read_text("utf-8"))
    found: dict[str, dict[str, float]] = {}
    for one in report["measurements"]:
        name = PolicySpec.parse(one["spec"]).name
        found.setdefault(name, {})[one["dtype"]] = round(one["peak_bytes"] / 2**20, 1)
    return {**{key: report[key] for key in ("date", "machine", "versions")}, "policies": found}


def from_results(folder: Path) -> dict[str, Any]:
    """Return what docs/policies.json keeps of a results folder of `kvprune compare --all`."""
    summary, manifest = (
        json.loads((folder / f"{one}.json").read_text("utf-8")) for one in ("summary", "manifest")
    )
    found = {}
    for row in summary["rows"]:
        if row["guide"]:  # the row of another model
            continue
        spec = PolicySpec.parse(row["label"])
        if not row["budget"] or (row["keep_ratio"] == RATIO and set(spec.options) <= {"reach", "digest"}):
            found[spec.name] = {key: round(100 * row["accuracy"][key], 1) for key in ("value", "low", "high")}
            found[spec.name]["right"] = found[spec.name].pop("value")
    about, context = manifest["about"], manifest["run"]["context"]
    return {
        "date": manifest["created"][:10],
        "machine": f"{context['device']}, threads: {about['threads']}",
        "versions": {name: about[name] for name in ("python", "kvprune")}
        | {name: context["versions"][name] for name in ("torch", "transformers")},
        "examples": summary["examples"],
        "reread": summary["reread"],
        "full": round(100 * summary["rows"][0]["accuracy"]["value"], 1),
        "policies": found,
    }


def replaced(text: str) -> str:
    """Return the page with what is generated made new."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    assert begin, f"{DOCUMENT.name} has no {BEGIN}"
    assert end, f"{DOCUMENT.name} has no {END}"
    return f"{head}{BEGIN}\n{render()}\n{END}{tail}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write docs/policies.md again.")
    parser.add_argument("--memory", type=Path, help="output of kvprune bench memory --json")
    parser.add_argument("--demo", type=Path, help="results folder of kvprune compare --all")
    given = parser.parse_args()
    data = measured()
    if given.memory:
        data["memory"] = from_memory(given.memory)
    if given.demo:
        data["demo"] = from_results(given.demo)
    if given.memory or given.demo:
        MEASURED.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text("utf-8")), encoding="utf-8")
