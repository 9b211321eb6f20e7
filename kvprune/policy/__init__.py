"""What the author of a policy reads and writes: views, base classes, options, specs, checks.

Everything that a policy needs beside `kvprune` itself and `kvprune.scoring` is imported from here.
"""

from __future__ import annotations

from kvprune.policy.allocators import (
    LayerAllocator,
    ProportionalAllocator,
)
from kvprune.policy.base import (
    CrossKVPolicy,
    Need,
)
from kvprune.policy.budgeted import (
    BudgetPolicy,
    ScoringPolicy,
    onward_decision,
)
from kvprune.policy.checks import (
    check_scores,
)
from kvprune.policy.moments import (
    FeaturePolicy,
    FeatureScoringPolicy,
    PrefillPolicy,
)
from kvprune.policy.nesting import (
    require_scorer,
)
from kvprune.policy.spec import (
    PolicySpec,
)
from kvprune.policy.text_view import (
    TextView,
)
from kvprune.policy.view import (
    FeatureView,
    LayerView,
    View,
)
from kvprune.tokens.buckets import (
    merge_mean,
    merge_weighted,
    nearest,
)

__all__ = [
    "BudgetPolicy",
    "CrossKVPolicy",
    "FeaturePolicy",
    "FeatureScoringPolicy",
    "FeatureView",
    "LayerAllocator",
    "LayerView",
    "Need",
    "PolicySpec",
    "PrefillPolicy",
    "ProportionalAllocator",
    "ScoringPolicy",
    "TextView",
    "View",
    "check_scores",
    "merge_mean",
    "merge_weighted",
    "nearest",
    "onward_decision",
    "require_scorer",
]
