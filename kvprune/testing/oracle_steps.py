"""The part of the master oracle that masks per step, for policies that decide in decode steps.

`masked_steps` is used together with `kvprune.testing.masked_oracle`: what a step of the run did not read is
masked at the same step of the untouched model, whose cache keeps all columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import EncoderDecoderCache

from kvprune.adapters.arguments import cache_of, named_arguments
from kvprune.adapters.base import Site
from kvprune.engine.step_counts import StepRead
from kvprune.testing.hooks import temporary

__all__ = ["masked_steps"]


@contextmanager
def masked_steps(sites: Sequence[Site], reads: Sequence[StepRead]) -> Iterator[None]:
    """Run an untouched model so that each decode step attends only to the columns that a run's step read.

    Enter it after `masked_oracle`, if that is needed as well.

    Args:
        sites: The cross-attention modules of the model that is not compressed (`ModelAdapter.sites`).
        reads: What a run of the same calls has read, in order (`Compression.step_reads`).

    Raises:
        AssertionError: If the model takes more or fewer steps than the run has taken.
    """
    layers = [
        _MaskedSteps(site, [read for read in reads if read.layer_idx == site.layer_idx]) for site in sites
    ]
    with temporary(layer.hook() for layer in layers):
        yield
    left = {layer.layer_idx: len(layer.reads) for layer in layers if layer.reads}
    if left:
        raise AssertionError(f"the oracle took fewer steps than the run; steps left by layer: {left}")


class _MaskedSteps:
    """The hook of one cross-attention module.

    Args:
        site: The module.
        reads: What each call has read, in order.
    """

    def __init__(self, site: Site, reads: Sequence[StepRead]) -> None:
        self._site, self.layer_idx, self.reads = site, site.layer_idx, deque(reads)

    def hook(self) -> RemovableHandle:
        """Register the hook."""
        handle: RemovableHandle = self._site.module.register_forward_pre_hook(self._before, with_kwargs=True)
        return handle

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named, site = named_arguments(module, args, kwargs), self._site
        cache = cache_of(named)
        if isinstance(cache, EncoderDecoderCache):  # the states are given at each step
            prefill = not cache.is_updated.get(self.layer_idx)
        else:
            prefill = named.get(site.states) is not None
        if prefill:
            return None
        if not self.reads:
            raise AssertionError(f"the oracle takes more steps than the run at layer {self.layer_idx}")
        read = self.reads.popleft().columns.transpose(1, 2)  # [B, H or 1, T, S]
        if read.shape[1] > 1:
            read = read.repeat_interleave(site.heads // read.shape[1], dim=1)
        hidden, mask = named["hidden_states"], named.get(site.mask)
        if mask is None:
            mask = torch.zeros(len(read), 1, 1, 1, dtype=hidden.dtype, device=hidden.device)
        return (), {**named, site.mask: _narrowed(mask, read, site, hidden.shape[1])}


def _narrowed(mask: Tensor, read: Tensor, site: Site, rows: int) -> Tensor:
    """Return a mask that also hides what is not read, in a form that the module takes."""
    shape = torch.broadcast_shapes(mask.shape, read.shape)
    if mask.dtype == torch.bool:
        narrowed = mask.expand(shape) & read
    else:
        narrowed = mask.expand(shape).masked_fill(~read, torch.finfo(mask.dtype).min)
    return site.fit_mask(narrowed, rows)
