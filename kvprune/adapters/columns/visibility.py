"""Who sees what in an encoder-decoder model: text rows attend to every column that is not padding.

Arguments of a call that do not fit each other are refused here, before any layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvprune.adapters.arguments import cache_of, tokens_of
from kvprune.adapters.prompts import padding_mask
from kvprune.errors import UnsupportedCacheError
from kvprune.text import shown
from kvprune.tokens.visibility import Visibility, with_last_row

__all__ = ["column_visibility", "require_inputs", "rows_of_text"]


def require_inputs(named: Mapping[str, Any]) -> None:
    """Raise unless the arguments of a decoder's call fit each other; call it before any layer runs.

    Only masks of floating point cost a device transfer: whoever passes one may have meant numbers that are
    added to logits, but transformers lets rows attend wherever a 2-D mask is not 0.

    Args:
        named: Arguments of the decoder by name: token ids ``[B, T]`` or their embeddings ``[B, T, C]``,
            encoder states ``[B, S, C]``, masks ``[B, T]`` and ``[B, S]`` with 0 at padding, and a cache.

    Raises:
        UnsupportedCacheError: Says what was given, and what would be right.
    """
    states, cache = named["encoder_hidden_states"], cache_of(named)
    tokens = tokens_of(named)
    if tokens is None:
        raise UnsupportedCacheError("the decoder got encoder states, but neither input_ids nor inputs_embeds")
    if not isinstance(states, Tensor) or states.ndim != 3:
        found = f"{list(states.shape)}" if isinstance(states, Tensor) else f"a {type(states).__name__}"
        raise UnsupportedCacheError(f"encoder states must be a tensor [B, S, C], got {found}")
    if not states.shape[1]:
        raise UnsupportedCacheError(
            f"the encoder states {list(states.shape)} have no columns, so there is nothing to attend to"
        )
    if len(tokens) != len(states):
        raise UnsupportedCacheError(
            f"the text and the encoder states of a call must have the same batch, got {len(tokens)} texts "
            f"and encoder states of {len(states)}; repeat the states for each text"
        )
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedCacheError(
            f"the cache of an encoder-decoder model must be an EncoderDecoderCache of transformers, got "
            f"{shown(cache, 80)}; leave it out, and transformers makes one"
        )
    for whose, name in (("encoder", "encoder_attention_mask"), ("decoder", "attention_mask")):
        mask = named.get(name)
        is_known = hasattr(mask, "shape") or (whose == "decoder" and isinstance(mask, Mapping))
        if mask is not None and not is_known:
            raise UnsupportedCacheError(
                f"the attention mask of the {whose} must be a tensor [B, N], got a {type(mask).__name__}"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.is_floating_point():
            other = mask[(mask != 0) & (mask != 1)]
            if len(other):
                raise UnsupportedCacheError(
                    f"the attention mask [B, N] of the {whose} must be 1 where rows may attend and 0 at "
                    f"padding, got {float(other[0]):.3g}; transformers would take every number but 0 for 1, "
                    "so a mask that is meant to be added to logits would be reversed"
                )


def rows_of_text(mask: object, rows: int) -> Tensor | None:
    """Return which text rows of a first turn are no padding, ``[B, T]``, 0 at padding.

    Args:
        mask: The decoder's attention mask, as `padding_mask` takes it.
        rows: Number of text rows T.

    Returns:
        None if the mask says nothing about padding.
    """
    if isinstance(mask, Tensor | Mapping):
        padding = padding_mask(mask, rows)
        if padding is not None and padding.ndim == 2:
            return padding[:, -rows:]
    return None


def column_visibility(
    tokens: Tensor,
    states: Tensor,
    encoder_mask: Tensor | None,
    decoder_mask: Tensor | None,
    copies: int,
) -> Visibility:
    """Return which columns the text rows may attend: all but padding, the same for all rows.

    Args:
        tokens: ``[B, T]`` token ids, or ``[B, T, C]`` their embeddings.
        states: ``[B, S, C]``, output of the encoder.
        encoder_mask: ``[B, S]``, 0 at padding of the encoder; None if there is none.
        decoder_mask: ``[B, T]``, 0 at padding of the text; None if that is unknown.
        copies: How many rows of the batch each sample has (beams).

    Raises:
        UnsupportedCacheError: If the encoder's mask has another shape.
    """
    batch, columns = states.shape[:2]
    # Unit 0 has the real columns, unit 1 the padding.
    if encoder_mask is None:
        units = torch.zeros(1, columns, dtype=torch.int64, device=states.device)
    elif encoder_mask.shape == (batch, columns):
        units = (encoder_mask == 0).to(states.device, torch.int64)
        # A sample that is nothing but padding keeps its first column, because a row must attend to one.
        units[:, 0] *= (units == 0).any(-1)
    else:
        raise UnsupportedCacheError(
            f"the encoder's attention mask must be [B, S] = [{batch}, {columns}], "
            f"got {list(encoder_mask.shape)}; it says of each column whether it is padding (0)"
        )
    live = torch.ones(batch, tokens.shape[1], dtype=torch.bool, device=states.device)
    if decoder_mask is not None:
        live = with_last_row(decoder_mask.to(live.device).bool(), live)
    rows = torch.tensor([True, False], device=states.device).expand(batch // copies, 1, 2)
    return Visibility(
        rows=rows,
        units=units if encoder_mask is None else units[::copies],
        images=torch.zeros(2, dtype=torch.int64, device=states.device),
        live=live[::copies],
    )
