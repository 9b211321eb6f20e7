"""What a policy kept and held for each example of a batch, in one prefill or window by window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvprune.comparison.execution.contrasted import Contrasted
from kvprune.comparison.execution.receipt_digests import receipt_of_windows, receipts
from kvprune.engine.kept import KeptSelections
from kvprune.errors import ResultsError
from kvprune.session.compression import Compression

__all__ = ["Held", "held_for_examples"]


@dataclass(frozen=True, slots=True)
class Held:
    """What was kept and held for one example.

    Attributes:
        kept_fraction: fraction of visible tokens kept for decoding; of a recording that was read window by
            window, the mean over its windows.
        bytes_held: bytes of the cross-attention cache of the batch, divided by its examples; of such a
            recording, that of the window in which it held most, since no two windows are held at once.
        bytes_full: bytes that stock transformers would hold, likewise.
        receipt: SHA-256 of what was kept; see `receipts` and `receipt_of_windows`.
        read_fraction: fraction of visible tokens that a decode step reads, mean over the examples of the
            batch; of a recording that was read window by window, mean over its windows. None if the policy
            does not decide in decode steps, or none were taken.
    """

    kept_fraction: float
    bytes_held: int
    bytes_full: int
    receipt: str
    read_fraction: float | None = None


def held_for_examples(
    run: Compression | Contrasted,
    kept: Sequence[KeptSelections],
    seed: int | None,
    examples: int,
    *,
    beside_full: bool = False,
) -> list[Held]:
    """Return what was kept and held for each example of a batch.

    Args:
        run: The compression under which the batch was answered.
        kept: What each prefill kept, in order.
        seed: Seed that the policy drew with; None if it drew nothing.
        examples: Number of examples in the batch.
        beside_full: Whether a full cache is held besides, as in a contrast, whose bytes count as well.

    Raises:
        ResultsError: If the report does not cover every example.
    """
    report, spec = run.report, str(run.report.policy)
    if len(report.windows) > 1 and len(report.windows) == len(kept):
        found = _by_window(run, kept, seed, examples)
        return [_beside_full(one) for one in found] if beside_full else found
    fractions = report.kept_per_sample
    _check(spec, fractions, examples)
    proofs = receipts(spec, seed, report.layers, run.selections)
    size = report.bytes_held // examples, report.bytes_full // examples
    read = _mean([report.read_of_visible])
    found = [Held(fraction, *size, proof, read) for fraction, proof in zip(fractions, proofs, strict=True)]
    return [_beside_full(one) for one in found] if beside_full else found


def _beside_full(one: Held) -> Held:
    return replace(one, bytes_held=one.bytes_held + one.bytes_full)


def _by_window(
    run: Compression | Contrasted, kept: Sequence[KeptSelections], seed: int | None, examples: int
) -> list[Held]:
    """Gather the windows of each recording, whose rows leave the batch when they have ended."""
    spec = str(run.report.policy)
    fractions: list[list[float]] = [[] for _ in range(examples)]
    sizes: list[list[tuple[int, int]]] = [[] for _ in range(examples)]
    proofs: list[list[tuple[int, str]]] = [[] for _ in range(examples)]
    reads: list[list[float]] = [[] for _ in range(examples)]
    for window, of_window in zip(run.report.windows, kept, strict=True):
        rows = len(window.rows)
        _check(spec, window.kept_per_sample, rows)
        found = receipts(spec, seed, window.layers, of_window.selections)
        for number, row in enumerate(window.rows):
            fractions[row].append(window.kept_per_sample[number])
            reads[row].append(window.read_of_visible)
            sizes[row].append((window.bytes_held // rows, window.bytes_full // rows))
            proofs[row].append((window.starts[number], found[number]))
    return [
        Held(sum(of_row) / len(of_row), *max(sizes[row]), receipt_of_windows(proofs[row]), _mean(reads[row]))
        for row, of_row in enumerate(fractions)
    ]


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of the values that are no NaN; None if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else None


def _check(spec: str, fractions: Sequence[float], examples: int) -> None:
    if len(fractions) != examples or any(math.isnan(fraction) for fraction in fractions):
        raise ResultsError(
            f"{spec} reports kept fractions {tuple(fractions)} for {examples} examples; each needs one"
        )
