"""kvprune: pruning policies for the cross-attention KV cache of vision-language and encoder-decoder models.

Importing it loads no plugin, changes nothing in torch or transformers, and starts nothing.
"""

from __future__ import annotations

from kvprune import errors, scoring
from kvprune.engine.guidance import Guidance
from kvprune.engine.report import CompressionReport
from kvprune.errors import KVPruneError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.budgeted import BudgetPolicy, ScoringPolicy, onward_decision
from kvprune.policy.moments import FeaturePolicy, FeatureScoringPolicy, PrefillPolicy
from kvprune.policy.nesting import require_scorer
from kvprune.policy.spec import PolicySpec
from kvprune.policy.text_view import TextView
from kvprune.policy.view import FeatureView, LayerView
from kvprune.session.compression import Compression, compress
from kvprune.session.early_exit import GuidedAnswers, guided_generate
from kvprune.session.guide import Guide
from kvprune.session.hookspecs import hookimpl
from kvprune.session.registry import get_policy, list_policies
from kvprune.tokens.budget import Budget
from kvprune.tokens.decision import Decision
from kvprune.tokens.layout import Layout
from kvprune.tokens.selection import Selection

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
