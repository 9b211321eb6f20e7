"""Policies that make new tokens, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from generation import generate
from torch import Tensor

import kvprune
from kvprune.session.compression import Compression
from kvprune.testing import masked_oracle


def pairs_of(visible: Tensor, groups: Tensor, features: Tensor) -> kvprune.Replacement:
    """Return the mean of each two visible columns that follow each other in a group, at the first one."""
    batch, columns, _ = features.shape
    kept = torch.zeros(batch, 1, columns, dtype=torch.bool)
    mean = features.clone()
    for sample in range(batch):
        for group in groups[sample].unique().tolist():
            of_group = visible[sample] & (groups[sample] == group)
            members = of_group.nonzero().flatten().tolist()
            for first, second in zip(members[::2], [*members[1::2], None], strict=False):
                kept[sample, 0, first] = True
                if second is not None:
                    mean[sample, first] = (features[sample, first] + features[sample, second]) / 2 + 0.1
    places = kvprune.Selection.from_mask(kept)
    index = places.indices[:, 0, :, None].expand(-1, -1, features.shape[-1])
    new = mean.gather(1, index)
    return kvprune.Replacement(new.masked_fill(~places.valid[:, 0, :, None], torch.nan), places)


@dataclass(frozen=True, kw_only=True)
class Pairs(kvprune.FeaturePolicy):
    """Replace each two neighbouring tokens by one, which is not quite their mean."""

    name = "pairs"

    def choose(self, view: kvprune.FeatureView) -> kvprune.Decision:
        seen = view.visible_in_prefill
        seen = seen | ~seen.any(-1, keepdim=True)
        return kvprune.Decision(onward=pairs_of(seen, view.strata * 100 + view.groups, view.features))


@dataclass(frozen=True, kw_only=True)
class PairsThen(Pairs):
    """Replace tokens before the first layer, and let another policy prune them at the layers."""

    then: kvprune.CrossKVPolicy
    name = "pairs-then"

    @property
    def needs(self) -> Any:
        return self.then.needs

    def select(self, view: kvprune.LayerView) -> kvprune.Decision:
        return self.then.select(view)


@dataclass(frozen=True, kw_only=True)
class PairsAtLayer(kvprune.CrossKVPolicy):
    """Replace tokens for all layers after one, in each of the named ranks."""

    rank: int = 0
    again: int = -1
    name = "pairs-at-layer"
    needs = frozenset({"features"})

    def select(self, view: kvprune.LayerView) -> kvprune.Decision:
        if view.rank not in (self.rank, self.again):
            return kvprune.Decision()
        seen = view.visible_in_prefill
        exists = view.visibility.exists
        blind = ~seen.any(-1, keepdim=True)
        seen = seen | (blind if exists is None else blind & exists)
        return kvprune.Decision(onward=pairs_of(seen, view.strata * 100 + view.groups, view.features))


def compare_to_oracle(
    model: Any, inputs: dict[str, Any], policy: Any, adapter: Any = None, reread: bool = False, **options: Any
) -> tuple[Compression, float]:
    """Assert that a run generates what the untouched model does with the new tokens; return both's gap."""
    if adapter is None:
        run = kvprune.compress(model, policy, reread=reread)
    else:
        run = Compression(adapter(model), policy, seed=0, reread=reread)
    with run:
        run.record_replacements()
        sequences, logits, _ = generate(model, inputs, **options)
    oracle = masked_oracle(
        model,
        run.selections,
        run.prefill_selections,
        adapter=adapter,
        reread=reread,
        replacements=run.replacements,
    )
    with oracle:
        expected, wanted, _ = generate(model, inputs, **options)
    assert run.replacements
    assert torch.equal(sequences, expected)
    assert not logits.isnan().any()
    differ = logits != wanted  # Dia forbids tokens by logits of -inf
    return run, float((logits - wanted)[differ].abs().max()) if differ.any() else 0.0
