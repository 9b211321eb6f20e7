"""kvprune: pruning policies for the cross-attention KV cache of vision-language and encoder-decoder models.

Importing it loads no plugin, changes nothing in torch or transformers, and starts nothing.
"""

from __future__ import annotations

from kvprune import errors, scoring
from kvprune.early_exit import GuidedAnswers, guided_generate
from kvprune.errors import KVPruneError
from kvprune.guidance import Guidance
from kvprune.guide import Guide
from kvprune.hookspecs import hookimpl
from kvprune.layout import Layout
from kvprune.moments import FeaturePolicy, FeatureScoringPolicy, PrefillPolicy
from kvprune.nesting import require_scorer
from kvprune.policy import BudgetPolicy, CrossKVPolicy, ScoringPolicy, onward_decision
from kvprune.registry import get_policy, list_policies
from kvprune.report import CompressionReport
from kvprune.selection import Budget, Decision, Selection
from kvprune.session import Compression, compress
from kvprune.spec import PolicySpec
from kvprune.text_view import TextView
from kvprune.view import FeatureView, LayerView

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "BudgetPolicy",
    "Compression",
    "CompressionReport",
    "CrossKVPolicy",
    "Decision",
    "FeaturePolicy",
    "FeatureScoringPolicy",
    "FeatureView",
    "Guidance",
    "Guide",
    "GuidedAnswers",
    "KVPruneError",
    "LayerView",
    "Layout",
    "PolicySpec",
    "PrefillPolicy",
    "ScoringPolicy",
    "Selection",
    "TextView",
    "__version__",
    "compress",
    "errors",
    "get_policy",
    "guided_generate",
    "hookimpl",
    "list_policies",
    "onward_decision",
    "require_scorer",
    "scoring",
]
