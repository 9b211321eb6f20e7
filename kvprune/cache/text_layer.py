"""The cache layer that holds kept keys and values of the text, and the positions that they were written for.

Kept keys were rotated for the positions of their tokens, so the next token must be told how many tokens there
were, not how many are held. Transformers asks a layer for both: `TextKVLayer.get_seq_length` returns what was
seen, `TextKVLayer.get_mask_sizes` what is held, and that it ends where the next token begins. To the mask,
held entries are the last tokens before the next one; what they really stand for, `slots` says.

All samples hold equally many entries; those that only pad come first, as padding does in text. Heads may hold
different tokens, but equally many: one mask serves all heads and all layers.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.selection import Selection

__all__ = ["TextKVLayer"]


class TextKVLayer(DynamicLayer):
    """Kept keys and values of one self-attention layer; what is decoded afterwards is appended.

    Attributes:
        keys, values: ``[B, Hkv, K, D]``.
        seen: Tokens seen so far, kept or not, padding included.
        slots: int64 ``[B, H or 1, chosen]``, the token that each of the first entries stands for; None as
            long as all are held.
        valid: bool ``[B, chosen]``, false for entries that only pad; None while ``slots`` is None.
        ragged: Whether some entry only pads, known without asking the device.
    """

    # Optional in the base class; here they are read only once they are filled.
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.ragged = False
        self._announced = False

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        """Return a cache layer that holds what an ordinary one holds."""
        adopted = cls()
        keys, values = layer.keys, layer.values
        if keys is not None and values is not None and keys.numel():
            adopted.lazy_initialization(keys, values)
            adopted.keys, adopted.values, adopted.seen = keys, values, keys.shape[-2]
        return adopted

    @property
    def held(self) -> int:
        """Entries held per row and KV head, K."""
        return self.keys.shape[-2] if self.seen else 0

    @property
    def chosen(self) -> int:
        """How many of them, from the first, were there when text was last pruned."""
        return 0 if self.slots is None else self.slots.shape[-1]

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values that are held."""
        return self.keys.nbytes + self.values.nbytes if self.seen else 0

    def tokens(self) -> Tensor:
        """Return the token that each entry stands for, int64 ``[B, H or 1, K]``."""
        appended = torch.arange(self.seen - self.held + self.chosen, self.seen, device=self.keys.device)
        if self.slots is None:
            return appended.expand(self.keys.shape[0], 1, -1)
        return torch.cat([self.slots, appended.expand(*self.slots.shape[:2], -1)], dim=-1)

    def is_real(self) -> Tensor:
        """Return which entries do more than pad a ragged selection, bool ``[B, K]``."""
        real = torch.ones(self.keys.shape[0], self.held, dtype=torch.bool, device=self.keys.device)
        if self.valid is not None:
            real[:, : self.chosen] = self.valid
        return real

    def retain(self, kept: Selection) -> None:
        """Drop the entries that are not kept, and free their memory.

        Args:
            kept: For each row of the batch, out of the first ``kept.columns`` entries; equally many for all
                heads. Entries beyond (draft tokens) stay.
        """
        counts = kept.valid.sum(-1)[:, :1]  # [B, 1]
        width = kept.indices.shape[-1]
        place = torch.arange(width, device=kept.indices.device) - (width - counts)  # below zero: padding
        chosen = kept.indices.gather(-1, place.clamp(min=0)[:, None].expand_as(kept.indices))
        chosen = chosen.to(self.keys.device)
        tokens = self.tokens()
        heads = max(chosen.shape[1], tokens.shape[1])
        slots = tokens.expand(-1, heads, -1).gather(-1, chosen.expand(-1, heads, -1))
        drafts = torch.arange(kept.columns, self.held, device=chosen.device)
        index = torch.cat([chosen, drafts.expand(*chosen.shape[:2], -1)], dim=-1)
        index = index.expand(-1, self.keys.shape[1], -1)[..., None]
        self.keys = self.keys.gather(-2, index.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(-2, index.expand(-1, -1, -1, self.values.shape[-1]))
        self.slots, self.valid = slots, (place >= 0).to(self.keys.device)
        self.ragged = not bool(self.valid.all())

    def announce(self) -> None:
        """Say that the mask of the coming forward call knows which entries are held."""
        self._announced = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens and return all that are held, as the base class does.

        Raises:
            UnsupportedCacheError: If text was pruned and nobody saw to the mask.
        """
        if self.slots is not None and not self._announced:
            raise UnsupportedCacheError(
                "this cache holds pruned text, but the model runs without kvprune, which sees to its "
                "mask; stay inside the `with kvprune.compress(...)` block, or start with a new cache"
            )
        self._announced = False
        self.seen += key_states.shape[-2]
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return both

    def get_seq_length(self) -> int:
        """Number of tokens seen: positions of new tokens and all bookkeeping of `generate` follow from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many entries there will be, and the token at which the mask takes them to begin."""
        return self.held + query_length, self.seen - self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, as assisted decoding does with drafts.

        Args:
            tokens_to_remove: Minus their number; a positive one is the number of tokens that stay.

        Raises:
            UnsupportedCacheError: If that reaches into text that was pruned.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if removed == 0 or not self.seen:
            return
        after = self.held - self.chosen
        if removed > after:
            raise UnsupportedCacheError(
                f"the last {removed} tokens cannot be taken back: only {after} of them came after text was "
                "pruned; crop no further, or use a policy that prunes no text"
            )
        self.keys, self.values = self.keys[..., :-removed, :], self.values[..., :-removed, :]
        self.seen -= removed

    def reset(self) -> None:
        """Forget everything that is held."""
        super().reset()
        self.is_initialized = False  # older releases keep the tensors, and fill them with zeros
        self.seen, self.slots, self.valid, self.ragged = 0, None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.seen:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
            self.batch_select_indices(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch."""
        if not self.seen:
            return
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys[indices, ...], self.values[indices, ...]
        if self.slots is not None and self.valid is not None:
            self.slots, self.valid = self.slots[indices, ...], self.valid[indices, ...]
