"""`then` with a second policy that decides in decode steps: what it sees, reads and holds, and refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from families import MODELS, OLD, inputs_of, model_of
from generation import generate, mllama, tiny_bart, tiny_mllama
from kvprune_strategies import Then
from step_policies import Fixed, Hashes, ReadsAll, Remembers
from stepping import against_oracle, later_image_like_the_oracle, recorded, two_images
from test_then import QUICK
from transformers import CompileConfig

import kvprune
from kvprune import CrossKVPolicy, Decision, DecodePolicy, FeaturePolicy, PolicySpec
from kvprune.errors import PolicyOptionError, UnsupportedCacheError
from kvprune.testing import mllama_inputs, recheck
from kvprune.testing.conformance import INVARIANTS
from kvprune.testing.conformance.policies.runner import Runner

FIRST = "divprune:keep_ratio=0.6"
SECONDS = (
    "quest:keep_ratio=0.4,page=2",
    "h2o:keep_ratio=0.4,steps=3",
    "attnpred:keep_ratio=0.4,predictor=last,interval=3,block=2",
    "attnpred:keep_ratio=0.4",
)
QUICK_SECONDS = (*SECONDS[:3], pytest.param(SECONDS[3], marks=pytest.mark.slow))


def pair(second, first=FIRST):
    return f"{first} then {second}"


@pytest.mark.parametrize("second", SECONDS)
def test_a_pair_is_read_and_written(second):
    policy = kvprune.get_policy(pair(second))
    assert kvprune.get_policy(str(policy.spec)) == policy
    assert kvprune.get_policy(PolicySpec.from_json(policy.spec.to_json())) == policy
    assert policy.takes_steps
    assert policy.observes == policy.second.observes
    for what in ("compiles", "foresees", "offloads"):
        assert getattr(policy, what) == getattr(policy.second, what)
    assert policy.exact_budget is None
    assert policy.requested == {"first keep_ratio": 0.6, "second keep_ratio": 0.4}
    assert not kvprune.get_policy(f"{FIRST} then h2o").takes_steps


def test_a_pair_passes_on_all_that_a_decode_policy_may_say():
    """An attribute that is added there and not here would be ignored without a word."""
    said = {name for name in vars(DecodePolicy) if not name.startswith("_")} - {"moment"}
    assert said <= vars(Then).keys()


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("second", QUICK_SECONDS)
def test_generation_equals_the_oracle_that_masks_per_step(family, second):
    assert against_oracle(model_of(family), inputs_of(family), pair(second), num_beams=3) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("second", SECONDS)
def test_greedy_and_sampled_generation_do_too(family, second):
    for options in ({}, {"do_sample": True, "num_return_sequences": 2}, {"reread": True}):
        assert against_oracle(model_of(family), inputs_of(family), pair(second), **options) <= 1e-6


@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("BART", "meanpool:keep_ratio=0.5"),
        ("Mllama", "prumerge:keep_ratio=0.5"),
        pytest.param("Mllama", "meanpool:keep_ratio=0.5", marks=pytest.mark.slow),
        pytest.param("Whisper", "meanpool:keep_ratio=0.5", marks=pytest.mark.slow),
        pytest.param("Whisper", "topv:keep_tokens=3", marks=pytest.mark.slow),
    ],
)
def test_so_does_what_follows_merging_and_new_tokens(family, first):
    for second in (SECONDS[0], Fixed(keep_ratio=0.5), Remembers(least=2)):
        assert against_oracle(model_of(family), inputs_of(family), then(first, second)) <= 1e-6


def then(first, second):
    """Return a pair of policies, or of their specs."""
    made = (one if isinstance(one, CrossKVPolicy) else kvprune.get_policy(one) for one in (first, second))
    return Then(**dict(zip(("first", "second"), made, strict=True)))


@pytest.mark.parametrize("second", QUICK_SECONDS)
def test_the_second_does_what_it_does_alone_on_what_the_first_left(second):
    """BART reads encoder states by hand that hold nothing else, each sample by itself."""
    model, whole = model_of("BART"), inputs_of("BART")
    together, logits, run = recorded(model, whole, pair(second))
    for sample in range(3):
        inputs = {name: tensor[sample : sample + 1] for name, tensor in whole.items()}
        left = run.prefill_selections[0]
        columns = left.indices[sample, 0][left.valid[sample, 0]]
        with torch.no_grad():
            encoded = model.get_encoder()(**inputs)
        encoded.last_hidden_state = encoded.last_hidden_state[:, columns]
        by_hand = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"][:, columns]}
        alone, own, single = recorded(model, by_hand, second)
        same = int((together[sample, 1:] == alone[0, 1:]).long().cumprod(0).sum())
        assert (logits[:same, sample] - own[:same, 0]).abs().max() <= 1e-6
        for got, wanted in list(zip(run.step_reads, single.step_reads, strict=True))[: 3 * same]:
            assert torch.equal(got.columns[sample][..., columns], wanted.columns[0])
            assert int(got.columns[sample].sum()) == int(wanted.columns.sum())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("second", QUICK_SECONDS)
def test_kv16_a_second_one_that_reads_everything_is_the_first_one_alone(family, second):
    everything = second.replace("keep_ratio=0.4", "keep_ratio=1")
    alone = recorded(model_of(family), inputs_of(family), FIRST, num_beams=2)
    both = recorded(model_of(family), inputs_of(family), pair(everything), num_beams=2)
    assert torch.equal(both[0], alone[0])
    apart = (both[1] - alone[1]).abs().max()
    assert apart <= (1e-6 if "h2o" in second else 0)  # h2o holds each beam by itself
    assert both[2].selections == alone[2].selections
    assert both[2].report.read_fraction == 1
    if "h2o" not in second:
        assert both[2].report.bytes_held == alone[2].report.bytes_held


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mllama", "BART"])
def test_decoding_compiles_into_one_graph(family):
    if OLD and family == "Mllama":
        pytest.skip("this release branches on the device in its cross-attention")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = (tiny_mllama if family == "Mllama" else tiny_bart)(1, dtype=torch.float64)
    expected, own = recorded(model, inputs_of(family), pair(SECONDS[0]))[1:]
    how = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    with kvprune.compress(model, pair(SECONDS[0])) as run:
        options = {"cache_implementation": "static", "compile_config": how}
        assert (generate(model, inputs_of(family), **options)[1] - expected).abs().max() <= 1e-6
        assert run.report.steps == own.report.steps
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", MODELS)
def test_what_the_first_left_can_lie_in_host_memory(family):
    """Off-load says the same as without, and is no silent no-op in a pair."""
    here = recorded(model_of(family), inputs_of(family), pair(SECONDS[2]), num_beams=2)
    away = recorded(model_of(family), inputs_of(family), pair(f"{SECONDS[2]},offload=true"), num_beams=2)
    assert torch.equal(away[0], here[0])
    assert torch.equal(away[1], here[1])
    for one, other in zip(here[2].step_reads, away[2].step_reads, strict=True):
        assert torch.equal(one.columns, other.columns)
    for receipt in away[2].report.steps:
        assert receipt.bytes_on_host == receipt.bytes_held > 0


def test_receipts_tell_held_from_read():
    inputs = mllama_inputs(["t4ttt", "1ttt"])  # 20 and 5 columns are visible
    run = recorded(mllama(), inputs, "divprune:keep_ratio=0.5 then quest:keep_ratio=0.2,page=2")[2]
    held, read = [10, 3], [2, 1]  # ceil(n / 2), and ceil of a fifth of these
    assert {tuple(kept.counts[:, 0].tolist()) for kept in run.selections.values()} == {tuple(held)}
    for step in run.step_reads:
        assert step.columns.sum(-1).unique(dim=-1).flatten().tolist() == read
    for receipt in run.report.steps:
        assert (receipt.steps, receipt.width) == (5, 10)
        assert (receipt.entries_held, receipt.entries_read) == (6.5, 1.5)
    assert run.report.kept_fraction == pytest.approx((10 / 20 + 3 / 5) / 2)
    assert run.report.read_of_visible == pytest.approx(3 / 25)
    assert run.report.requested == {"first keep_ratio": 0.5, "second keep_ratio": 0.2}
    assert "a decode step reads 23.1% of what is held" in str(run.report)


def test_the_cache_shrinks_from_what_the_first_left_to_the_second_budget():
    with kvprune.compress(model_of("BART"), "divprune:keep_ratio=0.7 then h2o:keep_ratio=0.3,steps=3") as run:
        cache = generate(model_of("BART"), inputs_of("BART", "one"), steps=6)[2]
    assert cache is not None
    assert {kept.indices.shape[-1] for kept in run.selections.values()} == {7}  # ceil(0.7 * 9)
    assert {layer.width for layer in run.report.layers} == {3}  # ceil(0.3 * 7)
    assert run.report.verify() == run.report.bytes_held


@dataclass(frozen=True, kw_only=True)
class Looks(ReadsAll):
    """Compare what the layer's view says about each entry with the entry itself."""

    name = "looks"
    compiles = False

    def prepare(self, view):
        offset = view.columns - (view.layer.columns if view.received is None else view.received.columns)
        assert view.arrived.shape == view.slots.shape
        for row in range(len(view.keys)):
            for head in range(view.slots.shape[1]):
                for entry in view.valid[row, head].nonzero().squeeze(1).tolist():
                    column, slot = int(view.arrived[row, head, entry]), int(view.slots[row, head, entry])
                    assert (column < 0) == (slot < offset)
                    if column < 0:
                        continue
                    assert torch.equal(view.layer.keys[row, :, column], view.keys[row, :, entry])
                    of_image = column if view.received is None else view.received.indices[row, 0, column]
                    assert int(of_image) + offset == slot
        return {"seen": torch.ones(len(view.keys))}


@pytest.mark.parametrize("first", ["divprune:keep_ratio=0.6", "topv:keep_ratio=0.3", "divprune:keep_ratio=1"])
def test_places_of_entries_among_the_columns_that_arrived(first):
    for family in MODELS:
        recorded(model_of(family), inputs_of(family), then(first, Looks()), steps=1, num_beams=2)
    several, calls = mllama_inputs(["tt4tt1tt", "t2tt", "14ttt"], dtype=torch.float64), two_images()
    for policy in (then(first, Looks()), Looks()):
        recorded(model_of("Mllama"), several, policy, steps=1)
        with kvprune.compress(mllama(torch.float64), policy), torch.no_grad():
            cache = mllama(torch.float64)(**calls[0], use_cache=True).past_key_values
            generate(mllama(torch.float64), calls[1], 1, past_key_values=cache)


@pytest.mark.parametrize("second", [SECONDS[0], SECONDS[2], Hashes()], ids=str)
def test_a_later_image_equals_the_oracle(second):
    run = later_image_like_the_oracle(then(FIRST, second))
    assert 0 < run.report.read_fraction < 0.7


def test_h2o_with_steps_still_takes_one_image_only():
    model, (first, later) = mllama(torch.float64), two_images()
    with kvprune.compress(model, pair("h2o:steps=2")), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(PolicyOptionError, match="cannot take a later one"):
            model(**later, past_key_values=cache)


def test_drafts_and_calls_without_a_cache_are_refused_as_they_are_alone():
    model, inputs = model_of("BART"), inputs_of("BART", "one")
    with pytest.raises(UnsupportedCacheError, match="observes each decode step, but this call reads"):
        recorded(model, inputs, pair(SECONDS[1]), steps=12, prompt_lookup_num_tokens=3)
    with (
        kvprune.compress(model, pair(SECONDS[0])),
        pytest.raises(UnsupportedCacheError, match="use_cache=True"),
    ):
        model(**inputs, decoder_input_ids=inputs["input_ids"], use_cache=False)


@dataclass(frozen=True, kw_only=True)
class BothMoments(Hashes, FeaturePolicy):
    """A first policy that would also decide in steps."""

    name = "both-moments"

    def choose(self, view):
        return Decision()


def test_a_first_policy_that_takes_steps_is_refused():
    with pytest.raises(PolicyOptionError, match="decode steps, which only the second one may; first comes"):
        then(BothMoments(), kvprune.get_policy("h2o"))
    with pytest.raises(PolicyOptionError, match=r"'first' .*before the first cross-attention layer"):
        then(kvprune.get_policy("quest"), kvprune.get_policy("h2o"))


@pytest.mark.parametrize(
    ("spec", "problems"),
    [
        (pair(SECONDS[0], "topv:keep_ratio=0.6"), QUICK[-1:]),
        *(
            pytest.param(pair(second, first), QUICK, marks=pytest.mark.slow)
            for first, second in (
                ("topv:keep_ratio=0.6", SECONDS[0]),
                ("divprune:keep_ratio=0.6", SECONDS[1]),
                ("visionzip:keep_ratio=0.5", SECONDS[2]),
                ("meanpool:keep_ratio=0.5", SECONDS[3]),
                ("prumerge:keep_ratio=0.5", SECONDS[0]),
            )
        ),
    ],
)
def test_pairs_pass_the_conformance_suite_on_a_few_problems(spec, problems):
    policy, runner = kvprune.get_policy(spec), Runner(seed=0, examples=0)
    assert recheck("class", policy).outcome == "passed"
    outcomes = {}
    for row in INVARIANTS:
        for problem in problems:
            if row.on_layers if hasattr(problem, "family") else row.on_models:
                result = runner.check(row, [policy], problem)
                assert result.outcome in ("passed", "not applicable"), (result, problem)
                outcomes[row.id] = result.outcome
    assert [outcomes[one] for one in ("KV13", "KV16", "KV17", "history", "views")] == ["passed"] * 5
