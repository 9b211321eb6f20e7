"""Policies that decide in decode steps, in runs: oracle, beams, drafts, compiled decoding, bad answers."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from families import MODELS, OLD, inputs_of, model_of
from generation import generate, tiny_bart, tiny_mllama
from step_policies import Fixed, Hashes, ReadsAll, ReadsLogits, Remembers
from stepping import against_oracle, recorded
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache

import kvprune
from kvprune.adapters.stepping import stepped
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.errors import PolicyFailedError, SelectionError, UnsupportedCacheError, UnsupportedModelError
from kvprune.tokens.selection import Selection

POLICIES = (ReadsAll(), ReadsLogits(), Remembers(), Remembers(least=4), Hashes(), Fixed(keep_ratio=0.3))
QUEST = kvprune.get_policy("quest:keep_ratio=0.3,page=2")


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.spec))
def test_generation_equals_the_oracle_that_masks_per_step(family, policy, beams):
    assert against_oracle(model_of(family), inputs_of(family), policy, num_beams=beams) <= 1e-6


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.spec))
def test_with_returned_weights_and_several_sequences(family, policy):
    model, inputs = (
        model_of(family, torch.float32, "eager"),
        inputs_of(family, dtype=torch.float32),
    )
    options = {"do_sample": True, "num_return_sequences": 2, "output_attentions": True}
    assert against_oracle(model, inputs, policy, **options) <= 1e-5


@pytest.mark.parametrize("family", MODELS)
def test_the_last_token_is_read_again_as_a_step(family):
    for policy in (ReadsLogits(), Remembers(least=4)):
        assert against_oracle(model_of(family), inputs_of(family), policy, reread=True) <= 1e-6
    run = recorded(model_of(family), inputs_of(family), ReadsLogits(), reread=True, steps=1)[2]
    assert [receipt.steps for receipt in run.report.steps] == [1] * len(run.selections)


@pytest.mark.parametrize("family", MODELS)
def test_drafts_choose_as_they_would_one_by_one(family):
    """Each token of a call that reads several tokens reads what it would alone."""
    model, inputs = model_of(family), inputs_of(family, "one")
    expected = recorded(model, inputs, ReadsLogits(), steps=12)[0]
    found = recorded(model, inputs, ReadsLogits(), steps=12, prompt_lookup_num_tokens=3)[0]
    assert torch.equal(found, expected)
    if family != "Mllama":  # stock Mllama crops its image
        apart = against_oracle(model, inputs, ReadsLogits(), steps=12, prompt_lookup_num_tokens=3)
        assert apart <= 1e-6
    with pytest.raises(UnsupportedCacheError, match=r"observes each decode step, but this call reads \d"):
        recorded(model, inputs, Remembers(), steps=12, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_declared_family(name):
    tiny = TINY_FAMILIES[name]
    model = tiny.model(name, torch.float64, "sdpa" if tiny.sdpa else "eager")
    inputs = tiny.batch(torch.float64, tiny.pads)
    if name == "ProphetNetForConditionalGeneration":  # several streams read in one step, with one mask
        with pytest.raises(UnsupportedModelError, match="several streams in one step and takes one mask"):
            recorded(model, inputs, ReadsLogits(count=2))
        return
    for policy in (ReadsLogits(count=2), Remembers(least=3)):
        options = {"num_beams": 3} if tiny.beams else {}
        assert against_oracle(model, inputs, policy, steps=4, **options) <= 1e-6, policy.spec


def test_what_beams_remember_follows_them():
    """A policy that remembers answers for each beam as for that beam's own tokens, without other beams."""
    model, inputs = model_of("BART"), inputs_of("BART", "one")
    sequences, _, run = recorded(model, inputs, Hashes(), steps=6, num_beams=4, num_return_sequences=4)
    last = [read.columns for read in run.step_reads][-3:]  # of each layer, [4, 1, 1, S]
    assert len({tuple(row) for row in last[0].flatten(1).tolist()}) > 1  # beams differ
    found = []
    for sequence in sequences:  # each beam's tokens again, by themselves
        with kvprune.compress(model, Hashes()) as alone, torch.no_grad():
            alone.record_steps()
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for token in sequence[:-1]:
                model(**inputs, decoder_input_ids=token[None, None], past_key_values=cache)
        found.append([read.columns[0] for read in alone.step_reads][-3:])
    for layer in range(3):
        own = {tuple(beam[layer].flatten().tolist()) for beam in found}
        assert own <= {tuple(row) for row in last[layer].flatten(1).tolist()}


READS_ALL = ReadsAll()


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        pytest.param(
            family, policy, id=f"{family}-{policy.spec}", marks=[pytest.mark.slow] * (policy is READS_ALL)
        )
        for family in ("Mllama", "BART")
        for policy in (READS_ALL, ReadsLogits(), Fixed(keep_ratio=0.3), QUEST)
    ],
)
def test_decoding_compiles_into_one_graph(family, policy):
    """Nothing in a step reads a value from the device: fullgraph would refuse it."""
    if OLD and family == "Mllama":
        pytest.skip("this release branches on the device in its cross-attention")
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = (tiny_mllama if family == "Mllama" else tiny_bart)(1, dtype=torch.float64)
    inputs = inputs_of(family)
    expected, own = recorded(model, inputs, policy)[1:]
    how = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    with kvprune.compress(model, policy) as run:
        for _ in range(2):
            logits = generate(model, inputs, cache_implementation="static", compile_config=how)[1]
            assert (logits - expected).abs().max() <= 1e-6
            assert run.report.steps == own.report.steps
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_step_that_is_wrong_is_refused_when_the_block_ends():
    torch._dynamo.reset()
    model, inputs = tiny_bart(1, dtype=torch.float64), inputs_of("BART")
    how = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    run = kvprune.compress(model, copied(ReadsAll(), attend=picking([1, 50]))).attach()
    generate(model, inputs, steps=3, cache_implementation="static", compile_config=how)
    run.detach()
    with pytest.raises(SelectionError, match="KV01: it selects entries that the layer does not hold"):
        run.check_ran()


@pytest.mark.parametrize("family", MODELS)
def test_rows_may_read_different_numbers_of_entries(family):
    def attend(self, step, state):
        limit = 1 + 2 * (torch.arange(step.text_rows) % 3)
        scores = torch.sin(7.0 * torch.arange(step.entries)).expand(step.text_rows, 1, -1)
        return step.best(scores, 5, limit)

    policy = copied(ReadsAll(), attend=attend)
    assert against_oracle(model_of(family), inputs_of(family), policy) <= 1e-6
    run = recorded(model_of(family), inputs_of(family), policy)[2]
    assert {int(count) for count in run.step_reads[0].columns.sum(-1).flatten()} == {1, 3, 5}


def test_a_policy_that_does_not_say_so_is_not_compiled():
    with kvprune.compress(model_of("BART"), Remembers()):
        cache = generate(model_of("BART"), inputs_of("BART"), steps=2)[2]
    assert not cache.cross_attention_cache.layers[0].is_compileable
    with kvprune.compress(model_of("BART"), ReadsLogits()):
        cache = generate(model_of("BART"), inputs_of("BART"), steps=2)[2]
    assert cache.cross_attention_cache.layers[0].is_compileable


def test_a_fixed_choice_is_checked_once_and_its_places_are_computed_once(monkeypatch):
    """A step with the same selection copies keys and values, and does nothing else on the device."""
    counts = []

    def watched(*args):
        with _Counts() as found:
            answer = stepped(*args)
        counts.append(found.names)
        return answer

    monkeypatch.setattr("kvprune.adapters.encoder_decoder.stepped", watched)
    monkeypatch.setattr("kvprune.engine.step_answers._at_hand", lambda tensor: False)  # as on a GPU
    with kvprune.compress(model_of("Whisper"), Fixed(keep_ratio=0.3)):
        generate(model_of("Whisper"), inputs_of("Whisper"), steps=4)
    views = {"view", "expand"}
    for names in counts[len(counts) // 2 :]:
        assert sorted(set(names) - views) == ["index_select", "ones"]
        assert [name for name in names if name not in views].count("index_select") == 2


class _Counts(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


class _NoHostReads(TorchDispatchMode):
    """Refuses what would wait for a device: reading a number, or a size that depends on numbers."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, name
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["Mllama", "BART"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.spec))
def test_no_step_reads_a_number_from_the_device(family, policy, monkeypatch):
    calls = []

    def watched(*args):
        calls.append(args)
        with _NoHostReads():
            return stepped(*args)

    where = "mllama.adapter" if family == "Mllama" else "encoder_decoder"
    monkeypatch.setattr(f"kvprune.adapters.{where}.stepped", watched)
    monkeypatch.setattr("kvprune.engine.step_answers._at_hand", lambda tensor: False)  # as on a GPU
    for beams in (1, 2):
        with kvprune.compress(model_of(family), policy):
            generate(model_of(family), inputs_of(family), num_beams=beams)
    assert len(calls) == 2 * 3 * 5  # layers and steps


def test_receipts_tell_what_is_held_from_what_is_read():
    model, inputs = model_of("Whisper"), inputs_of("Whisper")
    run = recorded(model, inputs, ReadsLogits(count=5))[2]
    report = run.report
    assert report.bytes_held == report.bytes_full
    for layer, receipt in zip(report.layers, report.steps, strict=True):
        assert receipt.layer_idx == layer.layer_idx
        assert (receipt.steps, receipt.entries_read) == (5, 5.0)
        assert receipt.bytes_held == layer.bytes_held
        assert receipt.bytes_read_per_step * layer.columns == layer.bytes_held * 5
    for read in run.step_reads:
        assert read.columns.sum(-1).eq(5).all()


def test_only_what_observe_drops_is_freed():
    model, inputs = model_of("BART"), inputs_of("BART")
    with kvprune.compress(model, Remembers(least=5)) as run:
        cache = generate(model, inputs, steps=6)[2]
    assert cache is not None
    for layer, receipt in zip(run.report.layers, run.report.steps, strict=True):
        assert (layer.columns, layer.width, receipt.width) == (9, 5, 5)  # one entry in each of four steps
        assert layer.bytes_held * 9 == receipt.bytes_held * 9 == layer.bytes_full * 5
    assert run.report.verify() == run.report.bytes_held


def copied(policy, **methods):
    """Return a policy of the same class and options with other methods."""
    cls = dataclass(frozen=True, kw_only=True)(type("Broken", (type(policy),), methods))
    return cls(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)})


def picking(places, valid=None):
    def attend(self, step, state):
        made = torch.tensor(places).expand(step.text_rows, 1, -1)
        real = torch.ones_like(made, dtype=torch.bool) if valid is None else torch.tensor(valid)
        return Selection.trusted(made, real.expand_as(made), step.entries)

    return attend


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (picking([1, 2], [False, False]), "KV03: it selects nothing for some row"),
        (picking([1, 50]), "KV01: it selects entries that the layer does not hold"),
        (picking([-1, 2]), "KV01: it selects entries that the layer does not hold"),
        (picking([2, 1]), "KV01: its entries are not strictly increasing"),
        (picking([1, 1]), "KV01: its entries are not strictly increasing"),
        (lambda self, step, state: [1, 2], "attend returned list, expected a Selection or None"),
        (lambda self, step, state: Selection.all(1, 50), r"attend selects \[1, 1, 50\] out of 50 entries"),
        (lambda self, step, state: Selection.all(3, 7), r"attend selects \[3, 1, 7\] out of 7 entries"),
    ],
)
def test_a_bad_answer_is_refused(answer, message):
    with pytest.raises(SelectionError, match=rf"policy 'reads-all' in a decode step at layer 0: .*{message}"):
        recorded(model_of("Whisper"), inputs_of("Whisper"), copied(ReadsAll(), attend=answer))


@pytest.mark.parametrize("family", ["Whisper", "BART"])  # rows may read everything; padding is hidden
@pytest.mark.parametrize("pages", [False, True])
def test_scores_that_are_no_numbers_are_refused(family, pages):
    def attend(self, step, state):
        scores = torch.zeros(step.text_rows, 1, step.entries)
        scores[:, :, 1] = torch.nan
        return step.best_pages(scores, 1, 2) if pages else step.best(scores, 2)

    with pytest.raises(SelectionError, match=r"'reads-all' .*attend: step\.best got NaN as the score"):
        recorded(model_of(family), inputs_of(family), copied(ReadsAll(), attend=attend))


def test_scores_of_padding_may_be_no_numbers():
    def attend(self, step, state):
        scores = torch.zeros(step.text_rows, 1, step.entries)
        return step.best(scores.masked_fill(~step.readable, torch.nan), 2)

    run = recorded(model_of("BART"), inputs_of("BART"), copied(ReadsAll(), attend=attend))[2]
    assert run.report.read_fraction < 1


def test_an_entry_that_is_hidden_from_a_row_is_refused():
    """The last sample of BART's batch has padding, which decoding does not see."""
    answer = picking([0, 8])
    with pytest.raises(SelectionError, match="entries that the layer does not hold, or that the row may not"):
        recorded(model_of("BART"), inputs_of("BART"), copied(ReadsAll(), attend=answer))


def test_what_a_compiled_step_did_wrong_is_raised_when_the_block_ends(monkeypatch):
    """As on a GPU, where a step does not wait for the values of an answer."""
    from kvprune.engine.stepping import Stepping

    at_once = Stepping._raise
    monkeypatch.setattr(Stepping, "_raise", lambda *_: None)
    broken = copied(ReadsAll(), attend=picking([1, 50]))
    run = kvprune.compress(model_of("Whisper"), broken)
    with run:
        generate(model_of("Whisper"), inputs_of("Whisper"))
        monkeypatch.setattr(Stepping, "_raise", at_once)
        with pytest.raises(SelectionError, match="KV01: it selects entries"):
            run.report  # noqa: B018
        monkeypatch.setattr(Stepping, "_raise", lambda *_: None)
        generate(model_of("Whisper"), inputs_of("Whisper"))
        monkeypatch.setattr(Stepping, "_raise", at_once)
        with pytest.raises(SelectionError, match="KV01: it selects entries"):  # when the next prefill begins
            generate(model_of("Whisper"), inputs_of("Whisper"), steps=1)
        monkeypatch.setattr(Stepping, "_raise", lambda *_: None)
        generate(model_of("Whisper"), inputs_of("Whisper"))
    monkeypatch.setattr(Stepping, "_raise", at_once)
    with pytest.raises(SelectionError, match="KV01: it selects entries"):
        run.check_ran()


@pytest.mark.parametrize(
    ("methods", "error", "message"),
    [
        ({"prepare": lambda self, view: [1]}, PolicyFailedError, "returned the state"),
        (
            {"prepare": lambda self, view: {"x": torch.zeros(7, 2)}},
            PolicyFailedError,
            r"state\['x'\] of shape \[7, 2\]; the first axis",
        ),
        (
            {"observe": lambda self, step, attention, state: state},
            PolicyFailedError,
            "observe returned dict, expected a pair",
        ),
        (
            {"observe": lambda self, step, attention, state: ({}, None)},
            PolicyFailedError,
            r"a state with \[\], but prepare made \['mass'\]",
        ),
        (
            {"attend": lambda self, step, state: 1 / 0},
            PolicyFailedError,
            "raised ZeroDivisionError in a decode step at layer 0",
        ),
        (
            {"attend": lambda self, step, state: step.keys.mul_(2) is None},
            PolicyFailedError,
            "raised|changed keys or values in place",
        ),
    ],
)
def test_other_mistakes_name_the_policy(methods, error, message):
    with pytest.raises(error, match=f"policy 'remembers'.*({message})"):
        recorded(model_of("Whisper"), inputs_of("Whisper"), copied(Remembers(), **methods))


def test_a_step_policy_needs_a_cache_that_it_has_filled():
    model, inputs = model_of("BART"), inputs_of("BART")
    with pytest.raises(UnsupportedCacheError, match="so no step would read one"):
        recorded(model, inputs, ReadsLogits(), use_cache=False)
    text = {**inputs, "decoder_input_ids": torch.tensor([[2]] * 3)}
    with torch.no_grad():
        cache = model(**text).past_key_values
        with (
            pytest.raises(UnsupportedCacheError, match="layer 0 of this cache was filled without it"),
            kvprune.compress(model, ReadsLogits()),
        ):
            model(**text, past_key_values=cache)


def test_an_error_in_a_step_leaves_no_trace():
    model, inputs = copy.deepcopy(model_of("BART")), inputs_of("BART")
    expected = recorded(model, inputs, "full")[1]
    with pytest.raises(PolicyFailedError):
        recorded(model, inputs, copied(ReadsAll(), attend=lambda self, step, state: 1 / 0))
    assert torch.equal(generate(model, inputs)[1], expected)
