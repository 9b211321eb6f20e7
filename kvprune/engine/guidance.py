"""What passes between a model under a policy and its guide: the prompt goes there, the guidance comes back.

Plain data. `kvprune.session.guide` runs the guide; adapters make prompts and run models over them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.errors import GuideError

__all__ = ["Guidance", "GuideReceipt", "Prompt", "to_rows"]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A forward call that brings encoder states, in a form in which another model can repeat it.

    Axes: R rows of the batch that differ (beams of one sample are one row), S encoder tokens that arrive.

    Args:
        arguments: Tensors of the call by name, for R rows, without drafts of assisted decoding.
        states: ``[R, S, C]``, what the target's projections would receive; None if it has not run yet.
        past: A copy of the target's cache of earlier turns; None in a first turn.
    """

    arguments: dict[str, Tensor]
    states: Tensor | None = None
    past: Any = None

    @property
    def text(self) -> Tensor:
        """Token ids ``[R, T]``, or embeddings ``[R, T, C]``."""
        ids = self.arguments.get("input_ids")
        return self.arguments["inputs_embeds"] if ids is None else ids

    def to(self, device: torch.device, dtype: torch.dtype) -> Prompt:
        """Return the prompt on the device, and with the floating-point dtype, of the model that reads it."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        arguments = {name: move(tensor) for name, tensor in self.arguments.items()}
        return replace(self, arguments=arguments, states=None if self.states is None else move(self.states))


@dataclass(frozen=True, kw_only=True)
class GuideReceipt:
    """What a guide cost, over all of its runs.

    Args:
        model: Class of the guide.
        is_target: Whether the target guides itself.
        runs: Prompts that it was asked about.
        forward_calls: Its forward calls, generated tokens included.
        tokens: Text tokens that it read in them, without padding.
        seconds: What it took, on the device where it runs.
        bytes_peak: Most bytes of cross-attention keys and values that it held at once, beside the target's.
    """

    model: str
    is_target: bool
    runs: int = 0
    forward_calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_peak: int = 0

    def plus(self, other: GuideReceipt | None) -> GuideReceipt:
        """Return the receipt of both: sums, and the larger peak."""
        if other is None:
            return self
        return replace(
            self,
            runs=self.runs + other.runs,
            forward_calls=self.forward_calls + other.forward_calls,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            bytes_peak=max(self.bytes_peak, other.bytes_peak),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    def __str__(self) -> str:
        who = "itself, in a pass before" if self.is_target else self.model
        return (
            f"guided by {who}: {self.forward_calls} forward calls, {self.tokens} text tokens, "
            f"{self.seconds:.3g} s, at most {self.bytes_peak / 1024 / 1024:.2f} MiB of cross-attention cache"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance:
    """What a guide says about one prompt.

    Args:
        scores: ``[R, S]``, the importance of each encoder token.
        rows: int64 ``[R]``, the text rows whose attention was added up. Unless ``row_mean`` was set, scores
            of a sample sum to rows x heads x cross-attention layers.
        receipt: What it cost.
        answer: int64 ``[R, n]``, what the guide generated; None if it was not asked to.
        written: bool ``[R, n]``, which of these tokens belong to the answer: up to the first end of sequence.
        confidence: float64 ``[R]``, geometric mean of the guide's highest probability at each token.
        consistency: float64 ``[R]``, how probable the answer is to the guide when it sees few of the encoder
            tokens (`kvprune.guided_generate`); None if that was not asked.
    """

    scores: Tensor
    rows: Tensor
    receipt: GuideReceipt = field(default_factory=lambda: GuideReceipt(model="?", is_target=False))
    answer: Tensor | None = None
    written: Tensor | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None

    def of(self, samples: Tensor) -> Guidance:
        """Return what it says about some of the rows, int64 ``[R']``."""
        taken: dict[str, Any] = {
            name: value[samples.to(value.device)]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **taken)


def to_rows(guidance: Guidance, rows: int, copies: int, columns: int) -> Tensor:
    """Return scores for each row of a target, ``[rows, columns]``.

    Args:
        guidance: For these rows, or for a batch in which each of them stands several times.
        rows: Of the target that differ.
        copies: Rows of the batch for which each of them stands.
        columns: Encoder tokens that arrive at the target.

    Raises:
        GuideError: If it is about another number of columns or samples.
    """
    scores = guidance.scores
    have = len(scores)
    if scores.shape[1] != columns:
        raise GuideError(
            f"the guide ranked {scores.shape[1]} encoder tokens, but {columns} arrive at the target; "
            "both must see the same images in the same order, cut into the same tiles and patches"
        )
    alike, rest = divmod(have, rows)
    if alike and not rest and copies % alike == 0:
        return scores[::alike]
    raise GuideError(
        f"the guide ranked the tokens of {have} samples, but the target's batch has {rows * copies}"
        f"{f', {rows} of them different' if copies > 1 else ''}"
    )
