"""What a policy may look at: one cross-attention layer, right after its attention in prefill.

Views are read-only by contract: a policy neither writes to their tensors nor keeps references to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvprune import scoring, seeding
from kvprune.errors import PolicyOptionError, ScoreError
from kvprune.visibility import Visibility

__all__ = ["LayerView"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerView:
    """One cross-attention layer after its attention in prefill.

    Axes: B batch as the model saw it, T text rows, S encoder tokens that reached this layer, Hq and Hkv
    query and KV heads, D head width. When a second image arrives, S counts its columns only.

    Args:
        keys: ``[B, Hkv, S, D]`` as they are cached (in Mllama: after ``k_norm``).
        values: ``[B, Hkv, S, D]``.
        visibility: What text rows may attend; see the properties below for the questions usually asked.
        layer_idx: Index of the decoder layer in the model (3, 8, 13, ... in Llama-3.2-11B-Vision).
        rank: Index among the cross-attention layers, 0 to ``num_layers`` - 1.
        num_layers: Number of cross-attention layers L.
        scaling: Factor on attention logits.
        seed: The seed that was given to ``compress``.
        fingerprints: Returns an int64 ``[B]`` digest of what the encoder read for each sample.
        policy_name: For messages.
        captured_queries: ``[B, Hq, T, D]``, present if the policy needs "queries".
        captured_raw_keys: ``[B, Hkv, S, D]`` before any key norm, present if the policy needs "raw_keys".
    """

    keys: Tensor
    values: Tensor
    visibility: Visibility
    layer_idx: int
    rank: int
    num_layers: int
    scaling: float
    seed: int = 0
    fingerprints: Callable[[], Tensor] = lambda: torch.zeros(1, dtype=torch.int64)
    policy_name: str = "?"
    captured_queries: Tensor | None = None
    captured_raw_keys: Tensor | None = None

    @property
    def visible(self) -> Tensor:
        """Columns that decoding can see, bool ``[B, S]``: budgets count these."""
        return self.visibility.decode

    @property
    def visible_in_prefill(self) -> Tensor:
        """Columns that some live text row can see, bool ``[B, S]``."""
        return self.visibility.prefill

    @property
    def live(self) -> Tensor:
        """Text rows that are no padding, no draft, and see an image, bool ``[B, T]``."""
        return self.visibility.live

    @property
    def groups(self) -> Tensor:
        """Visibility group of each column, int64 ``[B, S]``, -1 where unseen: each keeps one column."""
        return self.visibility.groups

    @property
    def strata(self) -> Tensor:
        """Sets over which a budget is counted, int64 ``[B, S]``: 0 what decoding sees, -1 unseen."""
        return self.visibility.strata

    @property
    def queries(self) -> Tensor:
        """Queries of this layer as they entered attention, ``[B, Hq, T, D]``."""
        return self._captured(self.captured_queries, "queries")

    @property
    def raw_keys(self) -> Tensor:
        """Keys before the key norm, ``[B, Hkv, S, D]``; the cached keys in models without one."""
        return self._captured(self.captured_raw_keys, "raw_keys")

    def attention_mass(self, rows: Tensor | None = None) -> Tensor:
        """Attention that each column receives, summed over live rows, ``[B, Hq, S]`` in float32.

        Args:
            rows: bool ``[B, T]``, to add up only these of the live rows.

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.
        """
        mass = scoring.attention_mass(self.queries, self.keys, self.visibility, self.scaling, rows)
        if not bool(mass.isfinite().all()):
            raise ScoreError(
                f"policy {self.policy_name!r} at layer {self.layer_idx}: attention is NaN or infinite for "
                f"{int((~mass.isfinite()).sum())} of {mass.numel()} pairs of head and token, so nothing can "
                f"be ranked; the model's queries or keys ({self.keys.dtype}) are not finite, or overflow"
            )
        return mass

    def random(self, heads: int = 1) -> Tensor:
        """Uniform numbers in [0, 1), float32 ``[B, heads, S]``.

        They differ by seed, layer and sample, and are the same on any device and in any batch (KV10).
        """
        batch, _, columns, _ = self.keys.shape
        fingerprints = self.fingerprints().expand(batch)
        return seeding.uniform(self.seed, self.rank, fingerprints, heads, columns).to(self.keys.device)

    @cached_property
    def generator(self) -> torch.Generator:
        """CPU generator for this seed and layer.

        What is drawn from it must not have a batch axis, or a sample's draw depends on its place in the
        batch; `random` draws for each sample on its own.
        """
        return seeding.generator(self.seed, self.rank)

    def _captured(self, tensor: Tensor | None, what: str) -> Tensor:
        if tensor is None:
            raise PolicyOptionError(
                f"policy {self.policy_name!r} reads view.{what} at layer {self.layer_idx} without declaring "
                f'it; add a property `needs` that returns frozenset({{"{what}"}})'
            )
        return tensor
