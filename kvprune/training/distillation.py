"""Distillation: a policy learns to keep what the model says with all of its encoder tokens.

The model is frozen. The same model reads each prompt with its answer twice: with all tokens, and under the
policy. The loss compares what it predicts for the tokens of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.base import ModelAdapter, Site
from kvprune.errors import TrainingError
from kvprune.policy.base import Need
from kvprune.policy.held_weights import HeldWeights
from kvprune.policy.moments import FeaturePolicy
from kvprune.policy.trained import TrainedPolicy
from kvprune.policy.view import FeatureView
from kvprune.session.compression import Compression
from kvprune.tokens.decision import Decision
from kvprune.training.lessons import Everything, FullReading, Lesson
from kvprune.training.predictions import predictions

__all__ = ["Distillation", "Measures", "read_in_full"]


@dataclass(frozen=True)
class Measures:
    """What a lesson measures.

    Attributes:
        divergence: Mean over answer tokens of the Kullback-Leibler divergence KL(all tokens || policy).
        loss: What is minimised, with a gradient: the divergence, and the distance of attention outputs.
        right: bool ``[R]``, whether the policy's most probable tokens are the answer, all of them.
        right_full: bool ``[R]``, the same with all encoder tokens.
    """

    divergence: Tensor
    loss: Tensor
    right: Tensor
    right_full: Tensor


class Distillation:
    """A frozen model, a policy, and the weights that are trained.

    Args:
        adapter: Of the model, not attached; the model is frozen here.
        policy: The policy, whose ``choose`` may be differentiated with respect to its weights.
        weights: The tensors that are trained, by name.
        attention: Weight of the mean squared distance of cross-attention outputs, relative to their size.

    Raises:
        TrainingError: If the policy does not decide before the first layer.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        policy: TrainedPolicy,
        weights: Mapping[str, Tensor],
        *,
        attention: float = 0.0,
    ) -> None:
        if not isinstance(policy, FeaturePolicy):
            raise TrainingError(
                f"policy {policy.name!r} does not decide before the first cross-attention layer, so it "
                "cannot be "
                "trained by distillation here; kvprune train trains policies that return new tokens"
            )
        adapter.require_needs(policy)
        self.adapter, self.policy, self.attention = adapter, policy, attention
        self._learning = _Learning(policy=policy)
        self._held = HeldWeights({policy.name: weights})
        adapter.model.eval()
        adapter.model.requires_grad_(requires_grad=False)

    def measure(self, lesson: Lesson) -> Measures:
        """Read a lesson with all encoder tokens and under the policy.

        Raises:
            TrainingError: If the family predicts no answers.
            KVPruneError: Whatever the policy or the adapter raises.
        """
        prompt = lesson.prompt
        with torch.no_grad():
            question = self.adapter.question(prompt.arguments) if "question" in self.policy.needs else None
        full = lesson.full or read_in_full(self.adapter, lesson, outputs=bool(self.attention))
        object.__setattr__(self._learning, "lent", (self._held, question))
        sites = self.adapter.sites if self.attention else ()
        try:
            with Compression(self.adapter, self._learning, 0), _outputs(sites, lesson) as outputs:
                pruned = predictions(self.adapter, prompt, lesson.answer, lesson.written)  # [R, n, V]
        finally:
            object.__setattr__(self._learning, "lent", None)
        target, found = full.logits.float().log_softmax(-1), pruned.float().log_softmax(-1)
        written = lesson.written
        by_token = (target.exp() * (target - found)).sum(-1)  # [R, n]
        divergence = by_token[written].mean()
        loss = divergence
        for theirs, ours in zip(full.outputs if sites else (), outputs, strict=True):
            theirs, ours = theirs.float()[written], ours.float()[written]
            distance = (ours - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)
            loss = loss + self.attention / len(outputs) * distance
        right, right_full = (
            ((logits.argmax(-1) == lesson.answer) | ~written).all(-1) for logits in (found, target)
        )
        return Measures(divergence.detach(), loss, right, right_full)


def read_in_full(adapter: ModelAdapter, lesson: Lesson, *, outputs: bool) -> FullReading:
    """Read a lesson with all encoder tokens, without a gradient.

    Args:
        adapter: Of the model, not attached.
        lesson: The lesson.
        outputs: Whether to note what each cross-attention returns, too.

    Raises:
        TrainingError: If the family predicts no answers.
        KVPruneError: Whatever the adapter raises.
    """
    sites = adapter.sites if outputs else ()
    with torch.no_grad(), Compression(adapter, Everything(), 0), _outputs(sites, lesson) as found:
        logits = predictions(adapter, lesson.prompt, lesson.answer, lesson.written)  # [R, n, V]
    return FullReading(logits, tuple(found))


@contextmanager
def _outputs(sites: Sequence[Site], lesson: Lesson) -> Iterator[list[Tensor]]:
    """Collect what each cross-attention returns for the rows that predict the answer, ``[R, n, C]``."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found.append(states[:, -lesson.answer.shape[1] :])

    handles = [site.module.register_forward_hook(keep) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class _Learning(FeaturePolicy):
    """Runs a policy with the weights and the question of the current lesson, and with a gradient.

    The prompt that the model reads includes the answer. So the question is read beforehand, without it.
    """

    policy: FeaturePolicy

    name = "learning"
    lent = None

    @property
    def needs(self) -> frozenset[Need]:
        """What the policy needs, but the question."""
        return self.policy.needs - {"question"}

    def choose(self, view: FeatureView) -> Decision:
        """Let the policy choose."""
        assert self.lent is not None
        held, question = self.lent
        view = replace(view, held=held)
        if question is not None:
            view = view.capturing(question=question)
        with torch.enable_grad():
            return self.policy.choose(view)
