"""kvprune: pruning policies for the cross-attention KV cache of vision-language and encoder-decoder models.

Importing it loads no plugin, changes nothing in torch or transformers, and starts nothing. Each public name
is imported when it is first used, so that `kvprune --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; a test compares it with the tables below
    from kvprune import adapters as adapters
    from kvprune import cache as cache
    from kvprune import demo as demo
    from kvprune import engine as engine
    from kvprune import errors as errors
    from kvprune import policy as policy
    from kvprune import scoring as scoring
    from kvprune import session as session
    from kvprune import testing as testing
    from kvprune import text as text
    from kvprune import tokens as tokens
    from kvprune.engine.guidance import Guidance as Guidance
    from kvprune.engine.report import CompressionReport as CompressionReport
    from kvprune.errors import KVPruneError as KVPruneError
    from kvprune.policy.base import CrossKVPolicy as CrossKVPolicy
    from kvprune.policy.budgeted import BudgetPolicy as BudgetPolicy
    from kvprune.policy.budgeted import ScoringPolicy as ScoringPolicy
    from kvprune.policy.budgeted import onward_decision as onward_decision
    from kvprune.policy.decode import DecodePolicy as DecodePolicy
    from kvprune.policy.moments import FeaturePolicy as FeaturePolicy
    from kvprune.policy.moments import FeatureScoringPolicy as FeatureScoringPolicy
    from kvprune.policy.moments import PrefillPolicy as PrefillPolicy
    from kvprune.policy.nesting import require_scorer as require_scorer
    from kvprune.policy.spec import PolicySpec as PolicySpec
    from kvprune.policy.step_view import HeldView as HeldView
    from kvprune.policy.step_view import StepView as StepView
    from kvprune.policy.text_view import TextView as TextView
    from kvprune.policy.trained import TrainedPolicy as TrainedPolicy
    from kvprune.policy.view import FeatureView as FeatureView
    from kvprune.policy.view import LayerView as LayerView
    from kvprune.session.answer_guide import answer_attention as answer_attention
    from kvprune.session.compression import Compression as Compression
    from kvprune.session.compression import compress as compress
    from kvprune.session.contrast import Contrast as Contrast
    from kvprune.session.contrast import contrast as contrast
    from kvprune.session.contrast_report import ContrastReport as ContrastReport
    from kvprune.session.contrast_rules import CombineRule as CombineRule
    from kvprune.session.early_exit import GuidedAnswers as GuidedAnswers
    from kvprune.session.early_exit import guided_generate as guided_generate
    from kvprune.session.guide import Guide as Guide
    from kvprune.session.hookspecs import hookimpl as hookimpl
    from kvprune.session.registry import get_policy as get_policy
    from kvprune.session.registry import list_policies as list_policies
    from kvprune.session.saved_cache import SavedCache as SavedCache
    from kvprune.session.saved_cache import load_cache as load_cache
    from kvprune.tokens.budget import Budget as Budget
    from kvprune.tokens.decision import Decision as Decision
    from kvprune.tokens.layout import Layout as Layout
    from kvprune.tokens.replacement import Replacement as Replacement
    from kvprune.tokens.selection import Selection as Selection

__version__ = "0.1.0"

_NAMES = {
    "Budget": "tokens.budget",
    "BudgetPolicy": "policy.budgeted",
    "CombineRule": "session.contrast_rules",
    "Compression": "session.compression",
    "CompressionReport": "engine.report",
    "Contrast": "session.contrast",
    "ContrastReport": "session.contrast_report",
    "CrossKVPolicy": "policy.base",
    "Decision": "tokens.decision",
    "DecodePolicy": "policy.decode",
    "FeaturePolicy": "policy.moments",
    "FeatureScoringPolicy": "policy.moments",
    "FeatureView": "policy.view",
    "Guidance": "engine.guidance",
    "Guide": "session.guide",
    "GuidedAnswers": "session.early_exit",
    "HeldView": "policy.step_view",
    "KVPruneError": "errors",
    "LayerView": "policy.view",
    "Layout": "tokens.layout",
    "PolicySpec": "policy.spec",
    "PrefillPolicy": "policy.moments",
    "Replacement": "tokens.replacement",
    "SavedCache": "session.saved_cache",
    "ScoringPolicy": "policy.budgeted",
    "Selection": "tokens.selection",
    "StepView": "policy.step_view",
    "TextView": "policy.text_view",
    "TrainedPolicy": "policy.trained",
    "answer_attention": "session.answer_guide",
    "compress": "session.compression",
    "contrast": "session.contrast",
    "get_policy": "session.registry",
    "guided_generate": "session.early_exit",
    "hookimpl": "session.hookspecs",
    "list_policies": "session.registry",
    "load_cache": "session.saved_cache",
    "onward_decision": "policy.budgeted",
    "require_scorer": "policy.nesting",
}
"""Each public name, and the module of kvprune that defines it."""

_MODULES = (
    "adapters",
    "cache",
    "demo",
    "engine",
    "errors",
    "policy",
    "scoring",
    "session",
    "testing",
    "text",
    "tokens",
)
"""Modules that are there after ``import kvprune``, such as ``kvprune.testing``."""

__all__ = sorted([*_NAMES, "__version__", "errors", "scoring"])


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module, when it is first used (PEP 562)."""
        if name in _NAMES:
            value = getattr(importlib.import_module(f"kvprune.{_NAMES[name]}"), name)
        elif name in _MODULES:
            value = importlib.import_module(f"kvprune.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value  # the next use finds it without coming here
        return value


def __dir__() -> list[str]:
    """List also what was not imported yet; not demo, which needs packages that may not be installed."""
    return sorted({*_NAMES, *_MODULES} - {"demo"} | set(globals()))
