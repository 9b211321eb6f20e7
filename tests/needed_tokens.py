"""Which tokens the demo's questions need, and which of them policies keep: `python tests/needed_tokens.py`.

A question needs the patches that its glyphs cover: those that it asks for or names. Questions whose answer is
"0" or "no" need none. A patch with some ink, but fewer than 16 pixels of a glyph's, is an edge; a patch with
none is ground. For each keep ratio, two tables are printed:

1. How many answers are right, of all and of those that need something (the last prompt token is read again,
   as in `kvprune compare`). `+ ground` is the same after four of the kept tokens that are not ground were
   replaced by four that are, drawn at random, for policies that keep one set in all layers; what a policy
   merged is not merged again. Then which share of the needed tokens is kept: in all tasks, in each, and of
   each glyph of tasks that need several in turn. The first rows are no policies: they keep the same at any
   keep ratio.
2. The same share by cross-attention layer, and of what any head of the first one keeps; how many questions
   keep half of the ink of each glyph that they need, in some layer and head, and how many answers to these
   and to the others are right; and what kept tokens show. `(all)` says what all tokens show.

Last comes what scores rank low: each score's mean by what tokens show, and its rank correlation, over the
patches of a picture, with lying on a glyph and with being needed. All scores but cosines and costs of places
are relative to their mean. Shares and scores are means over heads, then over layers, then over questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from question_needs import Question, Row, means, questions
from rich.console import Console
from rich.table import Table
from token_scores import score_rows
from torch import Tensor

import kvprune
from kvprune import CrossKVPolicy, Decision, LayerView, demo, get_policy, onward_decision
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.comparison.execution.encoder_reuse import EncoderReuse
from kvprune.comparison.plan.all_policies import every_policy
from kvprune.demo.evaluate import encode

BATCH, SWAPPED = 16, 4
IN_TURN = {"beside": 2, "row": 3}
"""Tasks that need several glyphs in turn, and how many: the later ones for later tokens of the answer."""


def some(mask: Tensor, count: int, seed: int = 0) -> Tensor:
    """Return `count` of the tokens of a mask, drawn at random, or all if there are fewer; bool [260]."""
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros_like(mask)
    drawn[order[mask[order]][:count]] = True
    return drawn


REFERENCES: Mapping[str, Callable[[Question], Tensor]] = {
    "(all)": lambda one: torch.ones_like(one.needs),
    "(needed)": lambda one: one.needs,
    "(needed and 1 ground)": lambda one: one.needs | some(one.shows["ground"], 1),
    "(needed and 16 ground)": lambda one: one.needs | some(one.shows["ground"], 16),
    "(all but needed)": lambda one: ~one.needs,
    "(all but ground)": lambda one: ~one.shows["ground"],
}
"""What is kept, bool [260], by rules that no policy could follow."""


@dataclass(frozen=True, kw_only=True)
class Exactly(CrossKVPolicy):
    """Keeps the tokens of `_KEEP` in all layers."""

    name = "exactly"

    def select(self, view: LayerView) -> Decision:
        return Decision() if view.rank else onward_decision(view, _KEEP[-1])


_KEEP: list[Tensor] = []


@dataclass(frozen=True)
class Asked:
    """The model, and batches of questions that it answers; the vision tower runs once for each batch."""

    model: Any
    processor: Any
    batches: Sequence[tuple[Sequence[Question], Any, EncoderReuse]]
    seed: int = 0

    @classmethod
    def of(cls, asked: Sequence[Question], model: Any, processor: Any, seed: int) -> Asked:
        cut = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        encoded = [encode(processor, [one.example for one in batch]) for batch in cut]
        encoders = [EncoderReuse.of(MllamaAdapter(model)) for _ in cut]
        return cls(model, processor, list(zip(cut, encoded, encoders, strict=True)), seed)

    def under(self, policy: str | Sequence[Tensor]) -> tuple[list[Row], list[Tensor | None]]:
        """Ask everything under a policy, or with exactly some tokens of each question, bool [260].

        Returns:
            The numbers of each question; and for each, the one set that all layers keep, if there is one.
        """
        rows: list[Row] = []
        sets: list[Tensor | None] = []
        for batch, inputs, encoder in self.batches:
            if not isinstance(policy, str):
                masks = policy[len(rows) : len(rows) + len(batch)]
                # What keeps nothing, because nothing is needed, keeps everything.
                _KEEP[:] = [torch.stack([mask if mask.any() else ~mask for mask in masks])[:, None]]
            chosen = get_policy(policy) if isinstance(policy, str) else Exactly()
            with (
                kvprune.compress(self.model, chosen, seed=self.seed, reread=True) as run,
                encoder.during(chosen),
            ):
                output = self.model.generate(**inputs, max_new_tokens=12, do_sample=False)
            answers = output[:, inputs["input_ids"].shape[1] :]
            texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for number, (question, text) in enumerate(zip(batch, texts, strict=True)):
                kept = {layer: one.mask[number] for layer, one in run.selections.items()}  # [H or 1, 260]
                first = next(iter(kept.values()))[0]
                same = all(bool((mask == first).all()) for mask in kept.values())
                rows.append(measure(question, kept, text.strip() in question.example.answers))
                sets.append(first if same else None)
        return rows, sets

    def policy(self, spec: str) -> Row:
        """Return the means of all numbers under a policy."""
        rows, sets = self.under(spec)
        found = means(rows)
        questions = [one for batch, _, _ in self.batches for one in batch]
        pairs = zip(questions, sets, strict=True)
        swapped = [with_ground(one, kept) for one, kept in pairs if kept is not None]
        if len(swapped) == len(questions):
            found["+ ground"] = means(self.under(swapped)[0])["right"]
        return found


def with_ground(question: Question, kept: Tensor) -> Tensor:
    """Replace some kept tokens that are not ground by as many that are; bool [260] both."""
    ground = question.shows["ground"]
    leave, come = some(kept & ~ground, SWAPPED), some(ground & ~kept, SWAPPED)
    return (kept & ~leave) | some(come, int(leave.sum()))


def measure(question: Question, kept: Mapping[int, Tensor], right: bool) -> Row:
    """Return the numbers of one question; `kept` has what each layer keeps, bool [H or 1, 260]."""
    shares = {layer: mask.double().mean(0) for layer, mask in kept.items()}  # [260], share of heads
    mean = torch.stack(list(shares.values())).mean(0)
    found: Row = {"right": right, "kept": float(mean.mean())}
    found |= {f"on {what}": float(mean[there].sum() / mean.sum()) for what, there in question.shows.items()}
    if not question.needed:
        return found
    task, needs, ink = question.example.task, question.needs, question.ink[:, question.needed]
    found["needing"] = right
    found["all"] = found[task] = float(mean[needs].mean())
    for place, glyph in enumerate(question.needed if task in IN_TURN else (), start=1):
        found[f"{task} {place}"] = float(mean[question.covered[:, glyph]].mean())
    found |= {f"layer {layer}": float(share[needs].mean()) for layer, share in shares.items()}
    found["any head"] = float(next(iter(kept.values())).any(0)[needs].double().mean())
    half = bool((2 * ink[mean > 0].sum(0) >= ink.sum(0)).all())
    return found | {"half kept": half, "right then" if half else "right else": right}


def table(title: str, columns: Sequence[str], rows: Mapping[str, Row], *, percent: bool) -> Table:
    """Return a table of some numbers of each row; those that a row does not have are empty."""
    made = Table("", *columns, title=title, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        cells = (row.get(column) for column in columns)
        made.add_row(name, *("" if x is None else f"{100 * x:.1f}" if percent else f"{x:.2f}" for x in cells))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", action="append", help="spec without a budget; default: all built-in ones")
    parser.add_argument("--keep-ratios", default="0.5,0.25,0.1", help="default: 0.5,0.25,0.1")
    parser.add_argument("--count", type=int, default=32, help="questions of each task; default: 32")
    parser.add_argument("--seed", type=int, default=0, help="seed of questions and of policies that draw")
    parser.add_argument("--model", type=Path, default=demo.model_path(), help="default: the embedded model")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    given = parser.parse_args(arguments)
    drawn = [one for task in demo.TASKS for one in questions(task, given.count, given.seed)]
    asked = Asked.of(drawn, *demo.load(path=given.model), given.seed)
    console, found = Console(width=200), {}
    references = {name: means(asked.under([*map(rule, drawn)])[0]) for name, rule in REFERENCES.items()}
    turns = [f"{task} {place + 1}" for task, places in IN_TURN.items() for place in range(places)]
    for ratio in given.keep_ratios.split(","):
        specs = given.policy or every_policy(adapter=MllamaAdapter).specs
        stated = {spec: f"{spec}{',' if ':' in spec else ':'}keep_ratio={ratio}" for spec in specs}
        rows = {spec: asked.policy(full) for spec, full in stated.items()}
        found[ratio] = references | dict(sorted(rows.items(), key=lambda item: -item[1]["right"]))
        layers, shown = (
            [name for name in references["(all)"] if name.startswith(start)] for start in ("layer ", "on ")
        )
        first = ["kept", "right", "needing", "+ ground", "all", *demo.TASKS, *turns]
        second = [*layers, "any head", "half kept", "right then", "right else", *shown]
        for title, columns in (
            ("needed tokens kept", first),
            ("by layer, and what kept tokens show", second),
        ):
            console.print(table(f"{title}, % at {ratio}", columns, found[ratio], percent=True))
    scored = score_rows(asked.model, asked.processor, drawn)
    columns = [name for name in next(iter(scored.values())) if name != "on glyph"]
    console.print(table("scores under the full cache", columns, scored, percent=False))
    if given.json:
        numbers = {"questions": len(drawn), "policies": found, "scores": scored}
        given.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
