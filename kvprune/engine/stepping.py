"""Asks a `DecodePolicy` in each decode step, checks its answers without asking the device, and counts.

`Stepping.prepare` runs after a prefill has settled what a layer holds, `Stepping.attend` before the layer
attends in a decode step, and `Stepping.observe` with that step's attention. Nothing here waits for the device
in a step: what is wrong with the values of an answer is noted there, and raised by `Stepping.settle`, at the
latest when the block ends. On the CPU, where values are at hand, it is raised in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.host_memory import Courier
from kvprune.cache.step_memory import StepMemory
from kvprune.engine.foresight import foreseen, mask_has_changed, next_step, off_load, shown, unseen
from kvprune.engine.prefill import DecisionContext
from kvprune.engine.receipts import StepReceipt
from kvprune.engine.step_answers import StepAnswers
from kvprune.engine.step_calls import ask, held_view
from kvprune.engine.step_counts import Readable, StepCounts, StepRead, count_entries, recorded
from kvprune.errors import PolicyFailedError, UnsupportedCacheError
from kvprune.policy import step_checks as checks
from kvprune.policy.base import CrossKVPolicy
from kvprune.policy.decode import takes_steps
from kvprune.policy.held_weights import HeldWeights
from kvprune.policy.step_view import StepView
from kvprune.tokens.selection import Selection

__all__ = ["Stepping"]


class Stepping(StepAnswers):
    """Calls one policy in the decode steps of one model.

    Args:
        policy: The policy; only a `DecodePolicy` is ever called.
        layer_indices: The model's cross-attention layers in order.
        held: The weights of the policy.

    Attributes:
        recorder: If set, called with what each call of a layer read; for oracles.
    """

    def __init__(
        self, policy: CrossKVPolicy, layer_indices: Sequence[int], held: HeldWeights | None = None
    ) -> None:
        super().__init__(policy if takes_steps(policy) else None, layer_indices)
        self._held = held or HeldWeights()
        self._logs: dict[int, StepCounts] = {}
        self._before: tuple[StepReceipt, ...] = ()  # what `settle` returns until a prefill has ended
        self._in_prefill = False
        self._courier = Courier()
        self.recorder: Callable[[StepRead], None] | None = None

    @property
    def is_active(self) -> bool:
        """Whether the policy decides in decode steps."""
        return self._policy is not None

    @property
    def observes(self) -> bool:
        """Whether the policy wants to see the attention of each step."""
        return self._policy is not None and self._policy.observes

    def prepare(self, context: DecisionContext, *, cached: bool, warn: Callable[[str], None]) -> None:
        """Let the policy prepare for the steps of a layer, after its prefill decisions are applied.

        Args:
            context: The layer after its attention in prefill, and its cache layer, pruned.
            cached: Whether there is a cache.
            warn: Gets a warning for the user.

        Raises:
            UnsupportedCacheError: If there is none, so that no step would follow; or see `off_load`.
            PolicyFailedError: If the policy raises, or returns no state.
        """
        if self._policy is None:
            return
        policy, view, layer = self._policy, context.view, context.layer
        if not cached:
            raise UnsupportedCacheError(
                f"policy {policy.spec} decides in decode steps, but the model was called without a cache "
                "(use_cache=False, or gradient checkpointing), so no step would read one; call it with "
                "use_cache=True"
            )
        held = held_view(context)
        with torch.no_grad():
            state = ask(policy.name, held.where, lambda: policy.prepare(held))
        where = f"policy {policy.name!r} {held.where}: prepare"
        layer.steps = StepMemory(
            checks.check_state(state, len(held.keys), where),
            layer.place,
            copies=layer.copies,
            by_row=policy.observes,
            compiles=policy.compiles,
        )
        off_load(policy, layer, self._courier, warn)
        self._logs[view.rank] = StepCounts(layer)

    def view(
        self,
        rank: int,
        layer: CrossKVLayer,
        queries_of: Callable[[], Tensor],
        readable: Readable,
        *,
        batch: int,
        text_rows: int,
        scaling: float,
    ) -> StepView:
        """Return the view of a layer that is about to attend in a decode step.

        Args:
            rank: Index among the cross-attention layers.
            layer: Its cache layer.
            queries_of: Returns the queries of the layer, ``[B, Hq, T, D]``.
            readable: What the text rows may attend to.
            batch: Rows of the batch B.
            text_rows: Text rows T of the call.
            scaling: Factor on attention logits.

        Raises:
            UnsupportedCacheError: If the cache was not filled under this policy, or several tokens are read
                at once under a policy that observes steps.
        """
        policy, memory = self.policy, layer.steps
        if memory is None:
            raise UnsupportedCacheError(
                f"policy {policy.spec} decides in decode steps, but layer {self._layer_indices[rank]} of "
                "this cache was filled without it; start with an empty cache"
            )
        if text_rows > 1 and policy.observes:
            raise UnsupportedCacheError(
                f"policy {policy.spec} observes each decode step, but this call reads {text_rows} tokens at "
                "once (assisted decoding, or a later turn of text); give it one token at a time, or use a "
                "policy that observes no steps"
            )
        keys, values = shown(layer)
        copies = layer.copies * text_rows
        return StepView(
            queries_of=lambda: queries_of().transpose(1, 2).flatten(0, 1),  # [N, Hq, D]
            text_rows=batch * text_rows,
            keys=keys,
            values=values,
            slots_of=lambda: layer.entries()[0],
            readable_of=readable.flags,
            number_of=lambda: memory.taken,
            taken=-1 if policy.compiles else memory.taken_eagerly,
            layer_idx=self._layer_indices[rank],
            rank=rank,
            num_layers=len(self._layer_indices),
            scaling=scaling,
            policy_name=policy.name,
            copies=copies,
            unrestricted=readable.unrestricted,
            held=self._held,
            on=None if layer.host is None else layer.place,
        )

    def attend(
        self, layer: CrossKVLayer, step: StepView, readable: Readable, text_rows: int
    ) -> Selection | None:
        """Ask which entries a step reads; checked, and with places that are safe to read.

        Args:
            layer: The cache layer.
            step: The step.
            readable: What its text rows may attend to.
            text_rows: Text rows of the call for each row of the batch.

        Raises:
            SelectionError: If the answer breaks an invariant. What only its values show is noted, if they are
                not on the CPU, and raised later.
            PolicyFailedError: If the policy raises an error of its own.
        """
        log, memory = self._log(step.rank, layer), layer.steps
        assert memory is not None
        with torch.no_grad():
            answer = self._answer(layer, step, text_rows)
            read = held = readable.count(log.heads)
            if answer is not None:
                read = count_entries(answer.valid, log.heads, full=answer.is_known_full)
            log.count(read, held, step.text_rows, text_rows)
            memory.advance(text_rows)
            if self.recorder is not None:
                self.recorder(recorded(layer, step, answer, text_rows))
        return answer

    def _answer(self, layer: CrossKVLayer, step: StepView, text_rows: int) -> Selection | None:
        """Return which entries a step reads, as foreseen or as the policy says now."""
        staged = foreseen(layer, step, text_rows)
        if staged is None:
            return self._asked(layer, step, text_rows)
        if (changed := mask_has_changed(staged, step)) is not None:
            log = self._log(step.rank, layer)
            self._note(log, step.rank, log.flaws[0, checks.MOVED], changed)
        return staged.answer

    def _asked(self, layer: CrossKVLayer, step: StepView, text_rows: int) -> Selection | None:
        """Ask the policy which entries a step reads, and check the answer."""
        policy, memory, seen = self.policy, layer.steps, unseen(step, layer)
        assert memory is not None
        state = memory.of_text_rows(layer.copies, text_rows)
        answer = ask(policy.name, step.where, lambda: policy.attend(seen, state), seen)
        return None if answer is None else self._checked(answer, seen, self._log(step.rank, layer), 0)

    def foresee(self, layer: CrossKVLayer, step: StepView, text_rows: int) -> None:
        """After a step, choose what the next one reads, and begin to fetch it from host memory.

        Does nothing for layers that lie on the device. What reads everything is fetched in the step itself:
        otherwise the device would hold all layers at once.
        """
        if layer.host is None or layer.steps is None:
            return
        with torch.no_grad():
            answer = self._asked(layer, next_step(step, layer), 1) if text_rows == 1 else None
            if answer is not None:
                layer.stage(answer, layer.steps.taken_eagerly, None if step.unrestricted else step.readable)
        log = self._log(step.rank, layer)
        log.bytes_staged = max(log.bytes_staged, layer.host.bytes_staged)

    def observe(self, layer: CrossKVLayer, step: StepView, attention: Tensor) -> None:
        """Show the policy the attention of a step, keep its new state, and free what it drops.

        Args:
            layer: The cache layer.
            step: The step.
            attention: ``[N, Hq, K]``.

        Raises:
            SelectionError, PolicyFailedError: As in `attend`, and if the new state has other names or rows.
            UnsupportedCacheError: If the policy drops entries that are quantized.
        """
        policy, log, memory = self.policy, self._log(step.rank, layer), layer.steps
        assert memory is not None
        state = memory.of_text_rows(layer.copies, 1)
        where = f"policy {policy.name!r} {step.where}: observe"
        with torch.no_grad():
            answer = ask(policy.name, step.where, lambda: policy.observe(step, attention, state), step)
            if not isinstance(answer, tuple) or len(answer) != 2:
                raise PolicyFailedError(
                    f"{where} returned {type(answer).__name__}, expected a pair (state, kept or None)"
                )
            kept = None if answer[1] is None else self._checked(answer[1], step, log, 1)
            memory.store(checks.check_state(answer[0], step.text_rows, where, memory.tensors))
            if kept is not None:
                layer.evict(kept)
                log.measure(layer)

    def resume(self, rank: int, layer: CrossKVLayer) -> None:
        """Count the steps of a layer that an earlier run has filled, if the policy takes any."""
        if self._policy is not None:
            self._logs[rank] = StepCounts(layer)

    def _log(self, rank: int, layer: CrossKVLayer) -> StepCounts:
        """Return the counts of a layer; new ones if its cache was filled by an earlier run."""
        if rank not in self._logs:
            self.resume(rank, layer)
        return self._logs[rank]

    def settle(self) -> tuple[StepReceipt, ...]:
        """Read the counts from the device, and raise what was wrong with answers.

        Returns:
            One receipt for each layer since the latest prefill that has ended.

        Raises:
            SelectionError: If an answer broke an invariant.
        """
        if self._in_prefill:
            return self._before
        for rank, log in self._logs.items():
            self._raise(log, rank)
        return tuple(log.receipt(self._layer_indices[rank]) for rank, log in sorted(self._logs.items()))

    def reads_less(self) -> bool:
        """Whether steps so far have read less than all, or may free some of it later; waits for the device.

        Raises:
            SelectionError: As `settle` does.
        """
        return self.observes or any(step.entries_read < step.entries_held for step in self.settle())

    def restart(self) -> tuple[StepReceipt, ...]:
        """Forget the counts when a prefill begins, and return them; see `settle`."""
        self._before = self.settle()
        self._logs, self._in_prefill = {}, True
        return self._before

    def begin(self) -> None:
        """Count from now on: a prefill has ended. One that was broken off leaves the counts before it."""
        self._in_prefill = False

    def read(self, rank: int, layer: CrossKVLayer, answer: Selection) -> tuple[Tensor, Tensor]:
        """Return the entries that `attend` has answered, ``[B, Hkv, n, D]`` each, copied."""
        if layer.host is not None and (there := layer.host.take(answer)) is not None:
            return there
        known = None if torch.compiler.is_compiling() else self._log(rank, layer).checked
        if known is None or known.safe is not answer:
            return layer.read(answer.indices)
        if known.read_at is None or known.read_at[0] != layer.copies:
            known.read_at = layer.copies, layer.places(answer.indices)
        return layer.read(answer.indices, known.read_at[1])
