"""Tensor mathematics that policies share: attention, ranks, budgets, similarity, neighbours.

Nothing here knows a model or a cache. Ties are broken by position, so results do not depend on the device.
Nothing ever holds a [B, H, T, S] tensor.
"""

from __future__ import annotations

from kvprune.scoring.apportionment import (
    apportion,
    each,
    is_clamped,
    proportional,
)
from kvprune.scoring.attention import (
    attention_density,
    attention_mass,
    by_kv_head,
    last_rows,
    pool_heads,
    row_counts,
)
from kvprune.scoring.even_spacing import (
    even_order,
    share_evenly,
)
from kvprune.scoring.neighbours import (
    lines,
    pool_neighbours,
)
from kvprune.scoring.ranking import (
    each_stratum,
    group_counts,
    in_keeping_order,
    keep_top,
    limits,
    members,
    rank_within,
    stratum_sizes,
)
from kvprune.scoring.similarity import (
    Directions,
    most_alike,
)
from kvprune.tokens.precision import (
    accumulation_dtype,
)

__all__ = [
    "Directions",
    "accumulation_dtype",
    "apportion",
    "attention_density",
    "attention_mass",
    "by_kv_head",
    "each",
    "each_stratum",
    "even_order",
    "group_counts",
    "in_keeping_order",
    "is_clamped",
    "keep_top",
    "last_rows",
    "limits",
    "lines",
    "members",
    "most_alike",
    "pool_heads",
    "pool_neighbours",
    "proportional",
    "rank_within",
    "row_counts",
    "share_evenly",
    "stratum_sizes",
]
