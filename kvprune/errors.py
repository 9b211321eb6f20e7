"""Every exception that kvprune raises, in one tree, and nothing else.

A message says what was wrong, shows the value it got, and says what would be right.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BudgetError",
    "CitationError",
    "CompressionStateError",
    "ConformanceError",
    "DataError",
    "GuideError",
    "IncompatibleTransformersError",
    "KVPruneError",
    "NameClashError",
    "NestedCompressionError",
    "PluginError",
    "PolicyFailedError",
    "PolicyNeverRanError",
    "PolicyOptionError",
    "QuantizationError",
    "ReceiptError",
    "ResultsError",
    "ScoreError",
    "SelectionError",
    "SpecError",
    "UnknownInvariantError",
    "UnknownPolicyError",
    "UnsupportedCacheError",
    "UnsupportedModelError",
]


class KVPruneError(Exception):
    """Root of the tree: catching it catches every error that kvprune raises on purpose."""


class SpecError(KVPruneError):
    """A spec string or a spec in JSON does not follow the grammar, or names another version."""


class UnknownPolicyError(KVPruneError):
    """No installed plugin provides a policy of this name."""


class PolicyOptionError(KVPruneError):
    """A policy was given an option that it does not have, or a value that the option cannot take."""


class BudgetError(PolicyOptionError):
    """A budget is not a ratio in (0, 1] or a positive number of tokens."""


class PluginError(KVPruneError):
    """A plugin could not be imported or registered, and something of it was asked for."""


class CitationError(KVPruneError):
    """A policy has no paper of its own, or brings no BibTeX entry; the message says what to cite."""


class NameClashError(PluginError):
    """Two plugins provide the same name."""


class SelectionError(KVPruneError):
    """A selection breaks one of the invariants KV01 to KV05; the message cites which."""


class ScoreError(SelectionError):
    """A policy's ``score`` returned something that cannot rank tokens (wrong shape, NaN, no tensor)."""


class QuantizationError(KVPruneError):
    """Keys or values cannot be quantized (not finite), or to as many bits as were asked for."""


class UnsupportedModelError(KVPruneError):
    """No installed adapter knows this model."""


class UnsupportedCacheError(KVPruneError):
    """The cache in use (its type, its absence, or the mask beside it) cannot be compressed correctly."""


class IncompatibleTransformersError(KVPruneError):
    """The installed transformers no longer has something that an adapter relies on."""


class CompressionStateError(KVPruneError):
    """A compression was attached, detached or read in an order that makes no sense."""


class NestedCompressionError(CompressionStateError):
    """A model that is already being compressed was to be compressed again."""


class PolicyNeverRanError(KVPruneError):
    """An image went through the model, but the policy that was asked for was never consulted."""


class DataError(KVPruneError):
    """A row of a data file cannot be used; the message names the file, the row and the field."""


class ResultsError(KVPruneError):
    """A results folder is not one, is damaged, or belongs to another run."""


class PolicyFailedError(KVPruneError):
    """A policy raised an error of its own while it decided; that error is the cause."""


class GuideError(KVPruneError):
    """A guide cannot guide this model here, or the policy does not ask for one."""


class ReceiptError(KVPruneError):
    """What a receipt says is not what the live cache holds, or the cache is gone."""


class ConformanceError(KVPruneError):
    """A policy breaks invariants; ``report`` is the `kvprune.testing.ConformanceReport`."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class UnknownInvariantError(KVPruneError):
    """The conformance suite was asked about an invariant that there is none of this id."""
