"""`check_adapter`: which families pass, what is not applicable, and what makes no sense."""

from __future__ import annotations

import importlib
import inspect
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import OLD
from zoo import adapters as zoo

import kvprune
from kvprune.adapters.base import ModelAdapter
from kvprune.adapters.encoder_decoder import EncoderDecoderAdapter
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.families.whisper import WhisperAdapter
from kvprune.adapters.mllama import MllamaAdapter
from kvprune.errors import ConformanceError, PluginError, UnknownInvariantError, UnsupportedModelError
from kvprune.testing import check_adapter, enliven, masked_oracle, mllama_inputs, tiny_bart, tiny_mllama
from kvprune.testing.conformance import ADAPTER_INVARIANTS

NOT_APPLICABLE = {
    MllamaAdapter: {"drafts": "does not generate with assistant_early_exit"},
    BartAdapter: {"logits": "has no logits_to_keep"},
    WhisperAdapter: {"logits": "has no logits_to_keep", "padding": "no attention_mask"},
}
NOT_CHECKED = {MllamaAdapter: {"history": "takes no encoder outputs by hand"}}


def failure_of(*adapter, **options):
    with pytest.raises(ConformanceError) as failure:
        check_adapter(*adapter, **options)
    return failure.value


@pytest.mark.parametrize(
    "adapter",
    [MllamaAdapter, WhisperAdapter, pytest.param(BartAdapter, marks=pytest.mark.slow)],  # below, MBart passes
)
def test_built_in_adapters_pass(adapter):
    report = check_adapter(adapter)
    assert [result.id for result in report.results] == [row.id for row in ADAPTER_INVARIANTS]
    told = {**NOT_APPLICABLE[adapter], **NOT_CHECKED.get(adapter, {})}
    for result in report.results:
        applies = result.id not in NOT_APPLICABLE[adapter]
        assert result.outcome == ("passed" if applies else "not applicable"), result
        assert bool(result.problems) == applies
        assert told[result.id] in result.detail if result.id in told else not result.detail


# A third party's family: a declaration, a tiny model, a batch.


class MBartAdapter(EncoderDecoderAdapter):
    family = "mBART"
    model_classes = ("MBartForConditionalGeneration",)


class PegasusAdapter(EncoderDecoderAdapter):
    family = "Pegasus"
    model_classes = ("PegasusForConditionalGeneration",)


def tiny(name, dtype):
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    return enliven(model).to(dtype)


def tiny_mbart(dtype):
    return tiny("MBart", dtype)


def tiny_pegasus(dtype):
    return tiny("Pegasus", dtype)


def texts(dtype):
    return BartAdapter.example(dtype)[1]


@pytest.mark.parametrize(
    ("adapter", "make_model"),
    [(MBartAdapter, tiny_mbart), pytest.param(PegasusAdapter, tiny_pegasus, marks=pytest.mark.slow)],
)
def test_a_declaration_suffices(adapter, make_model):
    report = check_adapter(adapter, make_model, texts)
    not_applicable = {result.id for result in report.results if result.outcome != "passed"}
    # Older releases take a prompt that ends with an end-of-sequence token, as that of MBart, for finished.
    refused = {"drafts"} if OLD and adapter is MBartAdapter else set()
    assert not_applicable == {"logits"} | refused
    assert report.subject == adapter.__name__


def test_the_declared_names_are_what_the_oracle_uses():
    class Misdeclared(MBartAdapter):
        mask = "position_mask"

    error = failure_of(Misdeclared, tiny_mbart, texts, only=["class", "KV13"])
    assert [result.id for result in error.report.failures] == ["class", "KV13"]
    assert "MBartAttention: forward lacks position_mask" in str(error)


def test_the_installed_adapter_is_found():
    report = check_adapter(None, lambda dtype: tiny_bart(dtype=dtype), texts, only=["class"])
    assert report.subject == "BartAdapter"


class FlatAdapter(ModelAdapter):
    """Mllama by somebody who derives from nothing that the suite knows: everything is delegated."""

    family = "flat"
    model_classes = MllamaAdapter.model_classes
    probe = MllamaAdapter.probe
    example = MllamaAdapter.example

    def __init__(self, model):
        super().__init__(model)
        self._real = MllamaAdapter(model)

    @property
    def layer_indices(self):
        return self._real.layer_indices

    def attach(self, manager):
        self._real.attach(manager)

    def detach(self):
        super().detach()
        self._real.detach()


@contextmanager
def my_oracle(model, selections, prefill_selections):
    with masked_oracle(model, selections, prefill_selections):
        yield


def test_what_is_not_known_of_a_family_is_not_applicable():
    outcomes = {r.id: (r.outcome, r.detail) for r in check_adapter(FlatAdapter).results}
    for invariant in ("view", "KV06", "KV13", "weights"):
        outcome, why = outcomes.pop(invariant)
        assert outcome == "not applicable"
        assert "does not say where flat attends" in why
    assert outcomes.pop("drafts")[0] == "not applicable"
    assert outcomes.pop("reread") == ("not applicable", "FlatAdapter cannot read the last token again")
    assert {outcome for outcome, _ in outcomes.values()} == {"passed"}


def test_an_oracle_can_be_given():
    (result,) = check_adapter(FlatAdapter, only=["KV13"], oracle=my_oracle).results
    assert (result.outcome, result.problems) == ("passed", 19)


def test_without_a_mask_what_text_sees_is_not_applicable():
    def blind(dtype):
        inputs = mllama_inputs(["4ttt", "3ttt"], 1, dtype)
        del inputs["cross_attention_mask"]
        return inputs

    report = check_adapter(
        MllamaAdapter, lambda dtype: tiny_mllama(1, dtype=dtype), blind, only=["KV01", "KV02"]
    )
    assert [result.outcome for result in report.results] == ["passed", "not applicable"]
    assert "does not follow from these inputs" in report.results[1].detail


def one_text(dtype):
    return {name: tensor[:1] for name, tensor in texts(dtype).items()}


def in_training(dtype):
    return tiny_mbart(dtype).train()


def fresh(dtype):
    torch.manual_seed(0)
    return type(tiny_mbart(dtype))(tiny_mbart(dtype).config).eval().to(dtype)


def deaf(dtype):
    model = tiny_mbart(dtype)
    for layer in model.get_decoder().layers:
        torch.nn.init.zeros_(layer.encoder_attn.out_proj.weight)
    return model


@pytest.mark.parametrize(
    ("make_model", "make_inputs", "message"),
    [
        (tiny_mbart, one_text, "at least two samples that differ"),
        (in_training, texts, "eval mode"),
        (fresh, texts, "kvprune.testing.enliven"),
        (deaf, texts, "kvprune.testing.enliven"),
    ],
)
def test_a_model_or_a_batch_that_shows_nothing_is_refused(make_model, make_inputs, message):
    assert message in str(failure_of(MBartAdapter, make_model, make_inputs, only=["class"]))


def test_reproducers_name_functions_or_say_what_must_be_defined():
    named = failure_of(MBartAdapter, deaf, texts, only=["class"], seed=3).report.results[0].reproducer
    module = __name__
    assert named.splitlines() == [
        f"from {module} import MBartAdapter",
        f"from {module} import deaf",
        f"from {module} import texts",
        "from kvprune.testing import check_adapter",
        "",
        "check_adapter(MBartAdapter, deaf, texts, only=['class'], seed=3)",
    ]

    def local(dtype):
        return deaf(dtype)

    told = failure_of(MBartAdapter, local, lambda dtype: texts(dtype), only=["class"]).report.results[0]
    assert "<locals>.local of " in told.reproducer
    assert "must be defined here" in told.reproducer
    assert told.reproducer.endswith("check_adapter(MBartAdapter, local, ..., only=['class'])")
    compile(told.reproducer, "reproducer", "exec")


def test_failures_say_where():
    text = str(failure_of(zoo.OneTooWide, only=["KV06"]))
    assert text.startswith("OneTooWide breaks KV06 (failed)")
    assert "expected masks as wide as what each layer holds" in text
    assert "columns (RuntimeError followed)" in text
    assert "under norm:keep_ratio=0.3, float64, greedy" in text


def test_declared_failures_are_reported_and_pass():
    report = check_adapter(zoo.NoScaling, only=["view"], expected_failures={"view": "no scale yet"})
    assert report.results[0].outcome == "expected failure"
    error = failure_of(BartAdapter, only=["view"], expected_failures={"view": "no scale yet"})
    assert "breaks view (unexpectedly passed)" in str(error)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UnknownInvariantError, match=r"nothing 'KV14' is checked of an adapter; did you mean"):
        check_adapter(BartAdapter, only=["KV14"])
    with pytest.raises(UnsupportedModelError, match=r"expected a class derived from .*ModelAdapter, got 42"):
        check_adapter(42)
    with pytest.raises(UnsupportedModelError, match="got None"):
        check_adapter(None)
    with pytest.raises(PluginError, match="MBartAdapter does not say how to make a tiny example"):
        check_adapter(MBartAdapter)


def test_models_and_classes_are_as_before():
    model, inputs = BartAdapter.example(torch.float64)
    check_adapter(BartAdapter, lambda dtype: model, lambda dtype: inputs, only=["KV07", "KV12"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with kvprune.compress(model, "full"):
        model.generate(**inputs, max_new_tokens=2)


def test_enliven_is_repeatable_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    one, other = (enliven(tiny_bart(), seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [
        model.get_decoder().layers[0].encoder_attn.k_proj.weight for model in (one, other, tiny_bart())
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_document_names_every_row():
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text("utf-8")
    _, _, section = page.partition("\n## Adapters")
    for row in ADAPTER_INVARIANTS:
        assert re.search(rf"^\|[^|]*\b{row.id}\b[^|]*\|", section, re.MULTILINE), row
    for name in inspect.signature(check_adapter).parameters:
        assert name in page, name
