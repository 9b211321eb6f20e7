"""docs/fidelity.md says, method by method, what its selections were compared with and in what it differs.

`python tests/fidelity_table.py` writes the page from the classes and from the recorded selections in
tests/published/data; a test fails while the page is older than either.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "published"))

from policies_table import policies
from published import DATA, Case, load, unverified

DOCUMENT = Path(__file__).parents[1] / "docs" / "fidelity.md"

HEAD = """# Which method is what its name says

Each built-in method was run beside the published one on the same tensors, and the kept tokens were compared.
Where the authors' code could be had, their own functions ran, outside this repository. What they selected is
recorded in `tests/published/data` with repository, commit, function and settings, and a test compares it with
the policy. Where there is no code, another implementation was run, or the published text was transcribed.

* **whole**: the published procedure as it is run, settings included, up to the tokens that it keeps. **part**: a
  part of it; the case says which.
* **faithful**: the published text or code was read, and the sets agree for the whole procedure. **adapted**:
  the rule is the published one, but something must differ in cross-attention. **inspired-by**: no more.
* A preset is a published setting by name: `snapkv:preset=published`. `kvprune show NAME` lists presets, the
  line on what differs, and all deviations.
* Nothing here says that a method *works* as well as published. Cross-attention caches hold encoder tokens
  without text among them, and no paper measured these methods there, except for `trim`.

`python tests/fidelity_table.py` writes this page, and a test fails when it is stale.
"""


def render() -> str:
    """Return the page."""
    lines = [
        HEAD,
        "| method | fidelity | same sets as | at | what differs | what is unverified |",
        "|---|---|---|---|---|---|",
    ]
    for name, policy in policies().items():
        if not policy.paper:
            continue
        cases = load(name) if (DATA / f"{name}.json").exists() else []
        sources = dict.fromkeys(_source(case) for case in cases)
        cells = [
            f"[`{name}`](policies.md#{name})",
            policy.fidelity,
            "<br>".join(sources) or "nothing",
            "<br>".join(f"`{spec}`" for spec in _specs(cases)) or "-",
            _sentence(policy.differs) or "nothing is known to differ",
            _sentence(unverified(name)) if cases else "everything",
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") or "-" for cell in cells) + " |")
    whole = [name for name in policies() if _is_whole(name)]
    lines += ["", f"Whole procedures: {len(whole)} ({', '.join(f'`{name}`' for name in whole)}).", ""]
    return "\n".join(lines)


def _is_whole(name: str) -> bool:
    return (DATA / f"{name}.json").exists() and any(case.whole for case in load(name))


def _source(case: Case) -> str:
    at = f"@{case.source['commit'][:7]}" if case.source["commit"] else ""
    return f"{case.source['kind']} {case.source['repository']}{at}, {'whole' if case.whole else 'part'}"


def _specs(cases: list[Case]) -> list[str]:
    """Return a few specs for a reader: those of whole procedures first, presets before others."""
    specs = dict.fromkeys(
        case.spec for case in sorted(cases, key=lambda case: (not case.whole, "preset=" not in case.spec))
    )
    return list(specs)[:3]


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    DOCUMENT.write_text(render(), "utf-8")
    print(f"wrote {DOCUMENT}")
