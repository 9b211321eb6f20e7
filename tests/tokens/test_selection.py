"""Budgets are exact, selections are valid or refused, decisions are shaped as promised."""

import copy
import dataclasses
import decimal
import math
import pickle
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers import kept_sets
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvprune import Budget, Decision, Selection
from kvprune.errors import BudgetError, PolicyOptionError, SelectionError

# Budget


@pytest.mark.parametrize(
    ("ratio", "visible", "kept"),
    [
        (0.1, 10, 1),
        (0.2, 10, 2),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.9, 10, 9),
        (0.6, 5, 3),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.07, 100, 7),
        (0.1, 6404, 641),
        (0.25, 6404, 1601),
        (0.5, 1, 1),
        (0.5, 3, 2),
        (1e-9, 6404, 1),
        (1, 17, 17),
        (1.0, 17, 17),
        (0.5, 0, 0),
    ],
)
def test_a_ratio_keeps_the_written_decimal_rounded_up(ratio, visible, kept):
    assert Budget(keep_ratio=ratio).resolve(visible) == kept


@given(st.integers(1, 9999), st.integers(0, 20000))
def test_a_ratio_is_resolved_like_its_decimal_in_exact_arithmetic(numerator, visible):
    ratio = float(decimal.Decimal(numerator).scaleb(-4))
    assert Budget(keep_ratio=ratio).resolve(visible) == -(-numerator * visible // 10000)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 100000))
def test_any_ratio_keeps_at_least_one_and_at_most_all(ratio, visible):
    kept = Budget(keep_ratio=ratio).resolve(visible)
    assert 1 <= kept <= visible
    assert kept == math.ceil(Fraction(repr(ratio)) * visible)


@given(st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True), st.integers(0, 10000))
def test_a_larger_ratio_never_keeps_fewer(one, other, visible):
    small, large = sorted([one, other])
    assert Budget(keep_ratio=small).resolve(visible) <= Budget(keep_ratio=large).resolve(visible)


@given(st.integers(1, 10000), st.integers(0, 10000))
def test_a_number_of_tokens_is_kept_as_far_as_there_are_any(tokens, visible):
    assert Budget(keep_tokens=tokens).resolve(visible) == min(tokens, visible)


@given(st.floats(0.01, 1), st.lists(st.integers(0, 5000), max_size=8))
def test_resolve_all_resolves_each(ratio, counts):
    budget = Budget(keep_ratio=ratio)
    assert budget.resolve_all(iter(counts)) == [budget.resolve(count) for count in counts]


@pytest.mark.parametrize(
    "ratio", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, -math.inf, True, False, "0.5", Fraction(1, 2)]
)
def test_an_impossible_ratio_is_refused_with_its_value(ratio):
    with pytest.raises(
        BudgetError, match=f"keep_ratio.*got {ratio!r}".replace("(", r"\(").replace(")", r"\)")
    ):
        Budget(keep_ratio=ratio)


@pytest.mark.parametrize("tokens", [0, -3, 2.0, 1.5, True, False, "4", math.nan])
def test_an_impossible_number_of_tokens_is_refused_with_its_value(tokens):
    with pytest.raises(BudgetError, match=f"keep_tokens.*got {tokens!r}"):
        Budget(keep_tokens=tokens)


def test_a_budget_needs_one_of_the_two():
    with pytest.raises(BudgetError, match="keep_ratio=None and keep_tokens=None"):
        Budget()
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.5 and keep_tokens=7"):
        Budget(keep_ratio=0.5, keep_tokens=7)


def test_a_budget_error_is_an_option_error():
    with pytest.raises(PolicyOptionError, match="got 3"):
        Budget(keep_ratio=3)


def test_a_budget_cannot_be_changed():
    budget = Budget(keep_ratio=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError, match="keep_ratio"):
        budget.keep_ratio = 0.25
    assert budget == Budget(keep_ratio=0.5)
    assert budget != Budget(keep_ratio=0.25)


# Selection


@st.composite
def masks(draw):
    batch, heads, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    total = batch * heads * columns
    bits = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    kept = torch.tensor(bits).reshape(batch, heads, columns)
    # No row may be empty.
    fallback = draw(st.integers(0, columns - 1))
    kept[..., fallback] |= ~kept.any(-1)
    return kept


@given(masks())
def test_a_mask_comes_back_from_its_selection(kept):
    selection = Selection.from_mask(kept)
    assert torch.equal(selection.to_mask(), kept)
    assert Selection.from_mask(selection.to_mask()) == selection


class Operations(TorchDispatchMode):
    """Counts the operations that torch runs, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_mask_is_sorted_once_and_comes_back_without_a_scatter():
    kept = torch.tensor([[[True, False, True]]])
    with Operations() as operations:
        selection = Selection.from_mask(kept)
        first, second = selection.mask, selection.mask
        also = selection.with_merge(None).mask
    assert first is second
    assert also is first
    assert operations.counts["sort"] == 1
    assert operations.counts["scatter_"] == operations.counts["scatter"] == 0
    assert torch.equal(first, kept)


def test_indices_are_scattered_once():
    selection = Selection(torch.tensor([[[0, 2]]]), torch.tensor([[[True, True]]]), 3)
    with Operations() as operations:
        masks = [selection.mask, selection.mask, selection.to_mask(), selection.to_mask()]
    assert operations.counts["scatter_"] == 1
    assert operations.counts["sort"] == 0
    for mask in masks:
        assert mask.tolist() == [[[True, False, True]]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_stored_mask_is_nobodys_to_change(mode):
    with mode():
        kept = torch.tensor([[[True, False, True]]])
        selection = Selection.from_mask(kept)
        kept[..., 0] = False  # the caller's own mask
        assert selection.mask.tolist() == [[[True, False, True]]]
        selection.to_mask()[..., 0] = False  # a copy
        assert selection.mask.tolist() == [[[True, False, True]]]
        selection.mask[..., 0] = False  # the stored mask: indices decide
        assert selection.mask.tolist() == [[[True, False, True]]]
        selection.indices.copy_(torch.tensor([[[0, 1]]]))
        assert selection.mask.tolist() == [[[True, True, False]]]
        assert selection.to_mask().tolist() == [[[True, True, False]]]


@given(masks())
def test_a_copy_of_a_selection_has_the_same_mask(kept):
    selection = Selection.from_mask(kept)
    for made in (copy.deepcopy(selection), copy.copy(selection), pickle.loads(pickle.dumps(selection))):
        assert made == selection
        assert torch.equal(made.mask, kept)
    moved = dataclasses.replace(selection, columns=selection.columns + 1)
    assert moved.mask.shape[-1] == kept.shape[-1] + 1


@given(masks())
def test_a_selection_lists_the_kept_columns_in_order_and_pads_with_the_last(kept):
    selection = Selection.from_mask(kept)
    width = max(sum(row) for heads in kept.tolist() for row in heads)
    assert selection.indices.shape == (*kept.shape[:2], width)
    assert selection.columns == kept.shape[-1]
    for sample, heads in enumerate(kept.tolist()):
        for head, row in enumerate(heads):
            columns = [column for column, flag in enumerate(row) if flag]
            padding = width - len(columns)
            assert selection.indices[sample, head].tolist() == columns + [columns[-1]] * padding
            assert selection.valid[sample, head].tolist() == [True] * len(columns) + [False] * padding


@given(masks())
def test_what_is_made_from_a_mask_passes_every_check(kept):
    made = Selection.from_mask(kept)
    assert Selection(made.indices, made.valid, made.columns) == made


@given(masks())
def test_counts_and_raggedness_follow_from_the_mask(kept):
    selection = Selection.from_mask(kept)
    counts = kept.sum(-1)
    assert torch.equal(selection.counts, counts)
    assert selection.is_ragged == (len(counts.unique()) > 1)


@given(st.integers(1, 4), st.integers(1, 20))
def test_all_keeps_all(batch, columns):
    selection = Selection.all(batch, columns)
    assert torch.equal(selection.to_mask(), torch.ones(batch, 1, columns, dtype=torch.bool))
    assert selection == Selection.from_mask(torch.ones(batch, 1, columns, dtype=torch.bool))
    assert not selection.is_ragged
    assert Selection(selection.indices, selection.valid, selection.columns) == selection


def test_all_of_nothing_is_refused():
    with pytest.raises(SelectionError, match=r"KV03.*got 0 columns"):
        Selection.all(1, 0)


def valid_parts(**changes):
    parts = {
        "indices": torch.tensor([[[0, 2, 4], [1, 3, 3]]]),
        "valid": torch.tensor([[[True, True, True], [True, True, False]]]),
        "columns": 5,
    }
    return parts | changes


def test_the_parts_that_the_invalid_ones_are_made_from_are_valid():
    assert kept_sets(Selection(**valid_parts())) == [[{0, 2, 4}, {1, 3}]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.tensor([[[0, 2, 4], [1, 3, 3]]], dtype=torch.int32)}, "KV01.*int32"),
        ({"indices": torch.tensor([[[0.0, 2, 4], [1, 3, 3]]])}, "KV01.*float32"),
        ({"indices": torch.tensor([[0, 2, 4], [1, 3, 3]])}, r"KV01.*\[2, 3\]"),
        ({"indices": torch.tensor([[[[0, 2, 4], [1, 3, 3]]]])}, r"KV01.*\[1, 1, 2, 3\]"),
        ({"valid": torch.ones(1, 2, 3, dtype=torch.int64)}, "KV01.*int64"),
        ({"valid": torch.ones(1, 1, 3, dtype=torch.bool)}, r"KV01.*\[1, 2, 3\].*\[1, 1, 3\]"),
        (
            {"indices": torch.zeros(1, 2, 0, dtype=torch.int64), "valid": torch.zeros(1, 2, 0).bool()},
            "KV03.*K = 0",
        ),
        ({"valid": torch.tensor([[[True, True, True], [False, False, False]]])}, "KV03.*keeps none"),
        ({"columns": 4}, r"KV01.*\[0, 4\).*from 0 to 4"),
        ({"columns": 0}, r"KV01.*\[0, 0\).*from 0 to 4"),
        ({"indices": torch.tensor([[[-1, 2, 4], [1, 3, 3]]])}, r"KV01.*\[0, 5\).*from -1 to 4"),
        ({"indices": torch.tensor([[[0, 4, 2], [1, 3, 3]]])}, "KV01.*strictly increasing"),
        ({"indices": torch.tensor([[[0, 2, 2], [1, 3, 3]]])}, "KV01.*strictly increasing"),
        (
            {"valid": torch.tensor([[[True, True, True], [True, False, True]]])},
            "KV01.*valid entries come first",
        ),
        (
            {"valid": torch.tensor([[[True, True, True], [False, True, True]]])},
            "KV01.*valid entries come first",
        ),
        ({"indices": torch.tensor([[[0, 2, 4], [1, 3, 4]]])}, "KV01.*padding repeats the last index"),
        ({"indices": torch.tensor([[[0, 2, 4], [1, 3, 0]]])}, "KV01.*padding repeats the last index"),
        ({"valid": torch.ones(1, 2, 3, dtype=torch.bool, device="meta")}, "KV01.*cpu.*meta"),
    ],
)
def test_an_invalid_selection_is_refused_citing_the_invariant(changes, message):
    with pytest.raises(SelectionError, match=message):
        Selection(**valid_parts(**changes))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.ones(1, 1, 3), "KV01.*float32"),
        (torch.ones(1, 3, dtype=torch.bool), r"KV01.*\[1, 3\]"),
        (torch.zeros(2, 1, 3, dtype=torch.bool), "KV03.*keeps none"),
        (torch.tensor([[[True, False]], [[False, False]]]), "KV03.*keeps none"),
    ],
)
def test_an_impossible_mask_is_refused_citing_the_invariant(kept, message):
    with pytest.raises(SelectionError, match=message):
        Selection.from_mask(kept)


@pytest.mark.parametrize(
    "make", [lambda: Selection([[[0]]], [[[True]]], 1), lambda: Selection.from_mask([[[True]]])]
)
def test_what_is_no_tensor_is_refused_citing_the_invariant(make):
    with pytest.raises(SelectionError, match=r"KV01.*list"):
        make()


def test_equality_is_that_of_what_is_selected():
    first, second = Selection(**valid_parts()), Selection(**valid_parts())
    assert first == second
    assert first != Selection(**valid_parts(columns=6))
    assert first != Selection(**valid_parts(indices=torch.tensor([[[0, 1, 4], [1, 3, 3]]])))
    assert first != Selection(
        **valid_parts(indices=torch.tensor([[[0, 2, 4], [1, 3, 4]]]), valid=torch.ones(1, 2, 3).bool())
    )
    assert first != Selection.all(1, 5)
    assert first != "a selection"


def test_a_selection_is_not_hashable_and_not_assignable():
    selection = Selection(**valid_parts())
    with pytest.raises(TypeError, match="unhashable type: 'Selection'"):
        hash(selection)
    for field in ("indices", "valid", "columns"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field):
            setattr(selection, field, getattr(selection, field))
    with pytest.raises(dataclasses.FrozenInstanceError, match="extra"):
        selection.extra = 1


def test_a_selection_prints_its_sizes_and_no_tensor():
    assert repr(Selection(**valid_parts())) == "Selection(batch=1, heads=2, kept=3, columns=5)"


# Decision


def test_an_empty_decision_changes_nothing():
    assert Decision().cache is None
    assert Decision().onward is None


def test_a_decision_keeps_what_it_was_given():
    cache, onward = Selection(**valid_parts()), Selection.all(1, 5)
    decision = Decision(cache=cache, onward=onward)
    assert decision.cache is cache
    assert decision.onward is onward
    with pytest.raises(dataclasses.FrozenInstanceError, match="cache"):
        decision.cache = None


def test_what_later_layers_receive_cannot_differ_by_head():
    with pytest.raises(SelectionError, match=r"KV01.*all heads share.*\[1, 2, 3\]"):
        Decision(onward=Selection(**valid_parts()))
