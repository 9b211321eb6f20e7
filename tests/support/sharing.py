"""Policies that share a budget out, asked about several layers at once; and sharing out with plain loops."""

import math

from helpers import kept_sets, make_view, slow_groups, slow_strata
from hypothesis import assume

LAYERS = 3


def layers_over(visibility, seed=0, layers=LAYERS, **fields):
    """Views of random layers over one visibility."""
    return [make_view(visibility, seed=100 * seed + rank, rank=rank, **fields) for rank in range(layers)]


def concluded(policy, views):
    """Decisions about all layers, asked as the cache manager asks."""
    observed = [policy.observe(view) for view in views]
    bare = [view.capturing(queries=None, raw_keys=None, features=None, text=None) for view in views]
    return policy.conclude(bare, observed)


def kept_by_layer(policy, views):
    """Kept columns as nested lists: layer, sample, head."""
    return [kept_sets(decision.cache) for decision in concluded(policy, views)]


def counts_of(policy, views):
    """Numbers of kept columns by layer, of the first sample and head."""
    return [len(layer[0][0]) for layer in kept_by_layer(policy, views)]


def visible_of(visibility, sample):
    """What a budget counts: the columns that decoding sees, or all where no row sees an image."""
    return slow_strata(visibility, sample)[0]


def groups_of(visibility, sample):
    """How many columns must stay."""
    visible = visible_of(visibility, sample)
    return max(1, sum(bool(group & visible) for group in slow_groups(visibility, sample)))


def share_out(urgency, least, most, total):
    """Give token after token to the row whose next one is most urgent; drawn games are left out.

    Args:
        urgency: Called with a row and a place.
        least: Of each row.
        most: Of each row.
        total: Of all rows.
    """
    counts = list(least)
    while sum(counts) < min(total, sum(most)):
        rows = [row for row in range(len(counts)) if counts[row] < most[row]]
        wanted = {row: urgency(row, counts[row]) for row in rows}
        best = max(wanted.values())
        near = [row for row in rows if math.isclose(wanted[row], best, rel_tol=1e-4, abs_tol=1e-9)]
        assume(len(near) == 1 or len({wanted[row] for row in near}) == 1)
        counts[min(near, key=lambda row: (counts[row], row))] += 1
    return counts


def best_of(scores, visible, count):
    """The columns with the highest scores; equal scores by position."""
    return set(sorted(visible, key=lambda column: (-scores[column], column))[:count])
