"""`attnpred` against a slow version of its rule, in plain loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from families import MODELS, inputs_of, model_of
from generation import generate
from helpers import live_rows, make_view, make_visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from kvprune_strategies import attention_blocks as blocks
from kvprune_strategies import attention_predictors as predictors
from stepping import against_oracle, recorded

import kvprune
from kvprune import StepView
from kvprune.errors import BudgetError, PolicyOptionError, WeightsError
from kvprune.policy import HeldView
from kvprune.tokens.layout import Layout

TILES, GRID = 2, 3
COLUMNS = TILES * (1 + GRID * GRID)
"""Two tiles, each a class token and three rows of three patches."""


def slow_blocks(columns, size, grid):
    """Blocks of places in a list of columns; class tokens are in none. ``grid`` false: a line."""
    found, last = [], None
    for place, column in enumerate(columns):
        tile, patch = divmod(column, 1 + GRID * GRID) if grid else (0, column + 1)
        if patch == 0:
            last = None
            continue
        row, across = divmod(patch - 1, GRID) if grid else (0, column)
        if (tile, row, across // size) != last:
            found.append([])
            last = (tile, row, across // size)
        found[-1].append(place)
    return found


def slow_softmax(logits, among):
    top = max(logits[place] for place in among)
    weights = {place: math.exp(logits[place] - top) for place in among}
    total = math.fsum(weights.values())
    return [weights.get(place, 0.0) / total for place in range(len(logits))]


def slow_logits(query, keys, scaling):
    return [scaling * math.fsum(q * k for q, k in zip(query, key, strict=True)) for key in keys]


def slow_expected(rows, predictor, decay):
    """What is expected of the next row, from the rows before it, the oldest first; each a list by block."""
    counted = {"last": rows[-1:], "mean": rows, "ema": rows}[predictor]
    factor = decay if predictor == "ema" else 1
    weights = [factor**age for age in range(len(counted))][::-1]
    return [
        math.fsum(weight * row[block] for weight, row in zip(weights, counted, strict=True)) / sum(weights)
        for block in range(len(rows[0]))
    ]


def step_view(view, held, queries, taken, copies=1):
    return StepView(
        queries_of=lambda: queries,
        text_rows=len(queries),
        keys=held.keys,
        values=held.values,
        slots_of=lambda: held.slots,
        readable_of=lambda: held.valid.repeat_interleave(copies, dim=0),
        number_of=lambda: torch.tensor(taken),
        taken=taken,
        layer_idx=view.layer_idx,
        rank=view.rank,
        num_layers=view.num_layers,
        scaling=view.scaling,
        copies=copies,
    )


def slow_steps(view, held, sample, queries, policy, grid):
    """Yield what each KV head of a sample reads in each step, as sets of places; ``queries [n][Hq][D]``."""
    count = int(held.valid[sample, 0].sum())
    parts = slow_blocks(held.slots[sample, 0, :count].tolist(), policy.block, grid)
    free = [place for place in range(count) if all(place not in part for part in parts)]
    budget = math.ceil(round(policy.keep_ratio * count, 9))
    keys = held.keys[sample, :, :count].tolist()
    group = len(queries[0]) // len(keys)
    chosen = live_rows(view.visibility, sample)[-policy.history :]
    chosen = [chosen[0]] * (policy.history - len(chosen)) + chosen
    histories = []
    for head in range(len(queries[0])):
        rows = []
        for row in chosen:
            logits = slow_logits(view.queries[sample, head, row].tolist(), keys[head // group], view.scaling)
            weights = slow_softmax(logits, range(count))
            rows.append([max(weights[place] for place in part) for part in parts])
        histories.append(rows)
    for number, step in enumerate(queries, start=1):
        read = []
        for kv_head in range(len(keys)):
            if (
                budget == count
                or number <= policy.first
                or (policy.interval and not number % policy.interval)
            ):
                read.append(set(range(count)))
                continue
            heads = range(kv_head * group, (kv_head + 1) * group)
            each = [slow_expected(histories[head], policy.predictor, policy.decay) for head in heads]
            mean = [math.fsum(column) / group for column in zip(*each, strict=True)]
            order = sorted(range(len(parts)), key=lambda block: (-mean[block], block))
            read.append(set([*free, *(place for block in order for place in parts[block])][:budget]))
        yield read
        for head, query in enumerate(step):
            weights = slow_softmax(slow_logits(query, keys[head // group], view.scaling), read[head // group])
            row = [max(weights[place] for place in part) for part in parts]
            histories[head] = [*histories[head][1:], row]


@settings(max_examples=25, deadline=None)
@given(
    st.booleans(),
    st.sampled_from(["last", "mean", "ema"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([0, 2]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.integers(0, 99),
)
def test_it_reads_what_the_slow_rule_reads(grid, predictor, history, interval, first, block, ratio, seed):
    sees = [[[1, 1]] * 3, [[0, 0], [0, 0], [1, 0]]]  # the second sample has one tile, and one live row
    visibility = make_visibility(sees, COLUMNS // TILES)
    layout = Layout.tiles(GRID, torch.tensor([[2], [1]]), TILES, class_token=True)
    if not grid:
        visibility = make_visibility([[[1]] * 3, [[1], [1], [1]]], COLUMNS)
        layout = Layout.line(COLUMNS)
    view = make_view(visibility, seed=seed, layout_of=lambda: layout)
    options = f"predictor={predictor},history={history},interval={interval},first={first},block={block}"
    policy = kvprune.get_policy(f"attnpred:keep_ratio={ratio},{options}")
    slots = torch.arange(COLUMNS).expand(2, 1, -1)
    valid = visibility.decode[:, None]
    held = HeldView(
        layer=view,
        keys=view.keys,
        values=view.values,
        slots=torch.where(valid, slots, COLUMNS // TILES - 1),
        valid=valid,
        columns=COLUMNS,
    )
    state = policy.prepare(held)
    random = torch.Generator().manual_seed(seed)
    queries = 2 * torch.randn(5, 2, 4, 4, generator=random, dtype=torch.float64)
    wanted = [
        list(slow_steps(view, held, sample, queries[:, sample].tolist(), policy, grid)) for sample in (0, 1)
    ]
    for taken in range(5):
        step = step_view(view, held, queries[taken], taken)
        read = policy.attend(step, state)
        mask = step.readable.expand(-1, 2, -1) if read is None else read.mask.expand(-1, 2, -1)
        for sample, head in itertools.product(range(2), range(2)):
            assert set(mask[sample, head].nonzero().flatten().tolist()) == wanted[sample][taken][head]
        logits = (step.grouped_queries() @ view.keys.transpose(-1, -2)).flatten(1, 2) * view.scaling
        attention = logits.masked_fill(~mask.repeat_interleave(2, 1), -torch.inf).softmax(-1)
        state, freed = policy.observe(step, attention, state)
        assert freed is None


def slow_network(weights, picture):
    """The network on one picture ``[M][P]``, in plain loops."""
    rows, width = len(picture), len(picture[0])

    def convolved(channels, name):
        kernel, bias = weights[f"{name}.weight"].tolist(), weights[f"{name}.bias"].tolist()

        def at(out, row, column):
            inside = [
                kernel[out][one][down][right] * channel[row + down - 1][column + right - 1]
                for one, channel in enumerate(channels)
                for down in range(3)
                for right in range(3)
                if 0 <= row + down - 1 < rows and 0 <= column + right - 1 < width
            ]
            return max(0.0, bias[out] + math.fsum(inside))

        return [[[at(out, y, x) for x in range(width)] for y in range(rows)] for out in range(len(bias))]

    hidden = convolved(convolved([picture], "conv1"), "conv2")
    last, bias = weights["conv3.weight"][0, :, 0].tolist(), float(weights["conv3.bias"])
    return [
        bias
        + math.fsum(
            weight * math.fsum(row[x] for row in one) / rows for weight, one in zip(last, hidden, strict=True)
        )
        for x in range(width)
    ]


def random_weights(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(shape, generator=random, dtype=torch.float64)
        for name, shape in predictors.SHAPES.items()
    }


def test_the_network_is_what_plain_loops_compute():
    weights = random_weights()
    history = torch.rand(2, 1, 3, 4, dtype=torch.float64)
    found = predictors.network(weights, history)
    for sample in range(2):
        wanted = torch.tensor(slow_network(weights, history[sample, 0].tolist()), dtype=torch.float64)
        assert torch.allclose(found[sample, 0], wanted, rtol=1e-12)


def test_the_network_has_4833_weights():
    assert sum(tensor.numel() for tensor in predictors.initial_weights().values()) == 4833


def test_the_network_follows_a_shift_of_the_blocks():
    weights = random_weights(1)
    history = torch.zeros(1, 2, 4, 20, dtype=torch.float64)
    history[..., 5:9] = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    found = predictors.network(weights, history)
    shifted = predictors.network(weights, history.roll(6, dims=-1))
    assert torch.allclose(shifted[..., 3:17].roll(-6, dims=-1)[..., :8], found[..., 3:11], rtol=1e-12)
    for width in (1, 2, 3, 50):
        assert predictors.network(weights, history[..., :1].expand(-1, -1, -1, width)).shape[-1] == width


def test_blocks_beyond_those_of_a_sample_change_nothing():
    weights = random_weights(2)
    history = torch.rand(1, 2, 4, 6, dtype=torch.float64)
    wider = torch.nn.functional.pad(history, (0, 5))
    real = (torch.arange(11) < 6)[None, None]
    wanted = predictors.network(weights, history)
    assert torch.allclose(predictors.network(weights, wider, real)[..., :6], wanted, rtol=1e-12)
    assert not torch.allclose(predictors.network(weights, wider)[..., :6], wanted, rtol=1e-3)


def test_expecting_the_true_row_captures_most():
    attention = torch.rand(1, 1, 1, 24, dtype=torch.float64).softmax(-1)
    whole = attention[0, 0, 0].unflatten(0, (-1, 4)).sum(-1)
    scores = blocks.spread(whole[None, None], {}, 4, 24)[0, 0]
    best = attention.flatten()[scores.topk(8).indices].sum()
    others = [whole[list(some)].sum() for some in itertools.combinations(range(6), 2)]
    assert min(others) >= 0
    assert best <= 1
    assert torch.isclose(best, max(others))


def test_correcting_in_each_step_makes_the_history_dense():
    model, inputs = model_of("Whisper"), inputs_of("Whisper", "one")
    wanted = generate(model, inputs)[1]
    _, logits, run = recorded(model, inputs, "attnpred:keep_ratio=0.1,interval=1,predictor=last")
    assert torch.equal(logits, wanted)
    assert {receipt.entries_read for receipt in run.report.steps} == {50.0}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_the_oracle(family, beams):
    spec = "attnpred:keep_ratio=0.3,predictor=ema,interval=3,block=2"
    if beams == 1:
        spec = "attnpred:keep_tokens=3"
    assert against_oracle(model_of(family), inputs_of(family), spec, num_beams=beams) <= 1e-6


@pytest.mark.parametrize("predictor", ["cnn", "last"])
def test_reading_everything_is_bit_identical(predictor):
    for family in MODELS:
        model, inputs = model_of(family), inputs_of(family, "one")
        wanted = generate(model, inputs)[1]
        assert torch.equal(recorded(model, inputs, f"attnpred:keep_ratio=1,predictor={predictor}")[1], wanted)


def test_the_cache_keeps_everything_and_steps_read_different_entries():
    spec = "attnpred:keep_ratio=0.1,block=2,predictor=ema,interval=4"
    run = recorded(model_of("Whisper"), inputs_of("Whisper"), spec)[2]
    assert run.report.kept_fraction == 1
    assert run.report.bytes_held == run.report.bytes_full
    first = [read.columns for read in run.step_reads if read.layer_idx == 0]
    assert [int(read[0, 0, 0].sum()) for read in first] == [5, 5, 5, 50, 5]
    assert any(not torch.equal(one, other) for one, other in itertools.pairwise([*first[:3], first[4]]))


def test_wrong_options():
    for options, message in (
        ("predictor=last,history=0", "history of policy 'attnpred' is at least 1, got 0"),
        ("interval=-1", "interval of policy 'attnpred' is at least 0, got -1"),
        ("first=-1", "first of policy 'attnpred' is at least 0, got -1"),
        ("predictor=last,block=0", "block of policy 'attnpred' is at least 1, got 0"),
        ("decay=1.0", r"decay of policy 'attnpred' lies in \(0, 1\), got 1.0"),
        ("predictor=last,weights=fresh", "reads weights with predictor=cnn alone, got predictor=last"),
    ):
        with pytest.raises(PolicyOptionError, match=message):
            kvprune.get_policy(f"attnpred:{options}")
    with pytest.raises(BudgetError, match="keep_ratio"):
        kvprune.get_policy("attnpred:keep_ratio=0")


def test_weights_of_other_blocks_or_of_another_history_are_refused():
    for options in ("block=4", "history=8"):
        name, number = options.split("=")
        with pytest.raises(WeightsError, match=f"trained with {name}=.*but the policy .* has {options}"):
            kvprune.get_policy(f"attnpred:{options}")
        assert getattr(kvprune.get_policy(f"attnpred:{options},weights=fresh"), name) == int(number)
    with pytest.raises(WeightsError, match=r"no weights 'bogus'.*demo"):
        kvprune.get_policy("attnpred:weights=bogus")


def test_the_spec_names_the_digest_of_the_weights():
    policy = kvprune.get_policy("attnpred")
    assert policy.digest
    assert f"digest={policy.digest}" in str(policy.spec)
    assert kvprune.get_policy(str(policy.spec)) == policy
    assert "digest" not in str(kvprune.get_policy("attnpred:predictor=mean").spec)


def test_a_derived_class_has_the_weights_of_its_policy():
    policy = kvprune.get_policy("attnpred")
    derived = dataclass(frozen=True, kw_only=True)(type("Derived", (type(policy),), {"__module__": "types"}))
    assert derived().weights_path == policy.weights_path
