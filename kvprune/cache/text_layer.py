"""The cache layer that holds the kept keys and values of the text, and which tokens they belong to.

Cached keys were rotated for the positions of their tokens, so the position of the next token is the number of
tokens seen, not of entries held. Transformers asks a layer for both numbers: `TextKVLayer.get_seq_length`
returns the tokens seen, `TextKVLayer.get_mask_sizes` the entries held. In the mask, held entries count as the
last tokens before the next one; `slots` has their true tokens.

All samples hold the same number of entries, with padding first, as in padded text. Heads may hold different
tokens, but the same number: one mask serves all heads and all layers.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvprune.cache.reader import Reader
from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.selection import Selection

__all__ = ["TextKVLayer"]


class TextKVLayer(DynamicLayer):
    """Kept keys and values of one self-attention layer; later tokens are appended.

    Attributes:
        keys, values: ``[B, Hkv, K, D]``.
        seen: Tokens seen so far, kept or dropped, padding included.
        slots: int64 ``[B, H or 1, kept_width]``, the token of each entry that the latest pruning kept; these
            entries come first. None while nothing was pruned.
        valid: bool ``[B, kept_width]``, false at padding of a ragged selection; None while ``slots`` is None.
        ragged: Whether some entries are padding; known on the host, without a device transfer.
    """

    # Optional in the base class; here they are read only after they are filled.
    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.ragged = False
        self._announced: Reader | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> Self:
        """Return a layer with the keys and values of a layer of transformers."""
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
    def kept_width(self) -> int:
        """Number of entries that the latest pruning kept; entries after them were appended later."""
        return 0 if self.slots is None else self.slots.shape[-1]

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values that are held."""
        return self.keys.nbytes + self.values.nbytes if self.seen else 0

    def tokens(self) -> Tensor:
        """Return the token of each entry, int64 ``[B, H or 1, K]``."""
        appended = torch.arange(self.seen - self.held + self.kept_width, self.seen, device=self.keys.device)
        if self.slots is None:
            return appended.expand(self.keys.shape[0], 1, -1)
        return torch.cat([self.slots, appended.expand(*self.slots.shape[:2], -1)], dim=-1)

    def is_real(self) -> Tensor:
        """Return which entries are not padding of a ragged selection, bool ``[B, K]``."""
        real = torch.ones(self.keys.shape[0], self.held, dtype=torch.bool, device=self.keys.device)
        if self.valid is not None:
            real[:, : self.kept_width] = self.valid
        return real

    def retain(self, kept: Selection) -> None:
        """Drop the entries that are not kept, and free their memory.

        Args:
            kept: For each row of the batch, which of the first ``kept.columns`` entries are kept; the same
                number for all heads. Entries after these (draft tokens) are kept.
        """
        counts = kept.valid.sum(-1)[:, :1]  # [B, 1]
        width = kept.indices.shape[-1]
        place = torch.arange(width, device=kept.indices.device) - (width - counts)  # < 0: padding
        chosen = kept.indices.gather(-1, place.clamp(min=0)[:, None].expand_as(kept.indices))  # [B, H, width]
        chosen = chosen.to(self.keys.device)
        tokens = self.tokens()
        heads = max(chosen.shape[1], tokens.shape[1])
        slots = tokens.expand(-1, heads, -1).gather(-1, chosen.expand(-1, heads, -1))
        drafts = torch.arange(kept.columns, self.held, device=chosen.device)
        index = torch.cat([chosen, drafts.expand(*chosen.shape[:2], -1)], dim=-1)
        index = index.expand(-1, self.keys.shape[1], -1)[..., None]  # [B, Hkv, K, 1]
        self.keys = self.keys.gather(-2, index.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(-2, index.expand(-1, -1, -1, self.values.shape[-1]))
        self.slots, self.valid = slots, (place >= 0).to(self.keys.device)
        self.ragged = not bool(self.valid.all())

    def announce(self, reader: Reader) -> None:
        """Note that a reader has fitted the mask of the next call to the held entries (`fit_text_mask`)."""
        self._announced = reader

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, and return all that are held, as the base class does.

        Raises:
            UnsupportedCacheError: If text was pruned, but the mask was not fitted to it (see `announce`).
        """
        if self.slots is not None and not (self._announced and self._announced.is_attached):
            raise UnsupportedCacheError(
                "this cache holds pruned text, but the model runs without kvprune, which must fit the "
                "mask; stay inside the `with kvprune.compress(...)` block, or start with a new cache"
            )
        self._announced = None
        self.seen += key_states.shape[-2]
        both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return both

    def get_seq_length(self) -> int:
        """Number of tokens seen, from which transformers derives the positions of new tokens."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of entries after the next update, and the token that the mask starts at."""
        return self.held + query_length, self.seen - self.held

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as assisted decoding does with rejected drafts.

        Args:
            tokens_to_remove: Minus the number of tokens to remove; a positive value is the number to keep.

        Raises:
            UnsupportedCacheError: If tokens from before the latest pruning would be removed.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if removed == 0 or not self.seen:
            return
        after = self.held - self.kept_width
        if removed > after:
            raise UnsupportedCacheError(
                f"the last {removed} tokens cannot be removed: only {after} of them came after text was "
                "pruned; crop no further, or use a policy that prunes no text"
            )
        self.keys, self.values = self.keys[..., :-removed, :], self.values[..., :-removed, :]
        self.seen -= removed

    def remove_last(self) -> None:
        """Remove the last token, although pruning has kept it, so that it can be read again.

        It is the last entry of each row and head, because a policy keeps the last row's own entry (KV03), and
        padding comes first.
        """
        self.keys, self.values = self.keys[..., :-1, :], self.values[..., :-1, :]
        if self.slots is not None and self.valid is not None and self.kept_width > self.held:
            self.slots, self.valid = self.slots[..., :-1], self.valid[:, :-1]
        self.seen -= 1

    def reset(self) -> None:
        """Forget everything that is held."""
        super().reset()
        self.is_initialized = False  # older releases keep the tensors and zero them
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
