"""Who sees what in an encoder-decoder model: text rows attend to every column that is not padding."""

from __future__ import annotations

import torch
from torch import Tensor

from kvprune.errors import UnsupportedCacheError
from kvprune.tokens.visibility import Visibility, with_last_row

__all__ = ["column_visibility"]


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
        decoder_mask: ``[B, T]``, 0 at padding of the text; other shapes say nothing about padding.
        copies: How many rows of the batch each sample has (beams).

    Raises:
        UnsupportedCacheError: If the encoder's mask has another shape.
    """
    batch, columns = states.shape[:2]
    # Unit 0 has the real columns, unit 1 the padding.
    if encoder_mask is None:
        units = torch.zeros(1, columns, dtype=torch.int64, device=states.device)
    elif encoder_mask.shape == (batch, columns):
        units = (encoder_mask == 0).to(torch.int64)
        # A sample that is nothing but padding keeps its first column, because a row must attend to one.
        units[:, 0] *= (units == 0).any(-1)
    else:
        raise UnsupportedCacheError(
            f"the encoder's attention mask must be [B, S] = [{batch}, {columns}], "
            f"got {list(encoder_mask.shape)}"
        )
    live = torch.ones(batch, tokens.shape[1], dtype=torch.bool, device=states.device)
    if decoder_mask is not None and decoder_mask.ndim == 2:
        live = with_last_row(decoder_mask[:, : live.shape[1]].to(live.device).bool(), live)
    rows = torch.tensor([True, False], device=states.device).expand(batch // copies, 1, 2)
    return Visibility(
        rows=rows,
        units=units if encoder_mask is None else units[::copies],
        images=torch.zeros(2, dtype=torch.int64, device=states.device),
        live=live[::copies],
    )
