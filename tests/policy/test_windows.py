"""Attention from the last rows against plain loops: each stratum has a window of its own."""

import torch
from helpers import (
    conversations,
    live_rows,
    make_view,
    seen_by_row,
    slow_attention,
    slow_strata,
    visibilities,
)
from hypothesis import given
from hypothesis import strategies as st


@given(st.one_of(visibilities(), conversations()), st.integers(1, 6))
def test_each_stratum_is_scored_by_the_last_rows_that_see_it(visibility, rows):
    view = make_view(visibility)
    mass = view.window_mass(rows)
    expected = torch.zeros_like(mass)
    for sample in range(visibility.batch):
        for stratum in slow_strata(visibility, sample):
            window = [
                r for r in live_rows(visibility, sample) if seen_by_row(visibility, sample, r) & stratum
            ]
            counted = [[False] * visibility.live.shape[1] for _ in range(visibility.batch)]
            for row in window[-rows:]:
                counted[sample][row] = True
            for head in range(mass.shape[1]):
                scores = slow_attention(view, sample, head, counted)
                for column in stratum:
                    expected[sample, head, column] = scores[column]
    torch.testing.assert_close(mass, expected, rtol=1e-10, atol=1e-12)


@given(conversations(), st.integers(1, 6))
def test_a_head_gives_each_stratum_as_much_as_its_window_has_rows(visibility, rows):
    mass = make_view(visibility).window_mass(rows)
    for sample in range(visibility.batch):
        for stratum in slow_strata(visibility, sample):
            window = [
                r for r in live_rows(visibility, sample) if seen_by_row(visibility, sample, r) & stratum
            ]
            total = mass[sample][:, list(stratum)].sum(-1)
            torch.testing.assert_close(total, torch.full_like(total, min(rows, len(window))))
