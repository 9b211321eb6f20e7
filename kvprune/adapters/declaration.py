"""What the adapter of a model family declares, and whether that is enough for a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from kvprune.adapters.probes import Probe
from kvprune.errors import IncompatibleTransformersError, UnsupportedModelError
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.nesting import parts
from kvprune.text import shown

__all__ = ["Declaration"]


class Declaration(ABC):
    """Class attributes and class methods of `kvprune.adapters.base.ModelAdapter`.

    Class attributes:
        family: Name of the family, for messages and tables.
        model_classes: Names of the supported transformers classes.
        provides: What the adapter can capture, by the names that policies use in `CrossKVPolicy.needs`.
        lacks: Why it cannot capture something, by the same names, as the end of a sentence.
        captured_in_encoder: What of it is captured while the encoder runs.
        rereads: Whether the adapter can read the last prompt token again (``compress(..., reread=True)``):
            it calls `prepare_reread` and `finish_prefill`, and defines `last_row`.
        asking: Options of ``generate`` that questions to a saved cache need (`kvprune.SavedCache.inputs`).
    """

    family: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    provides: ClassVar[frozenset[str]] = frozenset({"queries", "raw_keys", "features"})
    lacks: ClassVar[Mapping[str, str]] = {}
    captured_in_encoder: ClassVar[frozenset[str]] = frozenset({"class_attention"})
    rereads: ClassVar[bool] = False
    asking: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def matches(cls, model: object) -> bool:
        """Whether the adapter supports a model: an instance of `model_classes` or of a derived class."""
        return any(base.__name__ in cls.model_classes for base in type(model).__mro__)

    @classmethod
    @abstractmethod
    def probe(cls) -> list[Probe]:
        """Check that the installed transformers has what the adapter relies on; needs no model."""

    @classmethod
    def require_needs(cls, policy: CrossKVPolicy) -> None:
        """Raise if a policy needs something that this adapter does not provide.

        Raises:
            UnsupportedModelError: Names the policy, or the one among its options that has this need; the
                family, and what is missing.
        """
        lacking = policy.needs - cls.provides
        for part in reversed(list(parts(policy)) if lacking else ()):  # inner ones first: they need it
            if missing := part.needs & lacking:
                inside = "" if part is policy else f" in {shown(str(policy.spec))}"
                reasons = "".join(
                    f", because {cls.lacks[name]}" for name in sorted(missing & cls.lacks.keys())
                )
                raise UnsupportedModelError(
                    f"policy {part.name!r}{inside} needs {_listed(missing)}, which the {cls.family} adapter "
                    f"does not provide{reasons} (it provides {_listed(cls.provides) or 'nothing'}); "
                    "use another policy, or another model"
                )

    @classmethod
    def require_rereading(cls) -> None:
        """Raise if this adapter cannot read the last prompt token again.

        Raises:
            UnsupportedModelError: Names the adapter.
        """
        if not cls.rereads:
            raise UnsupportedModelError(
                f"reread=True reads the last prompt token again, which the adapter {cls.__name__} for "
                f"{cls.family} cannot do (its rereads is False); leave reread out"
            )

    def question(self, named: Mapping[str, Any]) -> Tensor:
        """Read the text of a prompt without its picture, in a pass that leaves no cache.

        Optional; without it, the family supports no policy that needs "question".

        Args:
            named: Arguments of a forward call by name, of which those about text are used.

        Returns:
            ``[B, W]``, the hidden state of each last token after the last layer and its norm.

        Raises:
            UnsupportedModelError: If the family has no such pass.
        """
        raise UnsupportedModelError(
            f"the adapter for {self.family} reads no text without a picture: it does not define question()"
        )

    @classmethod
    def require_probes(cls) -> None:
        """Raise if the installed transformers lacks something that the adapter relies on.

        Raises:
            IncompatibleTransformersError: Names each probe that failed.
        """
        try:
            failed = [probe for probe in cls.probe() if not probe.ok]
        except Exception as error:  # a third-party adapter whose probe itself breaks
            failed = [Probe("probe", False, f"raised {type(error).__name__}: {str(error)[:200]}")]
        if failed:
            details = "; ".join(f"{probe.name}: {probe.detail}" for probe in failed)
            raise IncompatibleTransformersError(
                f"the installed transformers lacks what the {cls.family} adapter relies on: {details}. "
                "Results could be wrong, so the model is refused; run `kvprune doctor` for details"
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
