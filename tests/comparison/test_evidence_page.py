"""docs/evidence.md follows from results folders: what is read, refused, computed and written down."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import evidence_page
import pytest
from comparison_helpers import forge_context
from evidence import checks, figure, gather, page, plan, wording
from evidence.numbers import Contest, Estimate, EvidenceSet, Row, from_json, to_json
from evidence.plan import PlannedSet, read_plan

from kvprune import demo
from kvprune.comparison import Settings, compare
from kvprune.comparison.plan.grid import expand
from kvprune.comparison.statistics.rank_agreement import rank_agreements, ranked_scores
from kvprune.comparison.statistics.stored_summary import summary_of
from kvprune.comparison.storage.stored_run import read_run
from kvprune.errors import KVPruneError, ResultsError
from kvprune.policy.base import Need
from kvprune.session import registry

TASKS = ",".join(demo.TASKS[:2])
POLICIES = ("trim", "random:reach=onward", "norm:reach=onward", "fastv")
COMMAND = (
    f"kvprune compare {' '.join(f'--policy {one}' for one in POLICIES)} --keep-ratios 0.25,0.1 "
    f"--tasks {TASKS} --limit 2 --max-new-tokens 3 --repetitions 0 --output demo"
)


def settings(output: Path) -> Settings:
    return Settings(
        output=output, tasks=demo.TASKS[:2], limit=2, batch_size=4, max_new_tokens=3, repetitions=0
    )


def planned(**changes: Any) -> PlannedSet:
    words = {"key": "demo", "title": "Demo", "about": "Pictures.", "asks": True, "figure": "pictures"}
    return PlannedSet(**{**words, "commands": (COMMAND,), "aims": True, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two results folders: one, and the same answers said to be of another model."""
    root = tmp_path_factory.mktemp("evidence")
    compare(POLICIES, (0.25, 0.1), settings(root / "demo"))
    shutil.copytree(root / "demo", root / "other")
    (root / "other" / "timings.jsonl").touch()
    forge_context(root / "other", model_digest="sha256:another")
    return root


@pytest.fixture(scope="module")
def found(made: Path) -> EvidenceSet:
    return gather.gather(planned(), made)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "root")


def test_the_numbers_are_those_of_the_summary(found: EvidenceSet, made: Path) -> None:
    stored = read_run(made / "demo")
    summary = summary_of(stored, "random:reach=onward")
    assert [row.label for row in found.rows] == [row.label for row in summary.rows]
    for own, row in zip(found.rows, summary.rows, strict=True):
        assert (own.rate.value, own.rate.low, own.kept) == (row.main.value, row.main.low, row.kept_fraction)
        assert own.tasks == {task: rate.value for task, rate in row.tasks.items()}
        for mine, theirs in (
            (own.versus_full, row.versus_full),
            (own.versus_answer, row.versus_answer_attention),
            (own.versus_random, row.versus_baseline),
        ):
            assert (mine is None) == (theirs is None)
            assert mine is None or theirs is None or (mine.value, mine.high) == (theirs.value, theirs.high)
    assert found.chance == summary.constant_answer
    assert found.scores() == ranked_scores(summary)
    assert found.full.label == "full"
    assert {row.name for row in found.rows if row.misses_budget} == {"fastv"}


def test_the_best_with_and_without_the_prompt_are_compared_in_pairs(found: EvidenceSet, made: Path) -> None:
    stored = read_run(made / "demo")
    assert [one.keep_ratio for one in found.contests] == [0.25, 0.1]
    for one in found.contests:
        assert one.reading == "trim", "the only one that reads the prompt and meets its budget"
        at = found.at(one.keep_ratio)
        others = [at[label] for label in ("random:reach=onward", "norm:reach=onward")]
        assert at[one.blind].rate.value == max(row.rate.value for row in others)
        (row,) = (
            row
            for row in summary_of(stored, one.blind).rows
            if (row.label, row.keep_ratio) == ("trim", one.keep_ratio)
        )
        assert row.versus_baseline is not None
        assert (one.difference.value, one.difference.low) == (
            row.versus_baseline.value,
            row.versus_baseline.low,
        )


def test_nothing_of_this_machine_stands_in_the_numbers(found: EvidenceSet, made: Path) -> None:
    assert str(made) not in to_json({"demo": found})
    assert found.made["model"] == "embedded demo"
    assert gather._last("/home/somebody/model") == "model"
    assert gather._last("openai/whisper-base") == "openai/whisper-base"


def test_the_page_can_be_made_from_the_numbers_alone(made: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "docs").mkdir()
    other = COMMAND.replace("--output demo", "--output other")
    sets = tmp_path / "sets.toml"
    sets.write_text(
        f'[demo]\ntitle = "Demo"\nabout = "Pictures."\nasks = true\naims = true\nfigure = "pictures"\n'
        f"commands = ['{COMMAND}']\n"
        f'[other]\ntitle = "Other"\nabout = "Pictures."\nasks = true\nfigure = "pictures"\n'
        f"commands = ['{other}']\nsame_questions_as = \"demo\"\n"
    )
    options = ["--sets", str(sets), "--docs", str(tmp_path / "docs")]

    def run(*more: str, code: int = 0) -> dict[str, bytes]:
        assert evidence_page.main([*options, *more]) == code
        return {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}

    assert not run(code=2)
    assert "set 'demo' was never read; give --results" in capsys.readouterr().err
    whole = run("--results", str(made))
    assert set(whole) == {"evidence.md", "evidence.json", "evidence_pictures.png"}
    assert run() == whole, "the same from the numbers"
    assert run("--results", str(made), "--only", "other") == whole
    assert run("--only", "other", code=2) == whole
    assert run("--results", str(made), "--only", "another", code=2) == whole
    assert "there is no set 'another'; the plan has: demo, other" in capsys.readouterr().err
    sets.write_text(sets.read_text().replace('title = "Other"', 'title = "Renamed"'))
    assert b"## Renamed" in run()["evidence.md"]
    sets.write_text(sets.read_text().replace("--limit 2", "--limit 3"))
    run(code=2)
    assert "the commands of set 'demo' have changed" in capsys.readouterr().err

    text = whole["evidence.md"].decode()
    assert "| `full` | - | " in text
    assert "| `trim` | yes | " in text
    assert "| `norm:reach=onward` | no | " in text
    assert "| *`answer-attention`* (reference) | answer | " in text
    assert re.search(r"\| `fastv` \| yes \| [\d.]+ \[\d+, \d+\] kept \d+ % \|", text), "and no rank"
    assert "| Demo | Other | " in text
    assert "* Demo and Other: " in text
    assert f"\n{COMMAND}\n" in text
    assert text.count("![Demo; Other](evidence_pictures.png)") == 1


def test_what_the_page_says_is_what_is_stored_in_docs() -> None:
    """Nothing to test before the page was first made."""
    stored = evidence_page.stored()
    if stored:
        sets = evidence_page.collect(read_plan(), stored, (), Path())
        now = (evidence_page.DOCS / evidence_page.PAGE).read_text("utf-8")
        assert page.render(sets) == now, "run: python tests/evidence_page.py"
        for name in {f"evidence_{one.figure}.png" for one in sets.values()}:
            assert (evidence_page.DOCS / name).stat().st_size < 400_000, name


def test_missing_and_unfinished_folders_are_refused(root: Path) -> None:
    lines = (root / "demo" / "results.jsonl").read_text().splitlines(keepends=True)
    (root / "demo" / "results.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ResultsError, match="unfinished: 1 answers are missing; run its command again"):
        gather.gather(planned(), root)
    shutil.rmtree(root / "demo")
    with pytest.raises(ResultsError, match="there are no results at"):
        gather.gather(planned(), root)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("--limit 2", "--limit 3", "examples per task is 3 in the command and 2 in the folder"),
        ("--limit 2", "", "examples per task is 32 in the command and 2 in the folder"),
        ("--limit 2", "--limit 2 --draws 5", "draws is 5 in the command and 1 in the folder"),
        ("--limit 2", "--limit 2 --seed 7", "seed is 7 in the command and 0 in the folder"),
        ("--limit 2", "--limit 2 --no-reread", "reread is False in the command and True in the folder"),
        ("--limit 2", "--limit 2 --dtype float64", "dtype is float64 in the command and auto"),
        ("--limit 2", "--limit 2 --device cuda", "device is cuda in the command and cpu"),
        ("--limit 2", "--data some.jsonl", "demo is None in the command and pictures"),
        ("--limit 2", "--limit 2 --no-answer-attention", "answer-attention is False in the command and True"),
        ("--max-new-tokens 3", "--max-new-tokens 4", "max_new_tokens is 4 in the command and 3"),
        ("0.25,0.1", "0.25", r"keep ratios is \[0.25\] in the command and \[0.1, 0.25\] in the folder"),
        ("--policy fastv", "", "policies is .* in the command and .*fastv"),
        (f"--tasks {TASKS}", f"--tasks {demo.TASKS[0]}", "tasks is .* in the command"),
    ],
)
def test_a_folder_of_another_command_is_refused(made: Path, old: str, new: str, what: str) -> None:
    assert old in COMMAND
    with pytest.raises(ResultsError, match=f"was not made by the command that the page would show: {what}"):
        gather.gather(planned(commands=(COMMAND.replace(old, new),)), made)


def test_policies_may_be_spread_over_folders_of_the_same_questions(root: Path, found: EvidenceSet) -> None:
    compare(("random:reach=onward", "trim"), (0.25, 0.1), settings(root / "one"))
    compare(("norm:reach=onward", "fastv"), (0.25, 0.1), settings(root / "two"))
    base = COMMAND.partition("--policy")[0]
    rest = f"--keep-ratios{COMMAND.partition('--keep-ratios')[2]}"
    commands = (
        f"{base}--policy random:reach=onward --policy trim {rest}".replace("--output demo", "--output one"),
        f"{base}--policy norm:reach=onward --policy fastv {rest}".replace("--output demo", "--output two"),
    )
    whole = gather.gather(planned(commands=commands), root)
    assert {(row.label, row.keep_ratio): row for row in whole.rows} == {
        (row.label, row.keep_ratio): row for row in found.rows
    }
    other = COMMAND.replace("--output demo", "--output other")
    with pytest.raises(ResultsError, match="do not belong into one table: model_digest was"):
        gather.gather(planned(commands=(COMMAND, other)), root)


def test_sets_that_belong_together_are_checked(found: EvidenceSet) -> None:
    other = dataclasses.replace(found, key="other", same_questions_as="demo")
    with pytest.raises(ResultsError, match=r"\[other\] belongs beside \[demo\], which was not read"):
        gather.check_together({"other": other})
    with pytest.raises(ResultsError, match=r"\[other\] and \[demo\] were answered by the same model"):
        gather.check_together({"demo": found, "other": other})
    odd = dataclasses.replace(other, questions_digest="0")
    with pytest.raises(ResultsError, match=r"\[other\] and \[demo\] did not answer the same questions"):
        gather.check_together({"demo": found, "other": odd})
    good = dataclasses.replace(other, made={**other.made, "model digest": "another"})
    gather.check_together({"demo": found, "other": good})


def test_what_reads_the_prompt_follows_from_what_policies_declare() -> None:
    encoder = {"raw_keys", "features", "class_attention", "text_cache", "grid", "reconstruction"}
    assert set(gather.PROMPT) | encoder == set(get_args(Need)), "does a new need know the prompt?"
    names = [
        name
        for name, entry in registry.load().policies.items()
        if entry.distribution == "kvprune" and "keep_ratio" in entry.cls.option_types()
    ]
    reading = {one.policy.name for one in expand(names, [0.25]) if one.budget and gather.reads_prompt(one)}
    assert {"trim", "h2o", "snapkv", "cdpruner", "guided", "adakv", "pyramid"} <= reading
    assert not reading & {"norm", "keydiff", "divprune", "random", "uniform", "topv", "visionzip", "prumerge"}
    (scored,) = (one for one in expand(["adakv:scorer=norm"], [0.25]) if one.budget)
    assert not gather.reads_prompt(scored), "its scorer does not"


def test_the_plan_is_read(tmp_path: Path) -> None:
    every = read_plan()
    for key, one in every.items():
        more = (f"{key}-by-layer", f"{key}-more")
        assert one.folders in ((key,), (key, more[0]), (key, *more))
    good = '[a]\ntitle = "A"\nabout = "x"\nasks = true\nfigure = "f"\n'
    good += 'commands = ["kvprune compare --all --output a", """kvprune compare \\\\\n --output b"""]\n'
    path = tmp_path / "sets.toml"
    for change, problem in (
        (lambda text: text + "wrong = 1\n", r"\[a\]: unknown field 'wrong'; known are title"),
        (lambda text: text.replace('title = "A"\n', ""), r"\[a\]: field 'title' is missing"),
        (lambda text: text.replace("true", "1"), r"\[a\]: field 'asks' is 1, not a bool"),
        (lambda text: text + 'same_questions_as = "b"\n', r"\[a\] names 'b', which is no set"),
        (lambda text: text.replace("compare --all", "list"), "is no `kvprune compare` command"),
        (lambda text: text.replace("--all", "--al"), "No such option"),
        (lambda text: text.replace("--output a", "--output /a"), "in the current one with --output"),
        (lambda text: text.replace("--output a", ""), "in the current one with --output"),
    ):
        path.write_text(change(good))
        with pytest.raises(KVPruneError, match=problem):
            read_plan(path)
    path.write_text(good)
    assert read_plan(path)["a"].folders == ("a", "b")
    assert plan.parameters("kvprune compare --draws 5 --output x")["draws"] == 5


Make = Callable[..., EvidenceSet]


@pytest.fixture
def make(found: EvidenceSet) -> Make:
    """Build a set from rates by label and budget; of its policies, only trim reads the prompt."""

    def row(label: str, ratio: float | None, rate: float, random: float | None = None) -> Row:
        name, versus = label.partition(":")[0], None
        if random is not None and name != "random":
            gap = rate - random
            versus = Estimate(value=gap, low=gap - 0.1, high=gap + 0.1, holds=gap < -0.2)
        return Row(
            label=label,
            name=name,
            keep_ratio=ratio,
            kept=ratio or 1.0,
            rate=Estimate(value=rate, low=rate - 0.02, high=rate + 0.02),
            tasks={"x": rate, "y": rate},
            reference=name == "answer-attention",
            reads_prompt=name == "trim",
            published=name in ("trim", "divprune"),
            misses_budget=False,
            loops=0,
            versus_full=None,
            versus_answer=None,
            versus_random=versus,
        )

    def make(rates: dict[str, dict[float, float]], full: float = 0.95, **changes: Any) -> EvidenceSet:
        random = rates.get("random:reach=onward", {})
        rows = [row("full", None, full)]
        rows += [
            row(label, ratio, rate, random.get(ratio))
            for label, by_ratio in rates.items()
            for ratio, rate in by_ratio.items()
        ]
        contests = tuple(
            Contest(
                keep_ratio=ratio,
                reading="trim",
                blind="divprune",
                difference=Estimate(
                    value=rates["trim"][ratio] - rates["divprune"][ratio], low=-0.01, high=0.01
                ),
            )
            for ratio in rates.get("trim", {})
            if "divprune" in rates
        )
        usual = {
            "rows": tuple(rows),
            "contests": contests,
            "tasks": {"x": 5, "y": 5},
            "chance": {"x": 0.5, "y": 0.1},
        }
        return dataclasses.replace(found, **{**usual, **changes})

    return make


RATES = {
    "random:reach=onward": {0.25: 0.6, 0.1: 0.3},
    "trim": {0.25: 0.9, 0.1: 0.8},
    "divprune": {0.25: 0.95, 0.1: 0.65},
}


def test_aims_are_met_or_not(make: Make) -> None:
    assert [line.partition("**")[2].partition("**")[0] for line in checks.aims(make(RATES))] == ["Met."] * 4
    assert "`trim` 80.0, `divprune` 65.0, difference +15.0" in checks.aims(make(RATES))[2]
    worse = {
        "random:reach=onward": {0.25: 0.7, 0.1: 0.7},
        "trim": {0.25: 0.5, 0.1: 0.7},
        "divprune": {0.25: 0.65, 0.1: 0.65},
    }
    lines = checks.aims(make(worse, full=0.89))
    assert [line.partition("**")[2].partition("**")[0] for line in lines] == ["Not met."] * 4
    assert lines[0].endswith("x 89.0, y 89.0. Below it: x, y.")
    assert lines[1].endswith("it loses 19.0 (70.0 right).")
    assert lines[3].partition("Worse: ")[2] == (
        "`trim` at 25 % (-20.0 points), `divprune` at 25 % (-5.0 points), `divprune` at 10 % (-5.0 points)."
    )
    unknown = checks.aims(make({"trim": {0.5: 0.9}}))
    assert [line.startswith("**Not known.**") for line in unknown] == [False, True, True, True]


def test_a_clear_loss_against_random_is_marked(make: Make) -> None:
    rates = {**RATES, "trim": {0.25: 0.3, 0.1: 0.3}}
    assert (
        "`trim` at 25 % (-30.0 points, a difference after Holm's correction)" in checks.aims(make(rates))[3]
    )


def test_ranks_and_order(make: Make) -> None:
    one = make(RATES)
    assert one.ranks(0.25) == {"divprune": 1, "trim": 2, "random:reach=onward": 3}
    assert one.ranks(0.1) == {"trim": 1, "divprune": 2, "random:reach=onward": 3}
    assert wording.order(one) == ["divprune", "trim", "random:reach=onward"]
    speech = make(RATES, kind="speech")
    assert speech.ranks(0.25) == {"random:reach=onward": 1, "trim": 2, "divprune": 3}, "lower is better"
    tied = make({**RATES, "divprune": RATES["trim"]})
    assert tied.ranks(0.25) == {"divprune": 1, "trim": 1, "random:reach=onward": 3}
    assert rank_agreements(one.scores(), speech.scores())[0].tau == -1
    rows = tuple(
        dataclasses.replace(row, misses_budget=True) if row.label == "divprune" else row for row in one.rows
    )
    off = dataclasses.replace(one, rows=rows)
    assert off.ranks(0.25) == {"trim": 1, "random:reach=onward": 2}
    assert wording.order(off)[-1] == "divprune"


def test_a_speech_set_says_lower_is_better_and_who_repeats_itself(make: Make) -> None:
    rates = {label: {ratio: 1 - rate for ratio, rate in of.items()} for label, of in RATES.items()}
    one = make(rates, full=0.05, kind="speech", chance={}, aims=False, asks=False, languages=("en",))
    rows = tuple(dataclasses.replace(row, loops=int(row.keep_ratio == 0.1)) for row in one.rows)
    text = page.render({"demo": dataclasses.replace(one, rows=rows)})
    assert "Word error rate in per cent; lower is better." in text
    assert "Policies with endless repetitions in a transcript: 3 of 3 at 10 %." in text
    assert "Worse than `random` at the same budget: none." in text
    assert "| Demo | 10 % | `trim`, 20.0 | `divprune`, 35.0 | +15.0 [-1, +1] |" in text
    assert "At 10 %, a policy that reads the prompt leads in 1 of 1 sets where it does not." in text
    assert "* Speech in other languages than: en." in text
    assert "chance" not in text
    assert figure.render([one]).startswith(b"\x89PNG")


def test_words() -> None:
    assert (wording.points(-0.0001), wording.points(0.0), wording.points(0.1234)) == ("0.0", "0.0", "+12.3")
    assert wording.points(-0.004, 0) == "0"
    onward = "random:reach=onward"
    plain = ["trim", "norm:reach=onward", "h2o", "fastv:rank=1", onward]
    assert wording.names(plain) == {**{label: label for label in plain}, onward: "random"}
    both = ["random", onward]
    assert wording.names(both) == {label: label for label in both}, "they would look alike"
    assert wording.table(["a", "b"], [["x", "1"]]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]


def test_numbers_of_another_format_are_refused() -> None:
    with pytest.raises(ResultsError, match="has format 0, but 1 is read here"):
        from_json('{"format": 0, "sets": {}}')
