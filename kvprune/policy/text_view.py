"""The view of one self-attention layer of the text, for policies that need "text" or prune the text cache.

Read-only by contract, as all views. No method builds a full ``[B, H, T, Tk]`` tensor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from kvprune.errors import ScoreError
from kvprune.scoring.attention import attention_logits, logit_chunks, softmax_
from kvprune.tokens.precision import accumulation_dtype

__all__ = ["TextView"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TextView:
    """One self-attention layer of the text, as it attended in prefill.

    Axes: B batch, T text rows of this call, Tk text entries (those of earlier turns come first, so Tk >=
    T), Hq and Hkv query and KV heads, D head width. Row t may attend the real entries up to entry Tk - T +
    t. Draft tokens are left out.

    Args:
        queries: ``[B, Hq, T, D]`` as they enter attention (rotated, in models with rotary embeddings).
        keys: ``[B, Hkv, Tk, D]`` as they are cached (rotated, likewise).
        values: ``[B, Hkv, Tk, D]``.
        real: bool ``[B, Tk]``, false for padding.
        scaling: Factor on attention logits.
        layer_idx: Index of the decoder layer in the model.
        rank: Index among the self-attention layers, 0 to num_layers - 1.
        num_layers: Number of self-attention layers.
        policy_name: For messages.
        image_tokens: int64 ``[B]``, number of new image tokens that decoding can see.
        cross_layers: Number of cross-attention layers.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor
    scaling: float
    layer_idx: int = 0
    rank: int = 0
    num_layers: int = 1
    policy_name: str = "?"
    image_tokens: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    cross_layers: int = 1

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        """Number of KV heads Hkv."""
        return self.keys.shape[1]

    @property
    def rows(self) -> int:
        """Number of text rows T of this call."""
        return self.queries.shape[2]

    @property
    def entries(self) -> int:
        """Number of text entries Tk."""
        return self.keys.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.keys.device

    @property
    def where(self) -> str:
        """The layer of the view, for messages."""
        return f"at the self-attention of layer {self.layer_idx}"

    @property
    def real_rows(self) -> Tensor:
        """Text rows that are not padding, bool ``[B, T]``."""
        return self.real[:, self.entries - self.rows :]

    @property
    def last_row(self) -> Tensor:
        """The last row that is not padding, int64 ``[B]``: the row that predicts the first new token."""
        return self.rows - 1 - self.real_rows.flip(1).to(torch.uint8).argmax(1)

    def attention_of(self, rows: Tensor) -> Tensor:
        """Return the attention weights of a few rows over all text entries.

        Args:
            rows: int64 ``[B, n]``, row numbers of each sample. Keep n small: the whole result is in memory at
                once.

        Returns:
            ``[B, Hq, n, Tk]``, float32 (float64 for float64 inputs). Zero at padding, at entries after the
            row, and everywhere for rows that are padding.

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.
        """
        batch, query_heads = self.queries.shape[:2]
        weights = torch.zeros(
            batch,
            query_heads,
            rows.shape[1],
            self.entries,
            dtype=accumulation_dtype(self.keys),
            device=self.device,
        )
        rows = rows.to(self.device)
        for sample in range(batch):
            counted = self.real_rows[sample, rows[sample]].nonzero().squeeze(1)  # rows without padding
            if len(counted):
                entries = self.real[sample].nonzero().squeeze(1)
                keys = self.keys[sample, :, entries]
                asked = rows[sample, counted]
                queries = rearrange(self.queries[sample][:, asked], "(h g) t d -> h g t d", h=self.heads)
                logits = attention_logits(queries, keys, self.scaling)  # [Hkv, Hq / Hkv, rows, entries]
                logits.masked_fill_(~self._sees(entries, asked), -torch.inf)
                index = counted[:, None].expand(-1, len(entries)), entries.expand(len(counted), -1)
                weights[sample][:, index[0], index[1]] = softmax_(logits).flatten(0, 1)
        return self._finite(weights)

    def attention_mass(self, rows: Tensor | None = None, *, null_keys: float = 0.0) -> Tensor:
        """Return the attention that each text entry receives, summed over rows, by query head.

        Args:
            rows: bool ``[B, T]``, rows to sum over; all by default. Rows that are padding never count.
            null_keys: Number of additional keys with logit zero in each row's softmax ("n-softmax").

        Returns:
            ``[B, Hq, Tk]``, float32 (float64 for float64 inputs). Without null keys, the sum over Tk is the
            number of rows that were summed.

        Raises:
            ScoreError: If attention is not finite: the model's activations are NaN or overflow.

        Cost: one product of queries and keys, 64 rows of a few KV heads at a time. Samples are taken one by
        one and without their padding, so no sum depends on the batch.
        """
        counted = self.real_rows if rows is None else self.real_rows & rows.to(self.real.device)
        batch, query_heads = self.queries.shape[:2]
        mass = torch.zeros(
            batch, query_heads, self.entries, dtype=accumulation_dtype(self.keys), device=self.device
        )
        for sample in range(batch):
            chosen = counted[sample].nonzero().squeeze(1)
            if len(chosen) == 0:
                continue
            entries = self.real[sample].nonzero().squeeze(1)  # [n]
            keys = self.keys[sample, :, entries]  # [Hkv, n, D]
            own = torch.zeros(query_heads, len(entries), dtype=mass.dtype, device=mass.device)
            sees = partial(self._sees, entries)
            for heads, logits, _ in logit_chunks(self.queries[sample], keys, chosen, self.scaling, sees):
                own[heads] += softmax_(logits, null_keys).sum(1)
            mass[sample, :, entries] = own
        return self._finite(mass)

    def _sees(self, entries: Tensor, rows: Tensor) -> Tensor:
        """Return which of the entries each row may attend to, bool ``[rows, entries]``."""
        return entries <= rows[:, None] + (self.entries - self.rows)

    def _finite(self, weights: Tensor) -> Tensor:
        if not bool(weights.isfinite().all()):
            raise ScoreError(
                f"policy {self.policy_name!r} {self.where}: attention is NaN or infinite for "
                f"{int((~weights.isfinite()).sum())} of {weights.numel()} numbers, so nothing can be ranked; "
                f"the model's queries or keys ({self.keys.dtype}) are not finite, or overflow"
            )
        return weights
