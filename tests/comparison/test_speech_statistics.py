"""Error rates of transcripts: pooled and by utterance, bootstrap intervals, permutation tests, draws."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statistics_helpers import transcript, utterance

from kvprune.comparison.plan.grid import expand
from kvprune.comparison.statistics.bootstrap import expanded_interval, over_draws, resampled_sums
from kvprune.comparison.statistics.permutation import sign_flip
from kvprune.comparison.statistics.rates import rate
from kvprune.comparison.statistics.summary import Row, Summary, summarise
from kvprune.errors import ResultsError

WORDS = (10, 20, 5, 8, 12, 30, 7, 9)


def speech(
    errors: dict[str, Any], *, words: tuple[int, ...] = WORDS, order: list[int] | None = None, **changes: Any
) -> Summary:
    """Summarise errors by spec, [utterances] or by seed; `order` gives the utterances in another order."""
    configurations = expand([spec for spec in errors if spec != "full"], [])
    asked = [utterance(number, "a" if number < 3 else "b") for number in range(len(words))]
    answers = {}
    for spec, found in errors.items():
        for seed, row in (found if isinstance(found, dict) else {None: found}).items():
            for number, count in enumerate(row):
                one = transcript(spec, asked[number], count, words[number], seed=seed, **changes)
                answers[one.key] = one
    asked = [asked[number] for number in order or range(len(asked))]
    return summarise(
        configurations, asked, answers, {}, batch_size=4, device="cpu", reread=True, against="trim"
    )


def rows(summary: Summary) -> dict[str, Row]:
    return {row.spec: row for row in summary.rows}


RANDOM, TRIM = "random:keep_ratio=0.5,reach=onward", "trim:keep_ratio=0.5"
FOUND = {"full": (0, 1, 0, 0, 2, 0, 0, 1), TRIM: (1, 1, 0, 2, 2, 0, 0, 3), RANDOM: (2, 4, 1, 2, 9, 0, 3, 1)}


def test_rates_are_pooled_and_by_utterance() -> None:
    summary = speech(FOUND)
    assert (summary.kind, summary.metric, summary.higher_is_better) == ("speech", "word_error_rate", False)
    assert (summary.window_seconds, summary.constant_answer) == (30.0, {})
    row = rows(summary)[RANDOM]
    assert row.speech is not None
    assert row.main == row.speech.word_error_rate
    assert (row.main.hits, row.main.total) == (sum(FOUND[RANDOM]), sum(WORDS))
    assert row.main.value == pytest.approx(22 / 101)
    one_by_one = [count / words for count, words in zip(FOUND[RANDOM], WORDS, strict=True)]
    assert row.speech.mean_word_error_rate.value == pytest.approx(sum(one_by_one) / 8)
    assert row.speech.character_error_rate.value == pytest.approx(3 * 22 / (5 * 101))
    assert row.speech.mean_character_error_rate.value == pytest.approx(3 / 5 * sum(one_by_one) / 8)
    assert row.tasks["a"].value == pytest.approx(7 / 35)
    assert row.accuracy == rate(1, 8), "transcripts without a wrong word"
    assert (row.speech.loops, row.unfinished) == (0, 0)


def test_endless_repetitions_and_cut_transcripts_are_counted() -> None:
    row = rows(speech(FOUND, loops=True, finished=False))[TRIM]
    assert row.speech is not None
    assert (row.speech.loops, row.unfinished) == (8, 8)


def test_the_order_of_utterances_does_not_matter() -> None:
    one, other = speech(FOUND), speech(FOUND, order=[4, 1, 2, 0, 7, 5, 6, 3])
    assert one.to_dict() | {"tasks": ()} == other.to_dict() | {"tasks": ()}
    assert one.to_dict() == speech(FOUND).to_dict(), "the same input gives the same summary"


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    random = np.random.default_rng(1)
    words = tuple(random.integers(5, 30, 60).tolist())
    errors = {spec: tuple(random.binomial(words, p).tolist()) for spec, p in (("full", 0.1), (TRIM, 0.2))}
    row = rows(speech(errors, words=words))[TRIM]
    level = 2 * stats.norm.cdf(math.sqrt(60 / 59) * stats.t.ppf(0.025, 59))

    def pooled(own: Any, other: Any, units: Any, axis: int) -> Any:
        return (own - other).sum(axis) / units.sum(axis)

    for other, found in ((np.zeros(60), row.main), (np.array(errors["full"]), row.versus_full)):
        done = stats.bootstrap(
            (np.array(errors[TRIM]), other, np.array(words)),
            pooled,
            paired=True,
            vectorized=True,
            n_resamples=20_000,
            confidence_level=1 - level,
            method="percentile",
            rng=np.random.default_rng(2),
        ).confidence_interval
        assert found is not None
        width = done.high - done.low
        assert found.low == pytest.approx(done.low, abs=0.05 * width)
        assert found.high == pytest.approx(done.high, abs=0.05 * width)


def test_resamples_are_of_the_same_size_and_shared() -> None:
    values = np.stack([np.ones(7), np.arange(7.0), 2 * np.arange(7.0)])
    sums = resampled_sums(values)
    assert (sums[:, 0] == 7).all()
    assert (sums[:, 2] == 2 * sums[:, 1]).all()
    assert sums[:, 1].mean() == pytest.approx(21, abs=0.3)
    assert sums[:, 1].var() == pytest.approx(7 * 4, rel=0.1), "n times the variance of 0..6"


def test_few_draws_are_resampled_without_bias() -> None:
    draws = np.array([1.0, 4.0])
    means = over_draws(np.broadcast_to(draws, (40_000, 2)))
    assert means.var() == pytest.approx(draws.var(ddof=1) / 2, rel=0.02)


def test_the_interval_is_as_wide_as_students_for_few() -> None:
    normal = np.random.default_rng(0).standard_normal(400_000) * math.sqrt(9 / 10)  # as a bootstrap has it
    low, high = expanded_interval(0.0, normal, 10, float(stats.t.ppf(0.975, 9)))
    assert (low, high) == pytest.approx((-2.262, 2.262), rel=0.02)
    assert expanded_interval(9.0, normal, 10, 2.262)[1] == 9.0, "the value itself is inside"


def test_without_any_error_there_is_still_doubt() -> None:
    row = rows(speech({"full": (0,) * 8, TRIM: (0,) * 8}))[TRIM]
    end = rate(0, 8).high / (sum(WORDS) / 8)
    assert (row.main.low, row.main.high) == pytest.approx((0, end))
    assert row.versus_full is not None
    assert (row.versus_full.value, row.versus_full.p_value) == (0.0, 1.0)
    assert (row.versus_full.low, row.versus_full.high) == pytest.approx((-end, end))


def test_one_utterance_says_nothing_about_others() -> None:
    row = rows(speech({"full": (0,), TRIM: (15,)}, words=(10,)))[TRIM]
    assert (row.main.low, row.main.value, row.main.high) == (0.0, 1.5, 1.5)
    assert row.versus_full is not None
    assert (row.versus_full.low, row.versus_full.high) == (-1.5, 1.5)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_the_sign_flip_test_counts_every_pattern(differences: list[int]) -> None:
    signs = itertools.product((-1, 1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in signs]
    wanted = sum(found >= abs(sum(differences)) for found in sums) / len(sums)
    found = sign_flip(np.array(differences, dtype=float))
    assert found == pytest.approx(wanted, abs=1e-12)
    assert found == pytest.approx(sign_flip(-np.array(differences, dtype=float)[::-1]), abs=1e-12)


def test_the_sign_flip_test_is_scipys() -> None:
    random = np.random.default_rng(3)
    one, other = random.poisson(2, 14), random.poisson(3, 14)
    done = stats.permutation_test(
        (one, other), lambda a, b: a.sum() - b.sum(), permutation_type="samples", n_resamples=2**14
    )
    assert sign_flip((one - other).astype(float)) == pytest.approx(done.pvalue)
    assert sign_flip(np.ones(200)) == pytest.approx(2.0**-199), "far below rounding"


def test_five_utterances_never_reach_five_percent() -> None:
    assert sign_flip(np.array([90.0, 80, 70, 60, 50])) == 2 / 2**5


def test_differences_are_paired_mirrored_and_zero_to_itself() -> None:
    found = rows(speech({**FOUND, "uniform:keep_ratio=0.5,reach=onward": FOUND[TRIM]}))
    same = found["uniform:keep_ratio=0.5,reach=onward"].versus_baseline
    assert same is not None
    assert (same.value, same.lost, same.gained, same.p_value) == (0.0, 0, 0, 1.0)
    own = found[RANDOM].versus_baseline
    assert own is not None
    assert own.value == pytest.approx((22 - 9) / 101)
    assert (own.lost, own.gained, own.pairs) == (5, 1, 8)
    swapped = rows(speech({"full": FOUND["full"], TRIM: FOUND[RANDOM], RANDOM: FOUND[TRIM]}))
    other = swapped[RANDOM].versus_baseline
    assert other is not None
    assert (other.value, other.low, other.high) == pytest.approx((-own.value, -own.high, -own.low))
    assert other.p_value == pytest.approx(own.p_value)
    assert found[TRIM].versus_baseline is None


def test_pairing_narrows_the_interval() -> None:
    hard = tuple(range(0, 60, 3))
    errors = {"full": hard, TRIM: tuple(count + 1 for count in hard)}
    row = rows(speech(errors, words=(60,) * 20))[TRIM]
    assert row.versus_full is not None
    assert row.versus_full.value == pytest.approx(1 / 60)
    width = row.versus_full.high - row.versus_full.low
    assert width < 1e-9, "each utterance has one more error, whichever are drawn"
    assert row.main.high - row.main.low > 0.2


def test_draws_widen_the_interval_by_their_luck() -> None:
    alike = dict.fromkeys(range(4), FOUND[RANDOM])
    apart = {seed: [count + 3 * seed for count in FOUND[RANDOM]] for seed in range(4)}
    one = rows(speech({**FOUND, RANDOM: alike}))[RANDOM]
    two = rows(speech({**FOUND, RANDOM: apart}))[RANDOM]
    single = rows(speech(FOUND))[RANDOM]
    assert (one.seeds, one.draws, single.seeds, single.draws) == ((0, 1, 2, 3), 4, (), 1)
    assert (one.main.value, one.main.low) == pytest.approx((single.main.value, single.main.low), rel=0.05)
    assert one.main.total == 4 * sum(WORDS)
    assert two.main.value == pytest.approx((22 + 8 * 4.5) / 101)
    assert two.main.high - two.main.low > 1.5 * (one.main.high - one.main.low)
    assert one.versus_baseline is not None
    assert two.versus_baseline is not None
    assert two.versus_baseline.p_value <= 1
    worse = {seed: [count + 30 for count in FOUND[RANDOM]] for seed in range(4)}
    sure = rows(speech({**FOUND, RANDOM: worse}))[RANDOM].versus_baseline
    assert sure is not None
    assert sure.p_value == 2 / 2**8, "eight utterances never give less, with however many draws"
    assert one.versus_baseline.pairs == 32


def test_an_example_that_drew_nothing_counts_for_every_draw() -> None:
    mixed = {None: FOUND[RANDOM], 3: FOUND[RANDOM][:2], 4: (0, 0)}
    row = rows(speech({**FOUND, RANDOM: mixed}))[RANDOM]
    assert row.seeds == (3, 4)
    assert row.main.hits == 22 + 22 - 6


def test_other_references_are_refused() -> None:
    configurations = expand([TRIM], [])
    asked = [utterance(number) for number in range(2)]
    answers = [transcript(one.spec, each, 0, 5) for one in configurations for each in asked]
    answers[-1] = dataclasses.replace(answers[-1], words=6)
    with pytest.raises(ResultsError, match="another number of words"):
        summarise(
            configurations,
            asked,
            {one.key: one for one in answers},
            {},
            batch_size=1,
            device="cpu",
            reread=True,
            against="trim",
        )


@pytest.mark.slow
@pytest.mark.parametrize(("utterances", "least"), [(15, 0.9), (60, 0.93)])
def test_the_bootstrap_covers_the_truth(utterances: int, least: float) -> None:
    """Words and error rates of utterances vary, and one in fifty repeats itself: skewed, as in life."""
    random, hits, rounds = np.random.default_rng(5), 0, 400

    def draw(count: int) -> tuple[Any, Any]:
        words = random.integers(5, 40, count)
        errors = random.binomial(words, random.beta(1, 6, count))
        return words, errors + (random.random(count) < 0.02) * 15

    words, errors = draw(2_000_000)
    truth = errors.sum() / words.sum()
    for _ in range(rounds):
        words, errors = draw(utterances)
        found = rows(speech({"full": tuple(errors.tolist())}, words=tuple(words.tolist())))["full"].main
        hits += found.low <= truth <= found.high
    assert least <= hits / rounds <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("draws", "luck"), [(5, 0.0), (5, 0.3), (3, 0.1)])
def test_the_bootstrap_over_utterances_and_draws_covers_the_truth(draws: int, luck: float) -> None:
    """Errors are Poisson: 0.1 of the words, times a factor of the utterance and one of the draw, means 1."""
    random, hits, rounds = np.random.default_rng(6), 0, 150
    for _ in range(rounds):
        words = random.integers(5, 40, 40)
        factor = random.gamma(2, 1 / 2, 40)
        found = {}
        for seed in range(draws):
            rate_of_draw = random.gamma(1 / luck**2, luck**2) if luck else 1.0
            found[seed] = random.poisson(0.1 * words * factor * rate_of_draw).tolist()
        nothing = (0,) * 40
        row = rows(speech({"full": nothing, RANDOM: found}, words=tuple(words.tolist())))[RANDOM]
        hits += row.main.low <= 0.1 <= row.main.high
    assert 0.89 <= hits / rounds <= 0.99


@pytest.mark.slow
def test_a_hundred_thousand_transcripts_are_summarised_in_seconds() -> None:
    random = np.random.default_rng(1)
    words = random.integers(5, 40, 1000)
    specs = [f"trim:keep_ratio={ratio / 200}" for ratio in range(1, 100)]
    errors = {spec: random.binomial(words, 0.1).tolist() for spec in ("full", *specs)}
    configurations = expand(specs, [])
    asked = [utterance(number, f"task {number % 4}") for number in range(1000)]
    answers = [
        transcript(one.spec, each, errors[one.spec][number], int(words[number]))
        for one in configurations
        for number, each in enumerate(asked)
    ]
    by_key = {one.key: one for one in answers}
    start = time.process_time()
    summarise(configurations, asked, by_key, {}, batch_size=4, device="cpu", reread=True, against="full")
    assert time.process_time() - start < 3, "about one second on a machine that has nothing else to do"
