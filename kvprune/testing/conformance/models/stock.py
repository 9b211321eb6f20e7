"""What an untouched model shows of itself: which columns its masks let through, and how it rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvprune.adapters.arguments import named_arguments
from kvprune.adapters.base import Site
from kvprune.testing.conformance.common.results import NotApplicable
from kvprune.testing.conformance.models.forward_calls import forward
from kvprune.testing.hooks import temporary

__all__ = ["seen_columns", "shuffled_columns"]


def seen_columns(model: Any, inputs: dict[str, Tensor], site: Site, columns: int) -> Tensor:
    """Return which columns the last text row attends to in prefill, bool ``[B, S]``, by the model's own mask.

    Args:
        model: An untouched encoder-decoder model.
        inputs: Its batch.
        site: One of its cross-attention modules.
        columns: Number of encoder tokens S.

    Raises:
        NotApplicable: If its mask is not ``[B, heads or 1, T, S]``.
    """
    masks: list[Tensor | None] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(named_arguments(module, args, kwargs).get(site.mask))

    hooks = [site.module.register_forward_pre_hook(note, with_kwargs=True)]
    with temporary(hooks), torch.no_grad():
        forward(model, inputs)
    mask = masks[0] if masks else None
    if mask is None:
        return torch.ones(len(next(iter(inputs.values()))), columns, dtype=torch.bool)
    if mask.ndim != 4 or mask.shape[-1] != columns:
        raise NotApplicable(
            f"what text may attend to does not follow from a mask of shape {list(mask.shape)} for {columns} "
            "columns"
        )
    last = mask[:, :, -1].amax(1)  # [B, S]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


@contextmanager
def shuffled_columns(sites: Sequence[Site], columns: int, seed: int) -> Iterator[None]:
    """Let cross-attention read its columns and masks in another order, which changes nothing but rounding."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))

    def hook(site: Site) -> Any:
        def shuffle(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            named = dict(named_arguments(module, args, kwargs))
            states, mask = named.get(site.states), named.get(site.mask)
            if states is not None and states.shape[-2] == columns:
                named[site.states] = states[..., order, :]
            if mask is not None and mask.shape[-1] == columns:
                named[site.mask] = mask[..., order]
            return (), named

        return site.module.register_forward_pre_hook(shuffle, with_kwargs=True)

    with temporary(map(hook, sites)):
        yield
