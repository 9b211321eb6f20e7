"""Checks what a `DecodePolicy` answers in a step, and notes or raises what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvprune.engine.step_counts import CheckedAnswer, StepCounts
from kvprune.errors import SelectionError
from kvprune.policy import step_checks as checks
from kvprune.policy.decode import DecodePolicy
from kvprune.policy.step_view import StepView
from kvprune.tokens.selection import Selection

__all__ = ["StepAnswers"]


class StepAnswers:
    """Checks the answers of one policy.

    Args:
        policy: The policy; None if it does not decide in decode steps.
        layer_indices: The model's cross-attention layers in order.
    """

    def __init__(self, policy: DecodePolicy | None, layer_indices: Sequence[int]) -> None:
        self._policy, self._layer_indices = policy, tuple(layer_indices)

    @property
    def policy(self) -> DecodePolicy:
        """The policy, if it decides in decode steps."""
        assert self._policy is not None
        return self._policy

    def _checked(self, answer: object, step: StepView, log: StepCounts, asked: int) -> Selection:
        """Check an answer of ``attend`` (0) or ``observe`` (1)."""
        where = f"policy {self.policy.name!r} {step.where}: {('attend', 'observe')[asked]}"
        selection = checks.check_places(answer, step, where)
        if step.has_made(selection):
            self._note(log, step.rank, log.flaws[asked, checks.UNDEFINED], step.has_undefined_scores())
            if step.has_limited(selection):
                self._note(log, step.rank, log.flaws[asked, checks.EMPTY], ~selection.valid[..., 0].all())
            return selection
        eager = not torch.compiler.is_compiling()
        if eager and log.checked is not None and log.checked.is_of(selection):
            if not step.unrestricted:  # the mask of this step may hide what that of another one has not
                hidden = checks.reads_hidden(log.checked.safe, step)
                self._note(log, step.rank, log.flaws[asked, checks.HIDDEN], hidden)
            return log.checked.safe
        places = selection.indices.clamp(0, step.entries - 1)
        if selection.is_known_full:
            safe = Selection.full(places, step.entries)
        else:
            safe = Selection.trusted(places, selection.valid, step.entries)
        found = checks.flaws(selection, step)
        self._note(log, step.rank, log.flaws[asked, : len(found)], found)
        if not eager:
            return safe
        if _at_hand(found) and selection.valid.all():
            safe = Selection.full(places, step.entries)
        log.checked = CheckedAnswer(selection, safe)
        return safe

    def _note(self, log: StepCounts, rank: int, flags: Tensor, found: Tensor) -> None:
        """Add flaws to those of a layer; raise at once if the values are at hand."""
        if torch.compiler.is_compiling() or not _at_hand(found):
            flags.logical_or_(found)
        elif found.any():
            flags.logical_or_(found)
            self._raise(log, rank)

    def _raise(self, log: StepCounts, rank: int) -> None:
        found = log.flaws.tolist()
        for asked, method in enumerate(("attend", "observe")):
            for flaw, text in zip(found[asked], checks.FLAWS, strict=True):
                if flaw:
                    log.flaws.zero_()
                    raise SelectionError(
                        f"policy {self.policy.name!r} in a decode step at layer "
                        f"{self._layer_indices[rank]}: {method}: {text}"
                    )


def _at_hand(tensor: Tensor) -> bool:
    """Whether reading the values of a tensor waits for no device."""
    return tensor.device.type == "cpu"
