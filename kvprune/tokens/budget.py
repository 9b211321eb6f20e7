"""How many tokens a policy keeps (`Budget`).

All arithmetic is exact: a tenth of ten tokens is one token on every platform.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvprune.errors import BudgetError

__all__ = ["Budget"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many visible tokens a policy keeps: a fraction of them or a fixed number.

    Args:
        keep_ratio: Fraction of visible tokens to keep, in (0, 1]. It is read as the decimal that was written:
            ``0.1`` is exactly one tenth, not the nearest binary number.
        keep_tokens: Number of tokens to keep, at least 1.

    Raises:
        BudgetError: If neither or both are given, or one is out of range.

    Example:
        >>> Budget(keep_ratio=0.1).resolve(10)
        1
        >>> Budget(keep_tokens=64).resolve(10)
        10
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.keep_tokens is None):
            raise BudgetError(
                "a budget is either keep_ratio or keep_tokens, "
                f"got keep_ratio={self.keep_ratio!r} and keep_tokens={self.keep_tokens!r}"
            )
        ratio, tokens = self.keep_ratio, self.keep_tokens
        if ratio is not None and (
            isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1
        ):
            raise BudgetError(
                f"keep_ratio is the fraction of visible tokens kept and lies in (0, 1], got {ratio!r}"
            )
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise BudgetError(f"keep_tokens is a whole number of tokens, at least 1, got {tokens!r}")

    def resolve(self, visible: int) -> int:
        """Return how many of ``visible`` tokens are kept.

        The product with the ratio is rounded up, so at least one visible token is kept (KV03).
        """
        if self.keep_tokens is not None:
            return min(self.keep_tokens, visible)
        assert self.keep_ratio is not None
        numerator, denominator = _as_written(self.keep_ratio)
        return -(-numerator * visible // denominator)

    def resolve_all(self, visible: Iterable[int]) -> list[int]:
        """Apply `resolve` to each number of visible tokens and return the results in order."""
        return [self.resolve(count) for count in visible]


def _as_written(ratio: float) -> tuple[int, int]:
    """Return numerator and denominator of a ratio as the decimal that was written.

    Whole numbers instead of a `Fraction`: torch.compile can trace them.

    Example:
        >>> _as_written(0.25)
        (25, 100)
    """
    digits, _, exponent = str(ratio).partition("e")
    whole, _, part = digits.partition(".")
    places = len(part) - int(exponent or 0)
    return int(whole + part) * 10 ** max(0, -places), 10 ** max(0, places)
