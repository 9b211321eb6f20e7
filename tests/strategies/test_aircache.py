"""`aircache` against its rule with plain loops: elite rows, importance, skewness, and shares of layers."""

import dataclasses
import math

import pytest
import torch
from helpers import alone, conversations, exact_budget, live_rows, make_view, make_visibility, slow_attention
from hypothesis import given
from hypothesis import strategies as st
from kvprune_strategies import H2O, AirCache, Norm
from sharing import best_of, concluded, counts_of, kept_by_layer, layers_over, share_out, visible_of
from text_views import make_text, slow_row

import kvprune
from kvprune.errors import PolicyOptionError, UnsupportedModelError

ratios = st.integers(1, 100).map(lambda percent: percent / 100)
alphas = st.sampled_from([0, 0.5, 0.9, 1.0])


def with_text(views, seed=0, dtype=torch.float64):
    """The views, each with a self-attention before it whose text is as long as theirs."""
    return [
        view.capturing(
            text=make_text([view.live.shape[1]] * view.batch, seed=31 * seed + number, dtype=dtype)
        )
        for number, view in enumerate(views)
    ]


def slow_elite(view, sample, alpha):
    """Rows that see what decoding sees and to which the last of them attends nearly as much as to any."""
    visible = visible_of(view.visibility, sample)
    rows = [
        row
        for row in live_rows(view.visibility, sample)
        if any(
            view.visibility.rows[sample, min(row, view.visibility.rows.shape[1] - 1)][
                view.visibility.units.expand(view.batch, -1)[sample, column]
            ]
            for column in visible
        )
    ]
    if not rows:
        return []
    by_head = [slow_row(view.captured.text, sample, head, rows[-1]) for head in range(4)]
    weights = [math.fsum(head[row] for head in by_head) / 4 for row in range(view.live.shape[1])]
    highest = max(weights[row] for row in rows)
    return [row for row in rows if weights[row] >= alpha * highest or row == rows[-1]]


def slow_importance(view, sample, elite):
    counted = [[row in elite for row in range(view.live.shape[1])] for _ in range(view.batch)]
    heads = [slow_attention(view, sample, head, counted) for head in range(4)]
    return [math.fsum(column) / 4 / max(1, len(elite)) for column in zip(*heads, strict=True)]


def slow_skewness(numbers):
    count = len(numbers)
    mean = math.fsum(numbers) / max(1, count)
    if count < 3 or max(numbers) - min(numbers) <= 1e-6 * abs(mean):
        return 0.0
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (count - 1))
    cubes = math.fsum(((x - mean) / deviation) ** 3 for x in numbers)
    return max(0.0, count / ((count - 1) * (count - 2)) * cubes)


def over_mean(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return [number / mean if mean > 0 else 1.0 for number in numbers]


@given(conversations(), ratios, alphas, st.sampled_from(["constant", "none"]), st.integers(0, 3))
def test_layers_keep_what_elite_rows_look_at_of_their_share(visibility, ratio, alpha, strength, seed):
    views = with_text(layers_over(visibility, seed), seed)
    kept = kept_by_layer(AirCache(keep_ratio=ratio, alpha=alpha, strength=strength), views)
    for sample in range(visibility.batch):
        visible = visible_of(visibility, sample)
        importance = [slow_importance(view, sample, slow_elite(view, sample, alpha)) for view in views]
        skewness = over_mean([slow_skewness([of[column] for column in visible]) for of in importance])
        share = skewness if strength == "none" else [(1 + skew) / 2 for skew in skewness]
        even = exact_budget(ratio, len(visible))
        counts = share_out(
            lambda layer, place, s=share: s[layer] / (place + 0.5), [1] * 3, [len(visible)] * 3, 3 * even
        )
        for layer, count in enumerate(counts):
            assert kept[layer][sample] == [best_of(importance[layer], visible, count)]


@given(conversations(), alphas, st.integers(0, 3))
def test_elite_rows_are_those_that_the_last_one_attends_to(visibility, alpha, seed):
    (view,) = with_text(layers_over(visibility, seed, layers=1), seed)
    elite = AirCache(alpha=alpha).elite(view)
    for sample in range(visibility.batch):
        assert elite[sample].nonzero().flatten().tolist() == slow_elite(view, sample, alpha)


def text_that_looks_at(row, rows):
    """A self-attention in which every row looks at one row most."""
    text = make_text([rows])
    keys = torch.zeros_like(text.keys)
    keys[:, :, row] = 1
    return dataclasses.replace(text, keys=keys, queries=torch.ones_like(text.queries) * 5)


def test_rows_before_the_image_are_no_candidates():
    """The first token of a prompt gets most attention, and sees no image."""
    visibility = make_visibility([[[0], [0], [1], [1], [1]]], 6)
    view = make_view(visibility, captured_text=text_that_looks_at(0, 5))
    assert AirCache().elite(view).tolist() == [[False, False, True, True, True]]  # all of the rest alike
    view = make_view(visibility, captured_text=text_that_looks_at(2, 5))
    assert AirCache().elite(view).tolist() == [[False, False, True, False, True]]
    assert AirCache(alpha=0).elite(view).tolist() == [[False, False, True, True, True]]


def test_all_rows_vote_at_alpha_zero():
    view = make_view(make_visibility([[[1]] * 4], 12), captured_text=make_text([4]))
    policy = AirCache(alpha=0, keep_ratio=0.4)
    mean = view.attention_mass().mean(1) / 4
    torch.testing.assert_close(policy.measure(view)[:, 2:], mean)


@given(st.integers(0, 9), st.floats(0.1, 10))
def test_skewness_does_not_depend_on_scale(seed, scale):
    from kvprune_strategies.aircache import _skewness

    numbers = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)).double()
    counted = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    got = _skewness(numbers * scale + 3, counted).tolist()
    assert got == pytest.approx(_skewness(numbers, counted).tolist(), rel=1e-6)
    assert got == pytest.approx([slow_skewness(n[c].tolist()) for n, c in zip(numbers, counted, strict=True)])


def test_equal_layers_keep_the_same():
    (view,) = with_text([make_view(make_visibility([[[1]] * 3], 30))])
    for strength in ("constant", "output", "none"):
        assert counts_of(AirCache(keep_ratio=0.25, strength=strength), [view] * 3) == [8] * 3


def test_even_attention_has_no_skewness_and_shares_are_even():
    base = make_view(make_visibility([[[1]] * 3], 30))
    flat = [dataclasses.replace(base, keys=base.keys * 0)] * 3
    assert counts_of(AirCache(keep_ratio=0.25, strength="none"), with_text(flat)) == [8] * 3


def test_layers_that_stand_out_keep_more_and_all_together_the_budget():
    base = make_view(make_visibility([[[1]] * 3], 60))
    views = with_text([dataclasses.replace(base, keys=base.keys * scale) for scale in (0, 1, 4)])
    counts = counts_of(AirCache(keep_ratio=0.2), views)
    assert counts == sorted(counts)
    assert counts[0] < counts[2]
    assert sum(counts) == 36
    only = concluded(AirCache(keep_ratio=0.2, strength="none"), views)
    assert int(only[0].cache.counts[0, 0]) == 1
    assert "shared among the other layers" in only[0].note


def test_output_is_the_length_of_what_the_heads_read():
    base = make_view(make_visibility([[[1]] * 3], 20))
    views = with_text([base, dataclasses.replace(base, values=base.values * 3)])
    policy = AirCache(alpha=0, strength="output")
    first, second = (policy.measure(view) for view in views)
    weights = base.attention_mass() / 3
    heads = [weights[0, head] @ base.values[0, head // 2] for head in range(4)]
    assert float(first[0, 0]) == pytest.approx(math.sqrt(sum(float(head @ head) for head in heads)))
    assert float(second[0, 0]) == pytest.approx(3 * float(first[0, 0]))
    # Equal skewness, strengths of 1 and 3: shares of 3/4 and 5/4.
    assert counts_of(AirCache(alpha=0, strength="output", keep_tokens=8), views) == [6, 10]
    assert counts_of(AirCache(alpha=0, keep_tokens=8), views) == [8, 8]


@given(conversations(), ratios)
def test_a_sample_keeps_alone_what_it_keeps_in_a_batch(visibility, ratio):
    views = with_text(layers_over(visibility))
    together = kept_by_layer(AirCache(keep_ratio=ratio), views)
    for sample in range(visibility.batch):
        one = slice(sample, sample + 1)
        texts = [
            dataclasses.replace(
                view.captured.text,
                **{
                    name: getattr(view.captured.text, name)[one]
                    for name in ("queries", "keys", "values", "real")
                },
            )
            for view in views
        ]
        own = [alone(view, sample).capturing(text=text) for view, text in zip(views, texts, strict=True)]
        by_itself = kept_by_layer(AirCache(keep_ratio=ratio), own)
        assert [layer[0] for layer in by_itself] == [layer[sample] for layer in together]


def test_a_scorer_chooses_tokens_and_changes_no_budget():
    views = with_text(layers_over(make_visibility([[[1]] * 3], 20)))
    own, other = (AirCache(keep_ratio=0.3, scorer=scorer) for scorer in (None, Norm()))
    assert counts_of(own, views) == counts_of(other, views)
    norms = views[0].values.norm(dim=-1)[0].tolist()
    count = counts_of(own, views)[0]
    assert kept_by_layer(other, views)[0][0] == [best_of(of, set(range(20)), count) for of in norms]


def test_a_layer_without_a_self_attention_before_it_is_refused():
    (view,) = with_text([make_view(make_visibility([[[1]]], 4))])
    with pytest.raises(UnsupportedModelError, match="no self-attention comes before it"):
        AirCache().observe(dataclasses.replace(view.capturing(text=None), follows_text=False))


def test_defaults_and_needs():
    assert kvprune.get_policy("aircache") == AirCache(alpha=0.9, strength="constant", keep_ratio=0.5)
    assert AirCache().needs == {"queries", "text"}
    assert AirCache(scorer=H2O()).scorer == H2O()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aircache:alpha=1.5", r"alpha of policy 'aircache' .*\[0, 1\], got 1\.5"),
        ("aircache:strength=gate", "constant | output | none"),
        ("aircache:scorer=norm(keep_tokens=2)", "sets keep_tokens"),
    ],
)
def test_bad_options_are_refused(spec, message):
    with pytest.raises(PolicyOptionError, match=message):
        kvprune.get_policy(spec)
