"""All exceptions that kvprune raises on purpose, with the common base class `KVPruneError`.

Each message says what was wrong, shows the value that was given, and says what would be right.
"""

from __future__ import annotations

import unicodedata
from typing import Any

__all__ = [
    "BudgetError",
    "CitationError",
    "CompressionStateError",
    "ConformanceError",
    "ContrastError",
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
    "SavedCacheError",
    "ScoreError",
    "SelectionError",
    "SpecError",
    "StudyError",
    "SynthesisError",
    "TrainingError",
    "UnknownInvariantError",
    "UnknownPolicyError",
    "UnsupportedCacheError",
    "UnsupportedModelError",
    "WeightsError",
]


class KVPruneError(Exception):
    """Base class of all exceptions that kvprune raises on purpose.

    As text, a message is printable: names, paths and errors of others in it may hold escape sequences, which
    a terminal would obey wherever the message or a traceback is printed.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if text.isprintable():
            return text
        return "".join(  # as `kvprune.text.printable`, which this file, the lowest of all, does not import
            char
            if char == "\n" or char.isprintable() or unicodedata.category(char) == "Zs"
            else char.encode("unicode_escape").decode()
            for char in text
        )


class SpecError(KVPruneError):
    """A spec (text or JSON) does not follow the grammar, or requires another version of the policy."""


class UnknownPolicyError(KVPruneError):
    """No installed plugin provides a policy of this name."""


class PolicyOptionError(KVPruneError):
    """A policy has no option of this name, or the option cannot take this value."""


class BudgetError(PolicyOptionError):
    """A budget is neither a ratio in (0, 1] nor a positive number of tokens."""


class WeightsError(PolicyOptionError):
    """Weights of a policy are missing, are not what the spec names, or do not fit the policy or the model."""


class PluginError(KVPruneError):
    """A plugin that is needed could not be imported or registered."""


class CitationError(KVPruneError):
    """A policy has no paper of its own or no BibTeX entry; the message says what to cite instead."""


class NameClashError(PluginError):
    """Two plugins provide the same name."""


class SelectionError(KVPruneError):
    """A selection breaks an invariant (KV01 to KV06, or KV15 for merges); the message cites it."""


class ScoreError(SelectionError):
    """A policy's ``score`` returned something that cannot rank tokens (wrong shape, NaN, not a tensor)."""


class QuantizationError(KVPruneError):
    """Keys or values cannot be quantized: they are not finite, or the number of bits is not supported."""


class UnsupportedModelError(KVPruneError):
    """No installed adapter supports this model."""


class UnsupportedCacheError(KVPruneError):
    """The cache cannot be compressed correctly: an unsupported type, no cache, or an unsupported mask."""


class IncompatibleTransformersError(KVPruneError):
    """The installed version of transformers lacks something that an adapter needs."""


class CompressionStateError(KVPruneError):
    """A compression was attached, detached or read in the wrong order."""


class NestedCompressionError(CompressionStateError):
    """The model is already being compressed."""


class PolicyNeverRanError(KVPruneError):
    """The model processed an image, but the policy was never called."""


class DataError(KVPruneError):
    """A row of a data file is not valid, or a folder cannot take a data set; the message says why."""


class SynthesisError(KVPruneError):
    """A speech synthesiser is missing, lacks a voice, fails, or gives a sound that cannot be used."""


class ResultsError(KVPruneError):
    """A folder is not a results folder, is damaged, or belongs to another run."""


class StudyError(KVPruneError):
    """A study file is not valid; the message names the file, the key, its value and what would be right."""


class PolicyFailedError(KVPruneError):
    """A policy raised an exception, which is the ``__cause__``, or says something impossible about itself."""


class GuideError(KVPruneError):
    """This guide model cannot be used with this model, or the policy does not use a guide."""


class ContrastError(KVPruneError):
    """Two branches of a model cannot be contrasted in this way, or the rule that combines them is unknown."""


class ReceiptError(KVPruneError):
    """A receipt does not match the contents of the live cache, or the cache no longer exists."""


class SavedCacheError(KVPruneError):
    """A cache cannot be saved, a file is no saved cache of this model, or a question does not fit to it."""


class ConformanceError(KVPruneError):
    """A policy breaks invariants; ``report`` is the `kvprune.testing.ConformanceReport`."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class TrainingError(KVPruneError):
    """Weights cannot be trained like this: the policy, the data, or the files that would be written."""


class UnknownInvariantError(KVPruneError):
    """No invariant has this id."""
