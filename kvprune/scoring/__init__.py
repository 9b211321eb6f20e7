"""Functions on scores that policies share: attention, ranks, budgets, similarity, neighbours.

Nothing here depends on a model or a cache. Ties are broken by position, so results do not depend on the
device. No function creates a [B, H, T, S] tensor.
"""

from __future__ import annotations

from kvprune.scoring.apportionment import (
    apportion,
    blended,
    each,
    is_clamped,
    proportional,
)
from kvprune.scoring.attention import (
    attention_density,
    attention_logits,
    attention_mass,
    attention_peak,
    by_kv_head,
    last_rows,
    logit_chunks,
    pool_heads,
    row_counts,
    softmax_,
)
from kvprune.scoring.even_spacing import (
    even_order,
    share_evenly,
)
from kvprune.scoring.farthest import farthest_first
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
from kvprune.scoring.transport import (
    sinkhorn_given,
)
from kvprune.scoring.volume import largest_volume
from kvprune.tokens.precision import (
    accumulation_dtype,
)

__all__ = [
    "Directions",
    "accumulation_dtype",
    "apportion",
    "attention_density",
    "attention_logits",
    "attention_mass",
    "attention_peak",
    "blended",
    "by_kv_head",
    "each",
    "each_stratum",
    "even_order",
    "farthest_first",
    "group_counts",
    "in_keeping_order",
    "is_clamped",
    "keep_top",
    "largest_volume",
    "last_rows",
    "limits",
    "lines",
    "logit_chunks",
    "members",
    "most_alike",
    "pool_heads",
    "pool_neighbours",
    "proportional",
    "rank_within",
    "row_counts",
    "share_evenly",
    "sinkhorn_given",
    "softmax_",
    "stratum_sizes",
]
