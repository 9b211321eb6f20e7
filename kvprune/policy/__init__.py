"""What the author of a policy reads and writes: views, base classes, options, specs, checks.

Everything that a policy needs besides `kvprune` itself and `kvprune.scoring` is imported from here.

Which base class do I take? It depends on when the method decides, and on what it computes:

it decides                              it computes                  base class             you write
-------------------------------------------------------------------------------------------------------------
right after each layer's attention      a score of each token        ScoringPolicy          score
                                        what is kept, with a budget  BudgetPolicy           select
                                        what is kept, no budget      CrossKVPolicy          select
before the first cross-attention layer  a score of each token        FeatureScoringPolicy   score
                                        what is kept                 FeaturePolicy          choose
when all layers have attended           a weight of each layer       ProportionalAllocator  measure, weights
                                        how urgent each token is     LayerAllocator         measure, urgency
                                        what each layer keeps        PrefillPolicy          observe, conclude
in each decode step                     what the step reads          DecodePolicy           prepare, attend

`FeaturePolicy`, `PrefillPolicy` and `DecodePolicy` get a budget by
``class Mine(BudgetPolicy, FeaturePolicy)``. A policy of any kind may prune the text's own cache as well: it
needs "text_cache" and writes ``select_text``. One with trained weights is
``class Mine(TrainedPolicy, FeaturePolicy)``, or with another base class in place of `FeaturePolicy`.
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
from kvprune.policy.decode import (
    DecodePolicy,
    takes_steps,
)
from kvprune.policy.moments import (
    FeaturePolicy,
    FeatureScoringPolicy,
    PrefillPolicy,
)
from kvprune.policy.nesting import (
    require_scorer,
)
from kvprune.policy.reconstruction import (
    Reconstruction,
)
from kvprune.policy.spec import (
    PolicySpec,
)
from kvprune.policy.step_view import (
    HeldView,
    State,
    StepView,
)
from kvprune.policy.text_view import (
    TextView,
)
from kvprune.policy.trained import (
    TrainedPolicy,
)
from kvprune.policy.view import (
    FeatureView,
    LayerView,
    View,
)
from kvprune.policy.weights import (
    save_weights,
)
from kvprune.tokens.buckets import (
    merge_mean,
    merge_weighted,
    nearest,
)
from kvprune.tokens.randomness import (
    uniform,
)

__all__ = [
    "BudgetPolicy",
    "CrossKVPolicy",
    "DecodePolicy",
    "FeaturePolicy",
    "FeatureScoringPolicy",
    "FeatureView",
    "HeldView",
    "LayerAllocator",
    "LayerView",
    "Need",
    "PolicySpec",
    "PrefillPolicy",
    "ProportionalAllocator",
    "Reconstruction",
    "ScoringPolicy",
    "State",
    "StepView",
    "TextView",
    "TrainedPolicy",
    "View",
    "check_scores",
    "merge_mean",
    "merge_weighted",
    "nearest",
    "onward_decision",
    "require_scorer",
    "save_weights",
    "takes_steps",
    "uniform",
]
