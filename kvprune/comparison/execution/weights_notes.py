"""Notes on weights that were trained on another model than the one that is compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kvprune.comparison.execution.claim import Claimed
from kvprune.policy.weights import WeightsFile
from kvprune.session.trained_weights import trained_parts, weights_facts

__all__ = ["weights_notes"]

_EMBEDDED = ("the embedded model", "embedded demo")
"""How files of weights name the embedded model."""


def weights_notes(claimed: Claimed) -> Iterator[str]:
    """Yield a sentence about each of the trained weights that learned on another model than this one.

    Weights may fit any model, and then nothing else would tell.
    """
    found: dict[str, None] = {}
    for one in claimed.configurations:
        for part, fact in zip(trained_parts(one.policy), weights_facts(one.policy), strict=True):
            file = part.weights_file
            if file is not None and not _learned_on_this(file, claimed):
                sure = "" if _is_sure(file, claimed) else "perhaps "
                found[f"Careful, {sure}trained on another model: {fact}"] = None
    yield from found


def _is_sure(file: WeightsFile, claimed: Claimed) -> bool:
    """Whether weights that seem to be those of another model are: a name alone may be that of any folder."""
    return file.model_digest is not None or claimed.settings.model is None or file.trained_on in _EMBEDDED


def _learned_on_this(file: WeightsFile, claimed: Claimed) -> bool:
    """Whether weights learned on the model of a comparison, by its digest or its name."""
    model = claimed.settings.model
    if file.model_digest is not None and file.model_digest == claimed.grid.context["model_digest"]:
        return True
    names = _EMBEDDED if model is None else (model, Path(model).name)
    return _plain(file.trained_on) in map(_plain, names)


def _plain(name: str) -> str:
    """Return a name without what folders often write otherwise, as in "whisper_base" for "whisper-base"."""
    return name.lower().replace("_", "-")
