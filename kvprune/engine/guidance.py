"""Data exchanged with a guide, the model that ranks encoder tokens for another one: prompt and guidance.

`kvprune.session.guide` runs the guide. Adapters make prompts and run models on them.
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
    """The inputs of a forward call that brings encoder states, so that another model can repeat the call.

    Axes: R distinct rows of the batch (beams of one sample are one row), S new encoder tokens, T text tokens,
    C width of features or embeddings.

    Args:
        arguments: Tensor arguments of the call by name, for R rows.
        states: ``[R, S, C]``, the target's encoder features; None if its encoder has not run yet.
        past: A copy of the target's cache of earlier turns; None in the first turn.
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
        """Return the prompt on a device, with floating-point tensors in a dtype."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        arguments = {name: move(tensor) for name, tensor in self.arguments.items()}
        return replace(self, arguments=arguments, states=None if self.states is None else move(self.states))


@dataclass(frozen=True, kw_only=True)
class GuideReceipt:
    """Cost of a guide over all of its runs.

    Args:
        model: Class name of the guide.
        is_target: Whether the target guides itself.
        runs: Number of prompts.
        forward_calls: Forward calls of the guide, including those that generate.
        tokens: Text tokens that the guide read, without padding.
        seconds: Run time on the guide's device.
        bytes_peak: Peak bytes of the guide's cross-attention keys and values, in addition to the target's.
        saw_answer: Whether the guide was given the answer that the target should find
            (`kvprune.answer_attention`). What it ranks highest is then a reference for methods.
    """

    model: str
    is_target: bool
    runs: int = 0
    forward_calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_peak: int = 0
    saw_answer: bool = False

    def plus(self, other: GuideReceipt | None) -> GuideReceipt:
        """Return the sum of two receipts, with the larger of both peaks."""
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
        known = ", which was given the answer" if self.saw_answer else ""
        return (
            f"guided by {who}{known}: {self.forward_calls} forward calls, {self.tokens} text tokens, "
            f"{self.seconds:.3g} s, at most {self.bytes_peak / 1024 / 1024:.2f} MiB of cross-attention cache"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance:
    """Result of a guide for one prompt.

    Axes: R distinct rows of the batch, S encoder tokens, n generated tokens.

    Args:
        scores: ``[R, S]``, the importance of each encoder token.
        rows: int64 ``[R]``, number of text rows whose attention was added up. The scores of a sample sum to
            rows x heads x cross-attention layers. With ``row_mean`` they sum to less, and if the guide was
            given the answer, to the number of layers.
        receipt: Cost of the guide.
        answer: int64 ``[R, n]``, tokens that the guide generated or was given; None if there are none.
        written: bool ``[R, n]``, true up to the first end of sequence; later tokens are padding.
        confidence: float64 ``[R]``, geometric mean of the guide's highest probability at each token.
        layers: For a reconstruction, ``[R, Hkv, S]`` of each cross-attention layer: the largest attention
            that each encoder token receives (`LayerView.reconstruction`). Empty otherwise.
        note: What a user should know about it, or "".
        consistency: float64 ``[R]``, probability of the answer when the guide sees only few encoder tokens
            (`kvprune.guided_generate`); None if it was not computed.
    """

    scores: Tensor
    rows: Tensor
    receipt: GuideReceipt = field(default_factory=lambda: GuideReceipt(model="?", is_target=False))
    answer: Tensor | None = None
    written: Tensor | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None
    layers: tuple[Tensor, ...] = ()
    note: str = ""

    def of(self, samples: Tensor) -> Guidance:
        """Return the guidance for some of the rows, int64 ``[R']``."""
        taken: dict[str, Any] = {
            name: value[samples.to(value.device)]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        layers = tuple(layer[samples.to(layer.device)] for layer in self.layers)
        return replace(self, **taken, layers=layers)


def to_rows(guidance: Guidance, rows: int, copies: int, columns: int) -> Guidance:
    """Return the guidance for each distinct row of a target: scores ``[rows, columns]``, and layers.

    Args:
        guidance: For these rows, or for a batch that repeats each of them several times.
        rows: Distinct rows R of the target's batch.
        copies: Consecutive rows of the batch that each of the R rows represents.
        columns: New encoder tokens of the target.

    Raises:
        GuideError: If the guide ranked another number of columns or samples.
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
        return replace(
            guidance, scores=scores[::alike], layers=tuple(layer[::alike] for layer in guidance.layers)
        )
    raise GuideError(
        f"the guide ranked the tokens of {have} samples, but the target's batch has {rows * copies}"
        f"{f', {rows} of them different' if copies > 1 else ''}"
    )
