"""Part C of the known defects: methods that are not what they are called.

Each test asserts what the authors' code does, and failed before the defect was cured; what is still open is a
strict expected failure.

Elsewhere: what other methods (C1, C2, C4 to C9, C11) select and say is compared in tests/published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from defect_helpers import kept, on_models
from helpers import kept_sets, make_view, make_visibility
from kvprune_strategies import AdaKV, Norm, SnapKV

import kvprune
from kvprune import demo
from kvprune.comparison.data.examples import read_examples
from kvprune.comparison.execution.questions import PictureGenerator

# C3: how a head's safe part and its hits make its budget.


def lengths(values: list[list[float]]) -> Any:
    """Return a view whose values have these lengths, by head and column."""
    vectors = (
        torch.tensor(values, dtype=torch.float64)[None, ..., None] * torch.eye(4, dtype=torch.float64)[0]
    )
    return make_view(make_visibility([[[1]]], len(values[0])), values=vectors)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_c3_adakv_blends_hits_and_even_shares(alpha: float) -> None:
    """Of the best 2 x 8 tokens of both heads, the first has 12 and the second 4; an even share is C = 8."""
    first = [40.0 - column for column in range(12)] + [4.0, 3.0, 2.0, 1.0]
    second = [20.5 + column for column in range(4)] + [17.0 - column for column in range(12)]
    policy = AdaKV(alpha=alpha, keep_tokens=8, scorer=Norm())
    counts = [len(of_head) for of_head in kept_sets(policy.select(lengths([first, second])).cache)[0]]
    assert counts == [round((1 - alpha) * hits) + int(alpha * 8) for hits in (12, 4)]


# C4: in which order a group of query heads is averaged and pooled.


def test_c4_snapkv_averages_a_group_of_query_heads_before_it_pools() -> None:
    view = make_view(make_visibility([[[1]] * 3], 12), query_heads=4, kv_heads=2)
    grouped = view.attention_mass().unflatten(1, (2, 2)).mean(2)
    expected = torch.nn.functional.max_pool1d(grouped, 3, stride=1, padding=1)
    scores = SnapKV(kernel=3, reduction="max").score(view)
    assert (scores - expected).abs().max() <= 1e-12


# C10: the end of a prompt whose last token is read late, from the pruned cache.


@on_models
@pytest.mark.parametrize("spec", ["fastv:keep_ratio=0.1", "snapkv:keep_ratio=0.1,window=1"])
def test_c10_policies_see_the_real_end_of_a_prompt_whose_last_token_is_read_again(
    spec: str, tmp_path: Path
) -> None:
    """Re-reading shows the first answer what was dropped, and the policy still sees the whole prompt."""
    demo.write_dataset(tmp_path / "data", tasks=("read",), per_task=1, seed=0)
    examples = read_examples(tmp_path / "data" / "data.jsonl")
    plain: dict[str, Any] = {"device": "cpu", "dtype": "auto", "attn_implementation": None}
    generator = PictureGenerator.load(None, max_new_tokens=1, **plain)
    inputs = generator.encode(examples)
    chosen, first = [], []
    for reread in (False, True):
        with kvprune.compress(generator.model, spec, reread=reread) as run, torch.no_grad():
            first.append(generator.model(**inputs).logits[:, -1])
        chosen.append(kept(run))
    assert chosen[0] == chosen[1]
    assert not torch.equal(*first)


# C11: precision of norms.


def test_c11_norm_ranks_float64_in_float64() -> None:
    view = lengths([[1, 1 + 1e-10, 1 - 1e-10, 1], [2, 2 - 1e-10, 2, 2 + 1e-10]])
    assert kept_sets(Norm(keep_tokens=1).select(view).cache) == [[{1}, {3}]]
