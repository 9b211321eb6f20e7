"""`DecodePolicy`: a policy that decides in each decode step which entries of the cache the step reads.

What the policy must know between steps is its *state*, a dict of tensors. The cache layer owns it, next to
keys and values. So it follows what transformers does to a cache: reorder for beams, expand, select, reset.
The policy itself holds options and nothing else, as every policy does.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

from torch import Tensor

from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.step_view import HeldView, State, StepView
from kvprune.policy.view import LayerView
from kvprune.tokens.decision import Decision
from kvprune.tokens.selection import Selection

__all__ = ["DecodePolicy", "takes_steps"]


@dataclass(frozen=True, kw_only=True)
class DecodePolicy(CrossKVPolicy):
    """Decides in each decode step which held entries each layer reads.

    ``prepare`` is called for each layer after each prefill, when what the layer holds is settled. In each
    decode step, ``attend`` is called before the layer's attention, and ``observe``, if the class overrides
    it, with that step's attention. Reading fewer entries makes a step cheaper and frees nothing; only what
    ``observe`` returns as its second value frees memory.

    All three are pure, as ``select`` is, and must not ask the device: no ``.item()``, ``.tolist()`` or
    ``bool(tensor)``. ``select`` is called at each layer in prefill and decides nothing unless overridden.

    Class attributes:
        compiles: Whether ``attend`` and ``observe`` can be traced into one graph. Decoding of models under
            another policy is not compiled by ``generate``.
        foresees: Whether ``attend`` needs neither queries, keys nor values: whether it knows what a step
            reads before the step begins, from the state alone. Only then may `offloads` be true.
    """

    moment: ClassVar[str] = "step"
    compiles: ClassVar[bool] = False
    foresees: ClassVar[bool] = False

    @property
    def takes_steps(self) -> bool:
        """Whether the policy decides in decode steps at all; a derived class may have an option for it."""
        return True

    @property
    def observes(self) -> bool:
        """Whether the policy wants to see the attention of each step: whether it overrides ``observe``."""
        return type(self).observe is not DecodePolicy.observe

    @property
    def offloads(self) -> bool:
        """Whether what a layer holds lies in host memory while it decodes (off-load with prefetch).

        Then ``attend`` is asked right after the step before, what it chooses is copied to the device while
        the model computes something else, and the device holds nothing more of the cache.
        """
        return False

    def select(self, view: LayerView) -> Decision:
        """Keep everything that decoding can see."""
        return Decision()

    @abstractmethod
    def prepare(self, view: HeldView) -> State:
        """Return what ``attend`` must know about one layer, tensors ``[R, ...]`` by name; may be empty.

        Args:
            view: What the layer holds.
        """

    @abstractmethod
    def attend(self, step: StepView, state: State) -> Selection | None:
        """Return which entries this step reads, ``[N, Hkv or 1, n]`` out of K; None reads all.

        Each text row reads at least one entry, and only entries that it may (`StepView.readable`).
        `StepView.best` makes a selection from scores.

        Args:
            step: The step.
            state: What is known about the layer, ``[N, ...]``, one row for each text row.
        """

    def observe(self, step: StepView, attention: Tensor, state: State) -> tuple[State, Selection | None]:
        """Return the state after a step, and which entries stay.

        Calls that read several tokens at once are refused if a policy overrides this: the state of a row
        would depend on rows before it in the same call.

        Args:
            step: As ``attend`` got it.
            attention: ``[N, Hq, K]`` in float32 (float64 for float64), what each entry received in this step;
                0 where the step did not read.
            state: As ``attend`` got it.

        Returns:
            The new state, ``[N, ...]`` under the same names; and the entries that stay, ``[N, Hkv or 1, n]``
            out of K, all others being freed. None frees nothing.
        """
        return state, None


def takes_steps(policy: object) -> TypeGuard[DecodePolicy]:
    """Whether this is a policy that decides in decode steps, with the options that it has."""
    return isinstance(policy, DecodePolicy) and policy.takes_steps
