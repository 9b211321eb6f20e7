"""Off-load with prefetch: what is generated, read and reported, and what is refused.

On the CPU, host memory is the device's own, so these tests show that the right entries are read at the right
time. `test_offload_gpu` shows the rest.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from families import MODELS, inputs_of, model_of
from generation import generate, mllama, tiny_bart
from step_policies import Fixed
from stepping import recorded, two_images
from test_steps import copied
from transformers import DynamicCache, EncoderDecoderCache

import kvprune
from kvprune.cache import host_memory
from kvprune.cache.cross_layer import CrossKVLayer
from kvprune.cache.host_memory import Courier, Fetch
from kvprune.cache.shared_rows import SharedRows
from kvprune.cache.step_memory import StepMemory
from kvprune.engine.stepping import Stepping
from kvprune.errors import PolicyFailedError, SavedCacheError, SelectionError, UnsupportedCacheError
from kvprune.tokens.selection import Selection

SPECS = ("attnpred:keep_ratio=0.3,predictor=ema,interval=3,block=2", "attnpred:keep_tokens=3")
WAYS = (
    (SPECS[0], {}),
    (SPECS[1], {"num_beams": 3}),
    (SPECS[0], {"num_beams": 2, "num_return_sequences": 2, "do_sample": True, "steps": 5}),
    (SPECS[1], {"do_sample": True, "num_return_sequences": 2, "steps": 4}),
)


@dataclass(frozen=True, kw_only=True)
class Rotates(kvprune.DecodePolicy):
    """Read entries that the number of the step decides; the state never changes.

    Args:
        count: How many.
        offload: Whether the cache lies in host memory.
    """

    count: int = 3
    offload: bool = False
    name = "rotates"
    foresees = True

    @property
    def offloads(self):
        return self.offload

    def prepare(self, view):
        return {}

    def attend(self, step, state):
        place = torch.arange(step.entries, device=step.device)
        scores = torch.sin(100 * step.taken + 37 * place).expand(step.text_rows, 1, -1)
        return step.best(scores, self.count)


@pytest.fixture(params=["at once", "by a thread"])
def fetching(request, monkeypatch):
    """Copies are made as on this device, and by a thread, as on CUDA."""
    if request.param == "by a thread":
        monkeypatch.setattr(host_memory, "_in_background", lambda device: True)


def both(model, inputs, spec, **options):
    """Generate with and without off-load, and compare what is generated and read."""
    here = recorded(model, inputs, spec, **options)
    away = recorded(model, inputs, f"{spec},offload=true", **options)
    require_same(here, away)
    return here[2].report, away[2].report


def require_same(here, away):
    assert torch.equal(away[0], here[0])
    assert torch.equal(away[1], here[1])
    for one, other in zip(here[2].step_reads, away[2].step_reads, strict=True):
        assert torch.equal(one.columns, other.columns)


@pytest.mark.parametrize(("spec", "options"), WAYS, ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_it_generates_and_reads_the_same(family, spec, options):
    here, away = both(model_of(family), inputs_of(family), spec, **options)
    assert away.bytes_held == here.bytes_held


def test_by_a_thread_it_generates_the_same(monkeypatch):
    monkeypatch.setattr(host_memory, "_in_background", lambda device: True)
    for spec, options in WAYS:
        both(model_of("BART"), inputs_of("BART"), spec, **options)


@pytest.mark.parametrize("family", MODELS)
def test_the_report_says_where_the_cache_lies(family):
    here, away = both(model_of(family), inputs_of(family), SPECS[0])
    for one, other in zip(here.steps, away.steps, strict=True):
        assert (one.bytes_on_host, one.bytes_staged) == (0, 0)
        assert other.bytes_on_host == other.bytes_held == one.bytes_held
        per_entry = other.bytes_held // other.width  # of all rows and heads
        count = kvprune.Budget(keep_ratio=0.3).resolve(other.width)
        assert other.bytes_staged == count * per_entry
    assert "MiB lie in host memory, with copies of at most" in str(away)
    assert "host memory" not in str(here)
    assert [warning for warning in away.warnings if "this saves no memory" in warning]


def test_a_step_reads_what_was_fetched_after_the_step_before(monkeypatch):
    """Only the first step fetches what it reads itself; steps that read everything copy the layer."""
    events = []

    def noting(cls, name, what):
        method = getattr(cls, name)

        def noted(self, *args, **kwargs):
            events.append(what(self, *args))
            return method(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, noted)

    noting(CrossKVLayer, "stage", lambda layer, answer, number, _: ("stage", number))
    noting(CrossKVLayer, "read", lambda layer, *_: ("read now", layer.steps.taken_eagerly - 1))
    noting(Stepping, "attend", lambda _, layer, *rest: ("attend", layer.steps.taken_eagerly))
    model = copy.deepcopy(model_of("BART"))
    model.config.decoder_layers = 1
    model.model.decoder.layers = model.model.decoder.layers[:1]
    spec = "attnpred:keep_ratio=0.3,predictor=last,interval=3,block=2,offload=true"
    recorded(model, inputs_of("BART"), spec, steps=6)
    assert events == [
        ("attend", 0),
        ("read now", 0),
        ("stage", 1),
        ("attend", 1),
        ("attend", 2),  # reads everything
        ("stage", 3),
        ("attend", 3),
        ("stage", 4),
        ("attend", 4),
    ]


@pytest.mark.parametrize("family", MODELS)
def test_a_policy_that_observes_nothing_may_take_drafts(family):
    model, inputs = model_of(family), inputs_of(family, "one")
    for options in ({"prompt_lookup_num_tokens": 3, "steps": 12}, {"reread": True, "num_beams": 2}):
        here = recorded(model, inputs, Rotates(), **options)
        require_same(here, recorded(model, inputs, Rotates(offload=True), **options))


def test_a_token_that_is_taken_back_is_chosen_for_again():
    """The text alone is cropped, so that only the number of the step says that what is staged is stale."""
    model, inputs, found = model_of("BART"), inputs_of("BART"), []
    for offload in (False, True):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with kvprune.compress(model, Rotates(offload=offload)), torch.no_grad():
            for token, crop in ((2, 0), (5, 0), (6, 0), (7, -1)):
                if crop:
                    cache.self_attention_cache.crop(crop)
                ids = torch.tensor([[token]] * 3)
                logits = model(**inputs, decoder_input_ids=ids, past_key_values=cache).logits
        found.append(logits)
    assert torch.equal(*found)


def test_a_later_image_and_two_runs_in_one_block():
    model, (first, second) = mllama(torch.float64), two_images()
    found = []
    for offload in ("false", "true"):
        spec = f"attnpred:keep_ratio=0.3,predictor=last,interval=0,block=2,offload={offload}"
        with kvprune.compress(model, spec), torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            whole = generate(model, second, past_key_values=cache)[1]
            found.append((whole, generate(model, first)[1]))
            assert (cache.layers[1].host is None) is (offload == "false")
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.usefixtures("fetching")
def test_a_copy_of_a_cache_goes_its_own_way():
    """A copy has nothing staged, and chooses and fetches in its next step."""
    model, inputs = model_of("BART"), inputs_of("BART")
    found = {}
    for offload in ("false", "true"):
        spec = f"attnpred:keep_ratio=0.3,predictor=last,interval=0,block=2,offload={offload}"
        with kvprune.compress(model, spec), torch.no_grad():
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            ids = torch.tensor([[2], [3], [4]])
            for _ in range(3):
                model(**inputs, decoder_input_ids=ids, past_key_values=cache)
            other = copy.deepcopy(cache)
            logits = [
                model(**inputs, decoder_input_ids=ids + more, past_key_values=one).logits
                for more, one in ((1, cache), (1, other), (2, other), (2, cache))
            ]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[2], logits[3])
        found[offload] = torch.stack(logits)
    assert torch.equal(found["true"], found["false"])


@pytest.mark.usefixtures("fetching")
def test_in_inference_mode():
    with torch.inference_mode():
        both(model_of("BART"), inputs_of("BART"), SPECS[0], num_beams=2)


def test_contrast_reads_the_same():
    model, inputs = model_of("BART"), inputs_of("BART")
    spec, found = "attnpred:keep_ratio=0.2,predictor=last,block=2,interval=0", []
    for against in (spec, f"{spec},offload=true"):
        with kvprune.contrast(model, against=against, combine="mint"):
            found.append(generate(model, inputs, num_beams=2)[1])
    assert torch.equal(*found)


def filled(copies=1):
    """A layer of 2 held rows, 2 heads and 5 entries, in host memory, and the same on the device."""
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 5, 3, generator=random).repeat_interleave(copies, 1)
    layers = []
    for _ in range(2):
        layer = CrossKVLayer()
        layer.expect(None, 5, SharedRows(copies))
        layer.update(keys.clone(), values.clone())
        layer.steps = StepMemory({}, keys.device)
        layers.append(layer)
    layers[0].to_host(Courier())
    answer = torch.stack([torch.randperm(5, generator=random)[:2].sort().values for _ in range(2 * copies)])
    answer = Selection.full(answer[:, None], 5)
    layers[0].stage(answer, 0, torch.arange(2 * copies)[:, None, None].expand(-1, 1, 5) % 2 == 0)
    return *layers, answer


MOVES = {
    "reorders": lambda layer: layer.reorder_cache(torch.tensor([3, 2, 0, 0])),
    "reorders twice": lambda layer: [layer.reorder_cache(torch.tensor(way)) for way in ([1, 3, 2, 0],) * 2],
    "reorders copies": lambda layer: layer.reorder_cache(torch.tensor([1, 0, 3, 3])),
    "selects": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "separates": lambda layer: layer.separate(),
}
ROWS = {
    "reorders": [3, 2, 0, 0],
    "reorders twice": [3, 0, 2, 1],
    "reorders copies": [1, 0, 3, 3],
    "selects": [2, 1],
    "separates": [0, 1, 2, 3],
}


@pytest.mark.usefixtures("fetching")
@pytest.mark.parametrize("move", MOVES)
def test_what_is_staged_follows_the_rows(move):
    layer, plain, answer = filled(copies=2)
    wanted = [side[ROWS[move]] for side in plain.read(answer.indices)]
    readable = layer.host.staged.readable[ROWS[move]]
    MOVES[move](layer)
    MOVES[move](plain)
    staged = layer.host.staged
    assert torch.equal(staged.answer.indices, answer.indices[ROWS[move]])
    assert torch.equal(staged.readable, readable)
    for found in (layer.read(staged.answer.indices), layer.host.take(staged.answer)):
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert layer.host.staged is None
    for one, other in zip(layer.spread(), plain.spread(), strict=True):
        assert torch.equal(one, other)


def test_what_else_happens_to_a_layer_forgets_what_is_staged():
    for move in (
        lambda layer: layer.crop(-1),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.host.take(Selection.full(torch.zeros(2, 1, 1, dtype=torch.int64), 5)),
    ):
        layer, _, answer = filled()
        move(layer)
        assert layer.host.staged is None
        assert layer.host.take(answer) is None
    for move in (
        lambda layer: layer.to(dtype=torch.float64),
        lambda layer: layer.reset(),
        lambda layer: layer.expect(None, 1),
    ):
        layer, _, _ = filled()
        move(layer)
        assert layer.host is None
    layer, plain, _ = filled()
    assert copy.deepcopy(layer).host.staged is None
    assert not layer.is_readable
    assert layer.bytes_held == plain.bytes_held == layer.bytes_behind


def test_an_error_of_the_thread_is_raised_where_the_copy_is_read(monkeypatch):
    monkeypatch.setattr(host_memory, "_in_background", lambda device: True)
    sides = torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 1)
    fetch = Fetch(sides, torch.tensor([5]), (1, 1, 1), torch.device("cpu"), Courier())
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|index"):
        fetch.result()


def without(**changes):
    return copied(Rotates(offload=True), **changes)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (without(foresees=False), PolicyFailedError, "does not say foresees = True.*such as attnpred"),
        (without(offloads="yes"), PolicyFailedError, "has the offloads 'yes'; expected True or False"),
        (
            without(attend=lambda self, step, state: step.queries and None),
            PolicyFailedError,
            r"its attend asked for step\.queries in a decode step at layer 0; while entries lie",
        ),
        (
            without(attend=lambda self, step, state: step.best(step.keys.sum(-1), 3)),
            (PolicyFailedError, SelectionError),
            "'rotates'.*(meta|Meta)",
        ),
        (
            without(observe=lambda self, step, attention, state: (state, step.best(attention, 5))),
            UnsupportedCacheError,
            r"drops entries in a decode step, but those of this layer lie in host memory \(offload\)",
        ),
    ],
)
def test_policies_that_are_refused(policy, error, message):
    with pytest.raises(error, match=message):
        recorded(model_of("Whisper"), inputs_of("Whisper"), policy)


def test_a_mask_that_changes_after_entries_were_fetched_is_refused():
    model, inputs = model_of("BART"), inputs_of("BART")
    other = inputs | {"attention_mask": inputs["attention_mask"].flip(0)}
    spec = "attnpred:keep_ratio=0.5,predictor=last,interval=0,block=2,offload="
    ids = torch.tensor([[2]] * 3)
    for offload in ("false", "true"):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with kvprune.compress(model, f"{spec}{offload}"), torch.no_grad():
            states = model.get_encoder()(**inputs)
            call = {"encoder_outputs": states, "decoder_input_ids": ids, "past_key_values": cache}
            model(**call, attention_mask=torch.ones_like(inputs["attention_mask"]))
            model(**call, attention_mask=inputs["attention_mask"])
            if offload == "false":
                model(**call, attention_mask=other["attention_mask"])
                continue
            with pytest.raises(SelectionError, match="these were fetched already; leave out offload"):
                model(**call, attention_mask=other["attention_mask"])


def test_quantized_entries_and_gradients_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Quantizes(Rotates):
        name = "quantizes"

        def select(self, view):
            bits = torch.full((1, 1, view.columns), 8, dtype=torch.uint8)
            every = Selection.all(view.batch, view.columns, view.device)
            return kvprune.Decision(
                cache=Selection.trusted(
                    every.indices, every.valid, view.columns, bits=bits.expand_as(every.indices)
                )
            )

    model, inputs = model_of("Whisper"), inputs_of("Whisper")
    with pytest.raises(UnsupportedCacheError, match="are quantized, and cannot be kept in host memory"):
        recorded(model, inputs, Quantizes(offload=True))
    spec = "attnpred:predictor=last,offload=true"
    with (
        kvprune.compress(model, spec),
        pytest.raises(UnsupportedCacheError, match=r"carry gradients \(call the model under torch\.no_grad"),
    ):
        model(**inputs, decoder_input_ids=torch.tensor([[2]] * 3))


def test_what_is_refused_of_its_cache(tmp_path):
    model, inputs = model_of("BART"), inputs_of("BART")
    call = inputs | {"decoder_input_ids": torch.tensor([[2]] * 3)}
    with kvprune.compress(model, "attnpred:predictor=last,offload=true") as run, torch.no_grad():
        cache = model(**call).past_key_values
        with pytest.raises(SavedCacheError, match="keeps this cache in host memory, and a file would not"):
            run.save(cache, tmp_path / "cache.safetensors", call)
        assert not list(tmp_path.iterdir())
        model(**call, past_key_values=cache)
        assert run.report.verify() == run.report.bytes_held
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedCacheError, match="lies in host memory, and outside the block nobody"),
    ):
        model(**call, past_key_values=cache)
    with kvprune.compress(model, "full"), torch.no_grad():  # another run may read it
        model(**call, past_key_values=cache)


def test_decoding_is_not_compiled():
    @dataclass(frozen=True, kw_only=True)
    class Traceable(Fixed):
        name = "traceable"
        foresees = True
        offloads = True

    model, inputs = model_of("BART"), inputs_of("BART")
    for policy, compiles in ((Fixed(keep_ratio=0.3), True), (Traceable(keep_ratio=0.3), False)):
        found = recorded(model, inputs, policy)
        with kvprune.compress(model, policy), torch.no_grad():
            cache = model(**inputs, decoder_input_ids=torch.tensor([[2]] * 3)).past_key_values
            assert cache.cross_attention_cache.layers[0].is_compileable is compiles
            static = generate(model, inputs, cache_implementation="static")[1]
        assert torch.allclose(static, found[1], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_code_that_a_user_compiles_counts_steps(offload):
    """With breaks in the graph: number and entries are chosen outside of it."""
    torch._dynamo.reset()
    model, inputs, found = tiny_bart(1, dtype=torch.float64), inputs_of("BART"), []
    for decode in (model, torch.compile(model, backend="eager")):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with kvprune.compress(model, Rotates(offload=offload)), torch.no_grad():
            model(**inputs, decoder_input_ids=torch.tensor([[2]] * 3), past_key_values=cache)
            for token in (5, 6, 7):
                ids = torch.tensor([[token]] * 3)
                logits = decode(**inputs, decoder_input_ids=ids, past_key_values=cache).logits
        found.append(logits)
    assert torch.equal(*found)
