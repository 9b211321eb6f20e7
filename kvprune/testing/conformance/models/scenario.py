"""A tiny model with a batch: what the untouched model computes for it, and runs of it under a policy.

Nothing here depends on a particular policy or adapter: both suites use it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import returned_cache
from kvprune.adapters.base import ModelAdapter
from kvprune.policy.base import CrossKVPolicy
from kvprune.session.answer_guide import AnswerGuide
from kvprune.session.compression import Compression
from kvprune.session.reconstruction import BoundReconstruction
from kvprune.session.registry import find_adapter
from kvprune.testing.conformance.common.results import NotApplicable
from kvprune.testing.conformance.models.forward_calls import forward
from kvprune.testing.conformance.models.sites import Site, attention_sites, cross_layers
from kvprune.testing.conformance.models.stock import seen_columns, shuffled_columns
from kvprune.testing.hooks import temporary
from kvprune.testing.oracle import masked_oracle
from kvprune.testing.oracle_steps import masked_steps
from kvprune.testing.problems import ModelProblem
from kvprune.testing.reference import slow_decode, visibility_of
from kvprune.tokens.selection import Selection
from kvprune.tokens.visibility import Visibility

__all__ = ["Generated", "Oracle", "Scenario", "difference"]

# `generate` returns logits in float32 for any dtype of the model; a rounding step of these is about 1e-6.
_TOLERANCE = {torch.float64: 2e-6, torch.float32: 1e-5}
_ANSWER = 3, 4, 5
"""Token ids, which every model has."""
_SHUFFLES, _OWN_ERRORS = 4, 8
"""Logits may differ by 8 times what the untouched model rounds differently by itself in 4 orders of its
columns (on a T5Gemma of six layers, pruned runs reached 3.7 times that)."""
_MOST = 16
"""But by no more than this many times the tolerance of the dtype, or a real difference could hide in it."""


Oracle = Callable[
    [Any, Mapping[int, Selection], Mapping[int, Selection | None]], AbstractContextManager[None]
]
"""Called as `masked_oracle` is: a model, ``run.selections``, ``run.prefill_selections``."""


@dataclass(frozen=True)
class Generated:
    """What a model generated, and the cache after it."""

    sequences: Tensor
    logits: Tensor  # [steps, B * beams, V]
    cache: Any


@dataclass(frozen=True)
class Scenario:
    """A model and a batch for it, and what the untouched model computes.

    Args:
        pristine: The model, which no check changes.
        inputs: The batch.
        beams: Number of beams; 1 is greedy search.
        steps: Number of new tokens.
        seed: Seed of the compression.
        adapter: The adapter to use; None for the installed one that supports the model.
        oracle: The master oracle, for families that `masked_oracle` does not support.
        reread: Whether the last prompt token is read again (``compress(..., reread=True)``).
    """

    pristine: Any
    inputs: dict[str, Tensor]
    beams: int = 1
    steps: int = 3
    seed: int = 0
    adapter: type[ModelAdapter] | None = None
    oracle: Oracle | None = None
    reread: bool = False

    @classmethod
    def of(cls, problem: ModelProblem) -> Scenario:
        """Build the model and the batch that a problem describes."""
        model, inputs = problem.make_model(), problem.make_inputs()
        return cls(model, inputs, problem.beams, problem.steps, problem.seed)

    @cached_property
    def model(self) -> Any:
        """A copy of the model, which a policy may damage."""
        return copy.deepcopy(self.pristine)

    @cached_property
    def adapter_class(self) -> type[ModelAdapter]:
        """The adapter. Finding it takes longer than a forward call of a tiny model, so it is found once."""
        return self.adapter or find_adapter(self.pristine)

    def compress(self, policy: CrossKVPolicy, model: Any = None) -> Compression:
        """Return a compression of the working copy, or of another model, as `kvprune.compress` does.

        A policy that reads the answer is guided by a fixed one, which all samples of a batch share: it must
        keep all promises for any answer. The text of a reconstruction is as short.
        """
        adapter = self.adapter_class(self.model if model is None else model)
        guide: AnswerGuide | BoundReconstruction | None = None
        if policy.reads_answer:
            guide = AnswerGuide(adapter, torch.tensor(_ANSWER))
        elif "reconstruction" in policy.needs:
            guide = BoundReconstruction(adapter, policy, len(_ANSWER))
        run = Compression(adapter, policy, self.seed, guide, reread=self.reread)
        run.record_replacements()
        return run

    def renew(self) -> None:
        """Discard the working copy; the next use makes a new one."""
        self.__dict__.pop("model", None)

    def batch(self) -> dict[str, Tensor]:
        """Return a copy of the inputs."""
        return {name: tensor.clone() for name, tensor in self.inputs.items()}

    def generate(self, model: Any, inputs: dict[str, Tensor] | None = None) -> Generated:
        """Generate greedily, or by beam search."""
        caches: list[Any] = []

        def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            caches[:] = [returned_cache(output)]  # `generate` does not return it for every family

        with temporary([model.register_forward_hook(note, with_kwargs=True)]):
            out = model.generate(
                **(inputs or self.batch()),
                max_new_tokens=self.steps,
                num_beams=self.beams,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return Generated(out["sequences"], torch.stack(list(out["logits"])), caches[0])

    def prefill(
        self, policy: CrossKVPolicy, inputs: dict[str, Tensor] | None = None
    ) -> tuple[Compression, Any]:
        """Run one forward call under the policy; return the compression and the cache."""
        with self.compress(policy) as run, torch.no_grad():
            cache = forward(self.model, inputs or self.batch())
        return run, cache

    def run(self, policy: CrossKVPolicy) -> tuple[Compression, Generated]:
        """Generate under a policy; equal policies run once, because several checks look at the same run."""
        if policy not in self._runs:
            with self.compress(policy) as run:
                run.record_steps()
                self._runs[policy] = run, self.generate(self.model)
        return self._runs[policy]

    @cached_property
    def _runs(self) -> dict[CrossKVPolicy, tuple[Compression, Generated]]:
        return {}

    @cached_property
    def stock(self) -> Generated:
        """What the untouched model generates."""
        return self.generate(self.pristine)

    @cached_property
    def stock_layers(self) -> dict[int, Any]:
        """The untouched model's cross-attention cache after prefill, by layer index."""
        with torch.no_grad():
            cache = forward(self.pristine, self.batch())
        return self.layers_of(cache)

    def reference_layers(self, run: Compression) -> dict[int, Any]:
        """Return the untouched model's cache layers after prefill, merged or replaced as in a run."""
        selected, received, fed = run.selections, run.prefill_selections, run.replacements
        parts = [part for part in (*selected.values(), *received.values()) if part is not None]
        if not fed and all(part.merge is None for part in parts):
            return self.stock_layers
        # Copies of a sample have equal selections: one of them is enough.
        copies = len(parts[0].indices) // self.batch_size
        once = (
            {layer: part and part.every(copies) for layer, part in parts.items()}
            for parts in (selected, received)
        )
        fed = {layer: replaced.every(copies) for layer, replaced in fed.items()}
        with torch.no_grad(), self._masked(*once, replacements=fed):
            return self.layers_of(forward(self.pristine, self.batch()))

    @cached_property
    def layer_indices(self) -> tuple[int, ...]:
        """The cross-attention layers that the adapter names."""
        return tuple(self.adapter_class(self.pristine).layer_indices)

    def layers_of(self, cache: Any) -> dict[int, Any]:
        """Return the cache layers of cross-attention, by layer index."""
        return cross_layers(self.layer_indices, cache)

    def sites(self, model: Any) -> Sequence[Site]:
        """Return the cross-attention modules of a model of this kind."""
        return attention_sites(self.adapter_class, model)

    @contextmanager
    def masked(self, run: Compression) -> Iterator[None]:
        """Let the untouched model attend to what a run kept, and in decode steps to what they read (KV13)."""
        kept = run.selections, run.prefill_selections, run.text_selections
        with self._masked(*kept, replacements=run.replacements):
            if not run.step_reads:
                assert not any(layer.steps for layer in run.report.steps), "call run.record_steps() before"
                yield
                return
            with masked_steps(self.sites(self.pristine), run.step_reads):
                yield

    def _masked(
        self, selections: Any, prefill_selections: Any, text_selections: Any = None, *, replacements: Any
    ) -> AbstractContextManager[None]:
        if self.oracle is not None:
            if text_selections or self.reread or replacements:
                what = "pruned text" if text_selections else "new tokens" if replacements else "re-reading"
                raise NotApplicable(f"the oracle of this adapter does not support {what}")
            return self.oracle(self.pristine, selections, prefill_selections)
        self.sites(self.pristine)  # raises NotApplicable for a family that the oracle does not support
        return masked_oracle(
            self.pristine,
            selections,
            prefill_selections,
            adapter=self.adapter_class,
            text_selections=text_selections,
            reread=self.reread,
            replacements=replacements,
        )

    @cached_property
    def columns(self) -> int:
        """Columns that the untouched model caches."""
        columns: int = next(iter(self.stock_layers.values())).keys.shape[-2]
        return columns

    @property
    def batch_size(self) -> int:
        """Number of samples in the batch, before beams."""
        return len(next(iter(self.stock_layers.values())).keys)

    @cached_property
    def visibility(self) -> Visibility:
        """What the text rows may attend, computed from the inputs alone."""
        if not self.pristine.config.is_encoder_decoder and "cross_attention_mask" not in self.inputs:
            raise NotApplicable("what text may attend to does not follow from these inputs")
        mask = self.inputs.get("attention_mask")
        if not self.pristine.config.is_encoder_decoder or mask is None or mask.shape[-1] == self.columns:
            return visibility_of(self.inputs, self.columns)
        # The encoder shortens its mask, in its own way, or ignores it.
        site = next(iter(self.sites(self.pristine)))
        seen = seen_columns(self.pristine, self.batch(), site, self.columns)
        return visibility_of({"attention_mask": seen.to(mask.dtype)}, self.columns)

    @property
    def tolerance(self) -> float:
        """How far numbers may differ that a model of this dtype computes in one order of operations."""
        return _TOLERANCE[self.dtype]

    @cached_property
    def logit_tolerance(self) -> float:
        """How far logits may differ that are computed in another order of operations.

        It is `tolerance`, or more for a model that rounds more: one with large logits, or with norms in
        float32. How much it rounds is measured on the untouched model, by reading its columns in other
        orders.
        """
        stock, columns = self.stock, self.columns  # before its columns are shuffled
        try:
            own = 0.0
            for seed in range(_SHUFFLES):
                with shuffled_columns(self.sites(self.pristine), columns, seed):
                    own = max(own, difference(self.generate(self.pristine), stock))
        except NotApplicable:  # nobody says where the model attends to encoder states
            own = 0.0
        return min(max(self.tolerance, _OWN_ERRORS * own), _MOST * self.tolerance)

    def are_close(self, apart: float) -> bool:
        """Whether logits that differ by ``apart`` are the same up to rounding."""
        return apart <= self.tolerance or apart <= self.logit_tolerance  # the second one takes generations

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's weights."""
        weight: Tensor = next(self.pristine.parameters())
        return weight.dtype

    @cached_property
    def all_visible(self) -> bool:
        """Whether decoding sees every column."""
        see = self.visibility
        return all(len(slow_decode(see, sample)) == see.columns for sample in range(see.batch))

    @cached_property
    def all_live(self) -> bool:
        """Whether no text comes before the first image."""
        if "cross_attention_mask" not in self.inputs:
            return True
        return bool((self.visibility.live | ~self.inputs["attention_mask"].bool()).all())


def difference(one: Generated, other: Generated) -> float:
    """Return the largest difference of logits; infinity if the numbers of steps differ."""
    if one.logits.shape != other.logits.shape:
        return float("inf")
    return float((one.logits - other.logits).abs().max())
