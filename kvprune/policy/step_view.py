"""Views of policies that decide in each decode step: what a layer holds after prefill, and one step.

A view shows a layer's *entries*: what its cache holds, in the order in which it holds them. Entries are named
by their place, 0 to K - 1. `slots` says from which column of the unpruned cache each of them came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvprune.policy.held_weights import HeldWeights
from kvprune.policy.view import LayerView
from kvprune.policy.weights import HasWeights
from kvprune.tokens.packing import repeat_rows
from kvprune.tokens.precision import accumulation_dtype
from kvprune.tokens.reindexing import among_received
from kvprune.tokens.selection import Selection

__all__ = ["HeldView", "State", "StepView", "in_order", "packed"]

State = Mapping[str, Tensor]
"""What a policy knows about one layer between steps: tensors by name, whose first axis is rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldView:
    """What one cross-attention layer holds after a prefill, for `DecodePolicy.prepare`.

    Axes: R rows that are held (copies of a sample, such as its beams, are one row), Hq and Hkv query and KV
    heads, K entries, D head width.

    Args:
        layer: The layer right after its attention in this prefill: the columns that arrived, and all that
            was captured for them.
        keys: ``[R, Hkv, K, D]``, all entries, those of earlier images included.
        values: ``[R, Hkv, K, D]``.
        slots: int64 ``[R, H or 1, K]``, the column of each entry.
        valid: bool, same shape; false at padding of a ragged batch.
        columns: Number of columns so far, those of earlier images included.
        earlier: What the policy knew before this prefill; None after the first one.
        received: The columns of this prefill that reached the layer; None for all of them.
    """

    layer: LayerView
    keys: Tensor
    values: Tensor
    slots: Tensor
    valid: Tensor
    columns: int
    earlier: State | None = None
    received: Selection | None = None

    @property
    def entries(self) -> int:
        """Number of entries K."""
        return self.keys.shape[-2]

    @property
    def arrived(self) -> Tensor:
        """The column of `layer` that each entry came from, int64 ``[R, H or 1, K]``; -1 for earlier images.

        Read with it what `layer` knows about its columns. It equals `slots` only for a first image all of
        whose columns reached the layer: the first policy of a pair may have dropped some.
        """
        new = self.layer.columns if self.received is None else self.received.columns
        return among_received(self.slots, self.received, self.columns - new)

    @property
    def where(self) -> str:
        """The moment and layer of the view, for messages."""
        return f"after prefill {self.layer.where}"

    def weights(self, policy: HasWeights) -> Mapping[str, Tensor]:
        """Return the trained weights of a policy; see `View.weights`."""
        return self.layer.weights(policy)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepView:
    """One cross-attention layer in one decode step, before it attends.

    Axes: N text rows that attend in this step (one for each row of the batch; more if one call reads several
    tokens at once), R rows that are held, Hq and Hkv query and KV heads, K entries, D head width.

    Args:
        queries_of: Returns `queries`, which cost a projection that the layer repeats.
        text_rows: Number of text rows N.
        keys: ``[R, Hkv, K, D]``, as they are held.
        values: ``[R, Hkv, K, D]``.
        slots_of: Returns `slots`.
        readable_of: Returns `readable`.
        number_of: Returns `number`.
        taken: The number of the step on the host, for policies that do not compile
            (`DecodePolicy.compiles`); -1 for others, because a graph would be made anew for each number.
        layer_idx: Index of the decoder layer in the model.
        rank: Index among the cross-attention layers, 0 to L - 1.
        num_layers: Number of cross-attention layers L.
        scaling: Factor on attention logits.
        policy_name: For messages.
        copies: Consecutive text rows that attend to one held row.
        unrestricted: Whether each text row may attend to every entry, as far as the host knows: there is
            neither padding nor a mask.
        held: The weights that the run holds.
        on: Where the step runs, if keys and values are not there (`DecodePolicy.offloads`): then these are
            tensors on the device "meta", which have shapes and no numbers. None: where the keys are.
    """

    queries_of: Callable[[], Tensor]
    text_rows: int
    keys: Tensor
    values: Tensor
    slots_of: Callable[[], Tensor]
    readable_of: Callable[[], Tensor]
    number_of: Callable[[], Tensor]
    taken: int
    layer_idx: int
    rank: int
    num_layers: int
    scaling: float
    policy_name: str = "?"
    copies: int = 1
    unrestricted: bool = False
    held: HeldWeights = field(default_factory=HeldWeights, repr=False)
    on: torch.device | None = None
    _made: list[Selection] = field(default_factory=list, repr=False)
    _limited: list[Selection] = field(default_factory=list, repr=False)
    _highest: list[Tensor] = field(default_factory=list, repr=False)
    _queries: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the step runs, and selections belong."""
        return self.keys.device if self.on is None else self.on

    @property
    def entries(self) -> int:
        """Number of entries K."""
        return self.keys.shape[-2]

    @property
    def queries(self) -> Tensor:
        """Queries of this step as they enter attention, ``[N, Hq, D]``; computed when first asked for."""
        if not self._queries:
            self._queries.append(self.queries_of())
        return self._queries[0]

    @property
    def readable(self) -> Tensor:
        """The entries that each text row may attend to, bool ``[N, Hkv or 1, K]``.

        False at padding and where the model's own mask hides an entry. True everywhere for a row from which
        all is hidden (a sample of padding, or without condition), because attention must read something.
        """
        return self.readable_of()

    @property
    def number(self) -> Tensor:
        """Decode steps since the prefill, int64 ``[]``, 0 in the first one.

        A call that reads several tokens counts as that many steps, but all of its rows have the number of its
        first.
        """
        return self.number_of()

    @property
    def rows(self) -> Tensor:
        """The held row that each text row attends to, int64 ``[N]``."""
        return torch.arange(self.text_rows, device=self.device) // self.copies

    @property
    def slots(self) -> Tensor:
        """Column of each entry, int64 ``[R, H or 1, K]``."""
        return self.slots_of()

    @property
    def heads(self) -> int:
        """Number of KV heads Hkv, which may read different entries."""
        return self.keys.shape[1]

    @property
    def where(self) -> str:
        """The moment and layer of the view, for messages."""
        return f"in a decode step at layer {self.layer_idx}"

    def weights(self, policy: HasWeights) -> Mapping[str, Tensor]:
        """Return the trained weights of a policy, by name, in float32 on the device of the view; read-only.

        Args:
            policy: A `TrainedPolicy`: ``step.weights(self)``.

        Raises:
            WeightsError: If they do not fit the policy or the model.
        """
        known = {"cross_layers": self.num_layers, "kv_heads": self.heads, "head_width": self.keys.shape[-1]}
        return self.held.of(policy, self.device, known)

    def of_rows(self, held: Tensor) -> Tensor:
        """Return what is held, ``[R, ...]``, for each text row, ``[N, ...]``; a view where it can be."""
        return repeat_rows(held, self.copies)

    def grouped_queries(self) -> Tensor:
        """Return the queries by KV head, ``[N, Hkv, Hq / Hkv, D]``, in float32 (float64 for float64)."""
        dtype = accumulation_dtype(self.queries)
        queries = self.queries.to(dtype)
        return queries.reshape(len(queries), self.heads, -1, queries.shape[-1])

    def has_made(self, selection: Selection) -> bool:
        """Whether `best` or `best_pages` has made a selection in this step, so that its entries are right."""
        return any(made is selection for made in self._made)

    def has_limited(self, selection: Selection) -> bool:
        """Whether the policy has given one of these a limit, which may be 0 for some row."""
        return any(made is selection for made in self._limited)

    def has_undefined_scores(self) -> Tensor:
        """Whether `best` or `best_pages` got NaN for an entry that may be read, bool ``[]`` on the device."""
        found = [highest.isnan().any() for highest in self._highest]
        return found[0] if len(found) == 1 else torch.stack(found).any()

    def best(self, scores: Tensor, count: int, limit: Tensor | None = None) -> Selection:
        """Return the entries of the highest scores, for each text row, without asking the device.

        Equal scores go to the lower place.

        Args:
            scores: ``[N, Hkv or 1, K]``, higher = read. Entries that a row cannot read do not matter.
            count: How many entries are read at most; the width of the selection.
            limit: int64 ``[N]``, how many entries each text row reads, at least 1; ``count`` by default.

        Returns:
            ``[N, Hkv or 1, count]``. Rows that may read fewer entries are padded.
        """
        count = max(1, min(count, self.entries))
        if self.unrestricted and limit is None:
            found, order = scores.sort(dim=-1, descending=True, stable=True)
            self._highest.append(found[..., 0])  # NaN comes first
            order = order[..., :count]
            self._made.append(Selection.full(order.sort(dim=-1).values, self.entries))
            return self._made[-1]
        heads = max(scores.shape[1], self.readable.shape[1])
        # An entry that may be read ranks above all others, whatever its score.
        scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        lowest = scores.masked_fill(~self.readable, -torch.inf)  # [N, H, K]
        # Stable, so that equal scores go to the lower place on any device.
        found, places = lowest.expand(-1, heads, -1).sort(dim=-1, descending=True, stable=True)
        self._highest.append(found[..., 0])
        found, places = found[..., :count], places[..., :count]  # [N, H, count], best first
        valid = found != -torch.inf
        if limit is not None:
            valid = valid & (torch.arange(count, device=valid.device) < limit[:, None, None])
        made = in_order(places, valid, self.entries)
        return self._noted(made, limit)

    def best_pages(self, scores: Tensor, page: int, count: int, limit: Tensor | None = None) -> Selection:
        """Return the entries of the pages of the highest scores, without asking the device.

        A page is a run of entries. Pages are read whole, the best first, until ``count`` entries are found;
        the last one is read from its beginning. The same as `best` with each page's score for its entries,
        but pages are sorted, which are fewer.

        Args:
            scores: ``[N, Hkv or 1, P]``, higher = read; P = K / page, rounded up.
            page: Entries of a page.
            count: As in `best`.
            limit: As in `best`.

        Returns:
            ``[N, Hkv or 1, count]``. Rows that may read fewer entries are padded.
        """
        count = max(1, min(count, self.entries))
        if not self.unrestricted or limit is not None:
            return self._noted(packed(self._of_pages(scores, page, count, limit), count), limit)
        # One page more than fills count, because the last page of all may be short.
        most = min(-(-count // page) + 1, scores.shape[-1])
        found, order = scores.sort(dim=-1, descending=True, stable=True)
        self._highest.append(found[..., 0])
        order = order[..., :most]  # [N, H, most]
        places = (order[..., None] * page + torch.arange(page, device=order.device)).flatten(-2)
        held = places < self.entries  # [N, H, most * page], the best page first
        taken = held & (held.cumsum(-1) <= count)
        places = torch.where(taken, places, self.entries).sort(dim=-1).values[..., :count]
        self._made.append(Selection.full(places, self.entries))
        return self._made[-1]

    def _noted(self, made: Selection, limit: Tensor | None) -> Selection:
        self._made.append(made)
        if limit is not None:
            self._limited.append(made)
        return made

    def _of_pages(self, scores: Tensor, page: int, count: int, limit: Tensor | None) -> Tensor:
        """Return the readable entries of the best pages, bool ``[N, H, K]``, at most ``count`` a row."""
        pages, heads = scores.shape[-1], max(scores.shape[1], self.readable.shape[1])
        readable = pad(self.readable, (0, pages * page - self.entries)).unflatten(-1, (pages, page))
        place = readable.cumsum(-1)  # [N, H or 1, P, page], counted from 1 within a page
        self._highest.append(scores.masked_fill(place[..., -1] == 0, -torch.inf).amax(-1))
        order = scores.expand(-1, heads, -1).sort(dim=-1, descending=True, stable=True).indices
        sizes = place[..., -1].expand(-1, heads, -1).gather(-1, order)  # [N, H, P], the best page first
        better = sizes.cumsum(-1) - sizes  # entries of better pages
        most = count if limit is None else limit.clamp(max=count)[:, None, None]
        left = better.scatter(-1, order, most - better)  # [N, H, P], what a page may add
        taken: Tensor = readable & (place <= left[..., None])
        return taken.flatten(-2)[..., : self.entries]


def packed(chosen: Tensor, width: int) -> Selection:
    """Return the selection of the true entries, of which no row has more than ``width``.

    Needs no device transfer, and no sort.

    Args:
        chosen: bool ``[N, H, K]``.
        width: Width of the selection.
    """
    entries = chosen.shape[-1]
    number = chosen.cumsum(-1)  # [N, H, K], of each true entry among them, from 1
    # Others are written to one place beyond the last, which is cut off.
    at = torch.where(chosen, number - 1, width)
    every = torch.arange(entries, device=chosen.device).expand_as(at)
    places = at.new_zeros(*at.shape[:2], width + 1).scatter(-1, at, every)[..., :width]
    valid = torch.arange(width, device=chosen.device) < number[..., -1:]
    return Selection.trusted(torch.where(valid, places, places.amax(-1, keepdim=True)), valid, entries)


def in_order(places: Tensor, valid: Tensor, entries: int) -> Selection:
    """Return the selection of the valid places, in any order; needs no device transfer.

    Args:
        places: int64 ``[N, H, n]``, distinct where valid.
        valid: bool, same shape.
        entries: Number of entries K.
    """
    places = torch.where(valid, places, entries).sort(dim=-1).values  # valid ones first
    valid = places < entries
    last = torch.where(valid, places, 0).amax(-1, keepdim=True)
    return Selection.trusted(torch.where(valid, places, last), valid, entries)
