"""The last sections of the page: how each set was made, and what the page does not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from evidence.numbers import EvidenceSet
from evidence.wording import code_list

_FEW = 20


def origin(sets: Mapping[str, EvidenceSet]) -> list[str]:
    """Return commands, machine, versions and date of each set."""
    lines = [
        "## Commands, machines and versions",
        "",
        "Run these in one folder, then `python tests/evidence_page.py --results FOLDER`. Machine, versions,",
        "dates and digests are those that the manifests of the results folders record.",
        "`kvprune verify FOLDER` runs a sample again.",
        "",
    ]
    for one in sets.values():
        lines += [f"**{one.title}**", "", "```console", *one.prepare, *one.commands, "```", ""]
        lines += [f"* {what}: {said}" for what, said in one.made.items()]
        mode = "the last prompt token read again from the pruned cache" if one.reread else "plain generate"
        draws = f"{one.draws} seed{'s' * (one.draws > 1)}"
        lines += [f"* mode: {mode}; {draws} for policies that draw", ""]
    return lines


def limits(sets: Mapping[str, EvidenceSet]) -> list[str]:
    """Return what the page does not show."""
    return ["## What this page does not show", "", *(f"* {line}" for line in _limits(sets))]


def _limits(sets: Mapping[str, EvidenceSet]) -> Iterator[str]:
    models = ", ".join(dict.fromkeys(one.made["model"] for one in sets.values()))
    yield (
        f"A large vision-language model. The models here are small ({models}). What holds on them need not "
        "hold on Llama-3.2-Vision 11B or 90B."
    )
    yield (
        "A mean over sets. They are never pooled, above all not read and synthetic speech: a synthetic voice "
        "says little about a human one."
    )
    languages = sorted({language for one in sets.values() for language in one.languages})
    if languages:
        yield f"Speech in other languages than: {', '.join(languages)}."
    for one in sets.values():
        if one.examples < _FEW:
            unit = "utterances" if one.speech else "questions"
            yield f"Small differences on {one.title}: {one.examples} {unit} are few, as its intervals say."
    pictures = [one.title for one in sets.values() if not one.speech]
    if pictures:
        yield (
            "Pictures and questions of the field's benchmarks. A program makes those of "
            f"{'; '.join(pictures)}, and the models are trained on its pictures."
        )
    once = [one.title for one in sets.values() if one.draws == 1]
    if once:
        yield f"The luck of the draw on {'; '.join(once)}: policies drew once, and no interval counts that."
    partial = [f"{one.title} ({code_list(one.left_out)})" for one in sets.values() if one.left_out]
    if partial:
        yield f"All built-in methods in each table. Missing are those of {'; '.join(partial)}."
    yield "Methods at the settings of their papers. They ran with their defaults at each budget."
    yield "Speed and memory: nothing was timed. `kvprune compare` and `kvprune bench` measure both."
    yield (
        "How well a method works where it was published. Most were published for image tokens among text in "
        "self-attention; [fidelity](fidelity.md) says what differs here."
    )
