"""What a contrast has cost: time and bytes of both branches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvprune.engine.measurement import Stopwatch
from kvprune.engine.report import CompressionReport

__all__ = ["BranchCost", "ContrastReport", "TextBytes", "bytes_of"]

_MIB = 1024 * 1024
_MOST_PENDING = 64
"""Measurements that wait to be read: reading one waits for the device, so the latest are left alone."""


class _Seconds:
    """Adds up measurements; reads each of them late, because that waits for the device."""

    def __init__(self) -> None:
        self._read = 0.0
        self._pending: list[Stopwatch] = []

    def add(self, watch: Stopwatch) -> None:
        self._pending.append(watch)
        if len(self._pending) > _MOST_PENDING:
            self._read += self._pending.pop(0).seconds

    @property
    def total(self) -> float:
        return self._read + sum(watch.seconds for watch in self._pending)


@dataclass
class BranchCost:
    """What the forward calls of one branch have cost.

    Attributes:
        bytes_cross: Bytes that its cross-attention cache holds, after the latest step.
        bytes_text: Bytes that its self-attention cache holds, after the latest step.
    """

    bytes_cross: int = 0
    bytes_text: int = 0
    _prefill: _Seconds = field(default_factory=_Seconds, repr=False)
    _decode: _Seconds = field(default_factory=_Seconds, repr=False)

    @property
    def prefill_seconds(self) -> float:
        """Seconds of the calls that read a prompt, over all of them.

        In the full branch, the encoder of a vision-language model is in them; that of an encoder-decoder
        model runs before.
        """
        return self._prefill.total

    @property
    def decode_seconds(self) -> float:
        """Seconds of all other calls."""
        return self._decode.total

    def add(self, watch: Stopwatch, *, is_prefill: bool) -> None:
        """Add the measurement of a call."""
        (self._prefill if is_prefill else self._decode).add(watch)

    def to_dict(self) -> dict[str, Any]:
        """Return the cost as data for JSON."""
        return {
            "bytes_cross": self.bytes_cross,
            "bytes_text": self.bytes_text,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }


@dataclass
class ContrastReport:
    """What one contrast has done so far.

    Attributes:
        combine: The rule, as a spec with all its options.
        against: What the second branch kept and held, a `CompressionReport`.
        full: Cost of the branch that reads everything.
        pruned: Cost of the second branch. It comes on top: contrast saves nothing.
        generations: Calls of ``generate``. (Whisper makes one for each window.)
        steps: Tokens for which both branches were asked, in each row.
        combine_seconds: Seconds of combining the two branches, over all steps.
        decided: What the rule decided at the first token of the latest ``generate``, ``[B, ...]``, such as
            whether the branches agree (`mod`); None if it decides nothing.
    """

    combine: str
    against: CompressionReport
    full: BranchCost = field(default_factory=BranchCost)
    pruned: BranchCost = field(default_factory=BranchCost)
    generations: int = 0
    steps: int = 0
    decided: Tensor | None = None
    _combining: _Seconds = field(default_factory=_Seconds, repr=False)

    @property
    def combine_seconds(self) -> float:
        """Seconds of combining the two branches, over all steps."""
        return self._combining.total

    @property
    def kept_fraction(self) -> float:
        """Fraction of the encoder's tokens that the second branch kept."""
        return self.against.kept_fraction

    @property
    def cost(self) -> float:
        """Time of a token with contrast / time of a token without; NaN before the second token.

        Forward calls and combining, in decoding. What ``generate`` does besides is in neither.
        """
        alone = self.full.decode_seconds
        both = alone + self.pruned.decode_seconds + self.combine_seconds
        return both / alone if alone else math.nan

    def add_combining(self, watch: Stopwatch) -> None:
        """Add the measurement of one combination."""
        self._combining.add(watch)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON."""
        return {
            "combine": self.combine,
            "against": self.against.to_dict(),
            "full": self.full.to_dict(),
            "pruned": self.pruned.to_dict(),
            "generations": self.generations,
            "steps": self.steps,
            "combine_seconds": self.combine_seconds,
            "cost": self.cost if self.cost == self.cost else None,
            "decided": None if self.decided is None else self.decided.tolist(),
        }

    def _read(self) -> str:
        read = self.against.read_of_visible  # NaN if the policy does not decide in decode steps
        return "" if read != read else f", and a decode step read {read:.1%}"

    def __str__(self) -> str:
        lines = [f"contrast against {self.against.policy}, combined by {self.combine}"]
        if not self.steps:
            return lines[0] + "\nno token was generated yet"
        lines += [
            f"the second branch kept {self.kept_fraction:.1%} of the encoder's tokens{self._read()}",
            f"{self.steps} steps in {self.generations} calls of generate; a token took {self.cost:.2f} times "
            "as long as without contrast",
            f"{'branch':<8} {'prefill s':>10} {'decode s':>10} {'cross MiB':>10} {'text MiB':>10}",
        ]
        for name, cost in (("full", self.full), ("pruned", self.pruned)):
            lines.append(
                f"{name:<8} {cost.prefill_seconds:>10.3f} {cost.decode_seconds:>10.3f} "
                f"{cost.bytes_cross / _MIB:>10.3f} {cost.bytes_text / _MIB:>10.3f}"
            )
        if self.decided is not None and self.decided.dtype.is_floating_point is False:
            agreed = self.decided.reshape(len(self.decided), -1).all(-1)
            lines.append(f"the branches agreed at first in {int(agreed.sum())} of {len(agreed)} rows")
        return "\n".join(lines)


def bytes_of(cache: Any, cross_layers: frozenset[int]) -> int:
    """Return the bytes that a cache holds of encoder tokens.

    Args:
        cache: An ``EncoderDecoderCache``, or a flat cache.
        cross_layers: Indices of the layers of a flat cache that hold encoder tokens.
    """
    cross = getattr(cache, "cross_attention_cache", None)
    if cross is not None:
        return sum(map(_bytes, cross.layers))
    return sum(_bytes(layer) for index, layer in enumerate(cache.layers) if index in cross_layers)


class TextBytes:
    """Counts the bytes that a cache holds of text; its layers are looked up once, because each token counts.

    Args:
        cross_layers: See `bytes_of`.
    """

    def __init__(self, cross_layers: frozenset[int]) -> None:
        self._cross = cross_layers
        self._cache: Any = None
        self._layers: Sequence[Any] = ()

    def of(self, cache: Any) -> int:
        """Return the bytes of a cache, after its first call."""
        if cache is not self._cache:
            own = getattr(cache, "self_attention_cache", None)
            found = cache.layers if own is None else own.layers
            skipped = self._cross if own is None else frozenset()
            self._layers = [layer for index, layer in enumerate(found) if index not in skipped]
            self._cache = cache
        return sum(map(_bytes, self._layers))


def _bytes(layer: Any) -> int:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return (0 if keys is None else keys.nbytes) + (0 if values is None else values.nbytes)
